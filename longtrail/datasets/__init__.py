"""Readers: one file a source, each turning its own layout into the same raw log."""
