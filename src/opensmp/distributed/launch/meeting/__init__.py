"""Rendezvous: how the processes of a run find each other."""
