"""What a run measured, to files."""
