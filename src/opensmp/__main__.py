"""`python -m opensmp`: the command line."""

from __future__ import annotations

from opensmp.cli import main

main()
