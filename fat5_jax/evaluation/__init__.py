"""A model is scored: its loss on a split, its predictions of it."""
