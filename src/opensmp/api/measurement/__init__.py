"""What is measured of a run: its memory, and which settings are fastest."""
