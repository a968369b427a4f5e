"""The processes of `opensmp run`, on this machine and on others."""
