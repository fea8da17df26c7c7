"""Which example comes next, and where it lies: store, order, packing."""
