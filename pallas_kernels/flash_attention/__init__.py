"""Flash attention with an in-kernel relative position bias; see api.py."""
