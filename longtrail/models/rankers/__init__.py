"""Rankers: history and candidates to click logits."""
