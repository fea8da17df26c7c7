"""How the tokens of an answer are chosen: a search a file.

Each takes an `Ask` and gives `Found`, and knows of the model what `ask.step`
tells it: `step(tokens_N1, cache, index) -> (logits_N1V, cache)`.
"""

from fat5_jax.inference.search.ask import Ask, Found, Step
from fat5_jax.inference.search.beam import beam_search
from fat5_jax.inference.search.greedy import greedy_search
from fat5_jax.inference.search.sample import sample

__all__ = ["Ask", "Found", "Step", "beam_search", "greedy_search", "sample"]
