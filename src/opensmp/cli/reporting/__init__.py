"""`opensmp report`: a page of what a run has written into a folder."""
