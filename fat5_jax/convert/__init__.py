"""Checkpoints of other libraries in and out, as strict tables. No torch."""
