"""Item embeddings: the table of items, dense or compressed."""
