"""A run: where it starts, its steps, what it writes."""
