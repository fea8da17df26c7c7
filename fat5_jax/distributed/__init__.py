"""The mesh that a run is on, and the hosts that share it."""
