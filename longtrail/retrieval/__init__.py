"""Top-k over the catalogue."""
