"""Processes and the communication between them; independent of pipelines."""
