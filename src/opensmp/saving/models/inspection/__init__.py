"""Files that others made, checked before anything is made of them."""
