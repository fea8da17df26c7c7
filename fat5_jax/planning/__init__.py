"""A run rehearsed for chips that are not here."""
