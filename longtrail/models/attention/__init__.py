"""Attention over histories."""
