"""Searches: Hugging Face's `generate`, T5X's equations, exact distributions."""

import functools
import itertools
import pathlib
import tempfile

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from test_hf import ALL, ours_and_theirs
import torch

from fat5_jax.inference import decoding
from fat5_jax.inference.search import constraints
from fat5_jax.inference.search.sample import at_quantile, kept
from fat5_jax.models import layer_stack
from fat5_jax.models.t5 import Transformer

LENGTH = 14


@functools.cache
def random_model(family):
  """(theirs, config, params) of a model, most of whose answers end early."""
  with tempfile.TemporaryDirectory() as folder:
    model, config, params = ours_and_theirs(family, pathlib.Path(folder))
  x, _ = hf_models.tokens(rows=6)
  tokens, _ = found_by_theirs(model, x, do_sample=True, num_return_sequences=8)
  # What it says often, though not at first, is its end.
  values, counts = np.unique(tokens[:, :, 2:], return_counts=True)
  often = int(values[counts[values > 1].argmax() + (values <= 1).sum()])
  model.generation_config.eos_token_id = often
  return model, config.replace(eos_token_id=often), params


def found_by_ours(config, params, x, how, **seeds):
  generate = functools.partial(
    decoding.generate, Transformer(config), max_length=LENGTH, how=how, **seeds
  )
  return jax.tree.map(np.asarray, jax.jit(generate)(params, x))


def found_by_theirs(model, x, **how):
  """(tokens (B, S, L), scores (B, S))."""
  out = model.generate(
    torch.tensor(x).long(),
    attention_mask=torch.tensor(x != 0).long(),
    max_new_tokens=LENGTH,
    output_scores=True,
    return_dict_in_generate=True,
    **how,
  )
  tokens = np.zeros((len(out.sequences), LENGTH), np.int64)
  tokens[:, : out.sequences.shape[1] - 1] = out.sequences[:, 1:].numpy()
  # After an end, beams are filled up with what `pad_token_id or eos` is: eos.
  ends = tokens == model.generation_config.eos_token_id
  tokens[np.cumsum(ends, axis=1) - ends > 0] = 0
  tokens = tokens.reshape(len(x), -1, LENGTH)
  scores = getattr(out, "sequences_scores", None)
  if scores is None:
    return tokens, None
  return tokens, scores.numpy().reshape(tokens.shape[:2])


BEAMS = [
  dict(num_beams=2),
  dict(num_beams=4, num_return_sequences=4),
  dict(num_beams=8, num_return_sequences=3),
  dict(num_beams=4, length_penalty=2.0, num_return_sequences=2),
  dict(num_beams=4, length_penalty=-1.0, num_return_sequences=4),
  dict(num_beams=4, early_stopping=True, num_return_sequences=4),
  dict(num_beams=3, early_stopping="never", num_return_sequences=3),
  dict(num_beams=3, early_stopping="never", length_penalty=0.0),
  dict(num_beams=4, no_repeat_ngram_size=2, num_return_sequences=2),
  dict(num_beams=4, repetition_penalty=1.7, num_return_sequences=4),
  dict(num_beams=4, min_new_tokens=9, num_return_sequences=4),
]


# Whatever of a search has nothing to do with the model: of one family.
CASES = [
  (family, how)
  for family in ALL
  for how in (BEAMS if family == "t5_1_1" else [*BEAMS[:3], BEAMS[5]])
]


@pytest.mark.parametrize("family,how", CASES, ids=str)
def test_beams_are_those_of_generate(family, how):
  model, config, params = random_model(family)
  x, _ = hf_models.tokens(rows=6)
  tokens, scores = found_by_theirs(model, x, do_sample=False, **how)
  asked = decoding.Search(decoding.Decoding(**how))
  # Scanned layers have a cache of another shape, for all searches the same.
  for is_scan in (False, True) if how == BEAMS[1] else (False,):
    layers = layer_stack.stack(params) if is_scan else params
    found = found_by_ours(config.replace(scan_layers=is_scan), layers, x, asked)
    np.testing.assert_array_equal(found.tokens, tokens)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-4, atol=1e-5)
  lengths = (tokens != 0).sum(axis=-1)
  if how.get("early_stopping") is True:
    assert len(np.unique(lengths)) > 1, "no row ends early"


def test_t5x_s_beams_are_those_of_its_equations():
  """A slow search over lists, from T5X's own description."""
  _, config, params = random_model("t5_1_1")
  x, _ = hf_models.tokens(rows=6)
  log_p = next_token(config, params)
  for size, alpha in itertools.product((1, 2, 4), (0.0, 0.6, 1.5)):
    if size == 1:
      continue
    asked = decoding.Decoding(
      num_beams=size,
      num_return_sequences=size,
      length_penalty=alpha,
      beam_rule="t5x",
    )
    found = found_by_ours(config, params, x, decoding.Search(asked))
    for row in range(len(x)):
      of_row = functools.partial(log_p, x[row])
      wanted = slow_t5x(of_row, size, alpha, config.eos_token_id)
      for way, (score, tokens) in enumerate(wanted):
        ours = found.tokens[row, way]
        np.testing.assert_array_equal(ours[: len(tokens)], tokens)
        assert not ours[len(tokens) :].any()
        np.testing.assert_allclose(
          found.scores[row, way], score, rtol=1e-4, atol=1e-5
        )


def next_token(config, params):
  """(inputs, answer so far) -> log-probabilities (V,), without a cache."""
  model = Transformer(config)

  @jax.jit
  def all_of(x, y):
    logits = model.apply({"params": params}, x, y)
    return jax.nn.log_softmax(logits)

  def of(x, prefix):
    y = np.zeros((1, LENGTH + 1), np.int32)
    y[0, 1 : 1 + len(prefix)] = prefix
    return np.asarray(all_of(x[None], y))[0, len(prefix)].astype(np.float64)

  return of


def slow_t5x(log_p, size, alpha, eos):
  """[(score, tokens)], the best first."""
  worth = lambda length: ((5 + length) / 6) ** alpha
  live, done = [(0.0, ())], []
  for length in range(1, LENGTH + 1):
    grown = [
      (score + p, (*tokens, token))
      for score, tokens in live
      for token, p in enumerate(log_p(tokens))
    ]
    grown = sorted(grown, reverse=True)[: 2 * size]
    done += [(s / worth(length), t) for s, t in grown if t[-1] == eos]
    done = sorted(done, reverse=True)[:size]
    live = [(s, t) for s, t in grown if t[-1] != eos][:size]
    if len(done) == size and done[-1][0] > live[0][0] / worth(LENGTH + 1):
      break
  return done or live


DRAWN = [
  dict(do_sample=True),
  dict(temperature=0.5),
  dict(temperature=2.0, top_k=5),
  dict(top_p=0.8),
  dict(temperature=1.5, top_k=20, top_p=0.6),
]


@pytest.mark.parametrize("how", DRAWN, ids=str)
def test_what_is_drawn_has_the_distribution_of_hugging_face(how):
  """The first two tokens, against their own warped probabilities."""
  model, config, params = random_model("t5_1_1")
  x = hf_models.tokens()[0][:2]
  count = 4000
  asked = decoding.Decoding(**how, num_return_sequences=count)
  found = found_by_ours(config, params, x, decoding.Search(asked))
  temperature = how.get("temperature") or 1.0
  warpers = [transformers_warper("Temperature", temperature)]
  if "top_k" in how:
    warpers.append(transformers_warper("TopK", how["top_k"]))
  if "top_p" in how:
    warpers.append(transformers_warper("TopP", how["top_p"]))
  log_p = next_token(config, params)
  for row in range(len(x)):
    tokens = found.tokens[row]
    first = warped(warpers, log_p(x[row], ()))
    assert_drawn_from(first, tokens[:, 0])
    most = int(first.argmax())
    if most != config.eos_token_id:
      second = warped(warpers, log_p(x[row], (most,)))
      assert_drawn_from(second, tokens[tokens[:, 0] == most, 1])
    # Scores are the model's own, whatever warps them.
    way = 3
    answer = tokens[way][: (tokens[way] != 0).sum()]
    score = sum(
      log_p(x[row], tuple(answer[:i]))[token] for i, token in enumerate(answer)
    )
    np.testing.assert_allclose(found.scores[row, way], score, rtol=1e-4)


def transformers_warper(name, value):
  import transformers

  return getattr(transformers, f"{name}LogitsWarper")(value)


def warped(warpers, log_p):
  scores = torch.tensor(log_p)[None]
  for warper in warpers:
    scores = warper(None, scores)
  return torch.softmax(scores, dim=-1)[0].numpy()


def assert_drawn_from(p, tokens):
  """Pearson's chi-square; rare tokens count together."""
  counts = np.bincount(tokens, minlength=len(p))
  assert not counts[p == 0].any(), "a token that may not be drawn"
  expected = p * len(tokens)
  order = np.argsort(-expected)
  common = order[expected[order] >= 5]
  seen = np.append(counts[common], len(tokens) - counts[common].sum())
  wanted = np.append(expected[common], len(tokens) - expected[common].sum())
  if wanted[-1] < 1e-6:
    seen, wanted = seen[:-1], wanted[:-1]
  if len(seen) > 1:
    wanted *= seen.sum() / wanted.sum()
    assert stats.chisquare(seen, wanted).pvalue > 1e-4


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("top_k", [None, 1, 7])
def test_what_may_be_drawn_is_what_hugging_face_keeps(top_k, top_p):
  logits = np.random.default_rng(0).normal(0, 4, (50, 1000)).astype(np.float32)
  expected = torch.tensor(logits)
  if top_k:
    expected = transformers_warper("TopK", top_k)(None, expected)
  expected = transformers_warper("TopP", top_p)(None, expected).numpy()
  ours = np.asarray(kept(jnp.asarray(logits), top_k, top_p))
  # A sum of floats may end a hair before or after the mass that is asked for:
  # then one token more or less is in, and it is the least likely.
  differ = np.isfinite(ours) != np.isfinite(expected)
  assert (differ.sum(axis=1) <= 1).all() and differ.sum() <= 5
  for row in np.nonzero(differ.any(axis=1))[0]:
    least = np.where(np.isfinite(expected[row]), logits[row], np.inf).min()
    assert logits[row][differ[row]].item() <= least


def test_a_quantile_at_the_very_end_is_a_token_that_can_be():
  p = np.zeros((3, 5), np.float32)
  p[:, 2] = 1.0
  p[1] = [0.1, 0.2, 0.3, 0.4, 0.0]
  p[2] = [0, 0.5, 0, 0.5, 0]
  last = np.nextafter(np.float32(1), np.float32(0))
  for u, wanted in ((0.0, [2, 0, 1]), (last, [2, 3, 3])):
    found = at_quantile(jnp.asarray(p), jnp.full((3,), u, jnp.float32))
    assert found.tolist() == wanted


HOWS = {
  "greedy": dict(),
  "beams": dict(num_beams=3, num_return_sequences=2),
  "t5x": dict(num_beams=3, beam_rule="t5x"),
  "sampling": dict(top_k=10, num_return_sequences=3),
}


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_rows_beside_it_and_padding_change_no_answer(how):
  _, config, params = random_model("t5_1_0")
  x, _ = hf_models.tokens(rows=6)
  numbers = np.arange(6, dtype=np.uint32) + 11
  asked = decoding.Search(decoding.Decoding(**how))
  whole = found_by_ours(config, params, x, asked, seeds_B=numbers)
  for row in range(6):
    for columns in (0, 23):
      wider = np.pad(x[[row]], ((0, 2), (0, columns)))
      wider[1:, :4] = 7
      seeds = np.array([numbers[row], 0, 1], np.uint32)
      alone = found_by_ours(config, params, wider, asked, seeds_B=seeds)
      np.testing.assert_array_equal(alone.tokens[0], whole.tokens[row])
      np.testing.assert_allclose(
        alone.scores[0], whole.scores[row], rtol=1e-4, atol=1e-5
      )


def test_another_seed_draws_something_else():
  _, config, params = random_model("t5_1_0")
  x, _ = hf_models.tokens(rows=3)
  draw = lambda seed: found_by_ours(
    config, params, x, decoding.Search(decoding.Decoding(top_k=9, seed=seed))
  ).tokens
  assert (draw(0) == draw(0)).all()
  assert (draw(0) != draw(1)).any()


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_answers_are_of_those_that_are_allowed(how):
  _, config, params = random_model("t5_1_1")
  x, _ = hf_models.tokens(rows=6)
  eos = config.eos_token_id
  texts = [(5, 6), (5, 6, 7), (5,), (9, 10, 11), (12,)]
  allowed = tuple((*text, eos) for text in texts)
  asked = decoding.Decoding(**how)
  found = found_by_ours(
    config, params, x, decoding.Search(asked, allowed=allowed)
  )
  log_p = next_token(config, params)
  worth = lambda text: sum(
    log_p(x[row], text[:i])[token] for i, token in enumerate(text)
  )
  for row in range(len(x)):
    for tokens, score in zip(found.tokens[row], found.scores[row]):
      if np.isfinite(score):
        assert tuple(int(t) for t in tokens if t) in allowed
  if asked.num_beams > 1:
    # As many beams as paths: the best by their own scores.
    wide = decoding.Decoding(
      num_beams=8, num_return_sequences=8, length_penalty=1.0
    )
    found = found_by_ours(
      config, params, x, decoding.Search(wide, allowed=allowed)
    )
    for row in range(len(x)):
      ranked = sorted(allowed, key=lambda t: -worth(t) / len(t))
      ours = [
        tuple(int(t) for t in tokens if t)
        for tokens, score in zip(found.tokens[row], found.scores[row])
        if np.isfinite(score)
      ]
      assert ours == ranked


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_a_prompt_begins_every_answer_and_costs_nothing(how):
  model, config, params = random_model("t5_1_1")
  x, _ = hf_models.tokens(rows=6)
  prompt = (17, 4, 30)
  asked = decoding.Decoding(**how)
  found = found_by_ours(
    config, params, x, decoding.Search(asked, prompt=prompt)
  )
  assert (found.tokens[:, :, :3] == prompt).all()
  if asked.draws or asked.beam_rule == "t5x":
    return
  theirs = model.generate(
    torch.tensor(x).long(),
    attention_mask=torch.tensor(x != 0).long(),
    decoder_input_ids=torch.tensor([[0, *prompt]] * 6),
    max_new_tokens=LENGTH - 3,
    do_sample=False,
    **how,
  ).numpy()[:, 1:]
  ends = np.pad(theirs[:, 3:] == config.eos_token_id, ((0, 0), (3, 0)))
  theirs[np.cumsum(ends, axis=1) - ends > 0] = 0
  ours = found.tokens.reshape(-1, LENGTH)
  np.testing.assert_array_equal(ours[:, : theirs.shape[1]], theirs)


def test_a_forced_first_token_is_that_of_hugging_face():
  model, config, params = random_model("mt5")
  x, _ = hf_models.tokens(rows=6)
  how = dict(num_beams=3, num_return_sequences=3)
  tokens, scores = found_by_theirs(
    model, x, do_sample=False, forced_bos_token_id=42, **how
  )
  asked = decoding.Search(decoding.Decoding(**how), first=42)
  found = found_by_ours(config, params, x, asked)
  np.testing.assert_array_equal(found.tokens, tokens)
  np.testing.assert_allclose(found.scores, scores, rtol=1e-4, atol=1e-5)


def test_no_answer_has_a_token_beyond_the_vocabulary():
  _, config, params = random_model("t5_1_1")
  x, _ = hf_models.tokens(rows=6)
  for how in HOWS.values():
    asked = decoding.Search(decoding.Decoding(**how), vocab_size=20)
    assert found_by_ours(config, params, x, asked).tokens.max() < 20


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ngrams_do_not_come_twice(size):
  """Against a search in lists, in random answers of few tokens."""
  rng = np.random.default_rng(size)
  tokens = rng.integers(0, 4, (40, 13)).astype(np.int32)
  constrain = constraints.no_repeated_ngrams(size)
  for index in range(13):
    found = constrain(jnp.zeros((40, 4)), jnp.asarray(tokens), index)
    for row, banned in zip(tokens, np.isneginf(np.asarray(found))):
      so_far = [int(t) for t in row[: index + 1]]
      seen = {
        tuple(so_far[i : i + size]) for i in range(len(so_far) - size + 1)
      }
      end = so_far[len(so_far) - size + 1 :]
      wanted = [
        len(end) == size - 1 and (*end, token) in seen for token in range(4)
      ]
      assert banned.tolist() == wanted
