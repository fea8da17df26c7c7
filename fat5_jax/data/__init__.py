"""Rows to batches: sources, tasks and the input pipeline. SeqIO lives here."""
