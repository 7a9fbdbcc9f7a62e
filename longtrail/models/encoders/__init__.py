"""Sequence encoders: a history to a user vector."""
