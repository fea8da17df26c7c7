"""T5 in flax.linen. Runs without seqio, TensorFlow, gin, optax and orbax."""
