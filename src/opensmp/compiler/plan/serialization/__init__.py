"""Plans as JSON files."""
