"""Times measured on the devices at hand."""
