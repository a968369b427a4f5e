"""Processes and the communication between them.

The package knows nothing of pipelines.
"""
