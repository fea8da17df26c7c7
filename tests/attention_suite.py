"""The claims that every implementation of attention must meet.

The oracle is numpy in float64, written from the definition. An implementation
may err twice as much as the naive one of its own precision: dense, in jax,
differentiated by jax.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import (
  Alibi,
  AtPositions,
  DistanceVector,
  Fire,
  RelativeBuckets,
  flash_attention,
)

NAMES = ("o", "dq", "dk", "dv", "dposition")


@dataclasses.dataclass(frozen=True)
class Case:
  queries: int
  keys: int
  batch: int = 1
  heads: int = 2
  kv_heads: int | None = None
  dim: int = 64
  dtype: str = "bfloat16"
  causal: bool = False
  segments: str | None = None
  position: str | None = "buckets"
  buckets: tuple[int, int] = (32, 128)
  q_offset: int = 0
  traced_offset: bool = False
  scale: float = 1.0
  # T5 does not divide by sqrt(dim): its scores reach thousands. Their greatest
  # is about `scores`, around `level`.
  scores: float = 4.0
  level: float = 0.0
  # Buckets of the first head that are -inf: it does not see their pairs.
  hidden: tuple[int, ...] = ()
  # Where tokens stand: in their row, at random, or in their segment.
  places: str = "row"

  @property
  def bidirectional(self):
    return not self.causal


CASES = {
  "one query, one key": Case(1, 1),
  "one query, many keys": Case(1, 300, q_offset=299, causal=True),
  "odd, packed, scores to 10": Case(
    63, 100, batch=2, segments="packed", scores=10
  ),
  "more queries than keys": Case(100, 63, causal=True, dtype="float32"),
  "1000 padded, scores to 10,000": Case(
    1000, 1000, segments="padded", scores=10_000
  ),
  # Several blocks with an odd end, in every implementation's blocks.
  "703 causal, scores to 1,500": Case(
    703, 703, causal=True, heads=1, scores=1_500
  ),
  "other buckets, packed, float32 scores to 1,500": Case(
    200,
    333,
    buckets=(8, 20),
    segments="packed",
    dtype="float32",
    scores=1_500,
  ),
  "offset": Case(130, 333, q_offset=203, causal=True, segments="padded"),
  "traced offset": Case(130, 300, q_offset=77, traced_offset=True, causal=True),
  "negative offset": Case(200, 200, q_offset=-100),
  "grouped heads of 16": Case(130, 140, heads=4, kv_heads=2, dim=16),
  "three heads of 80": Case(140, 130, heads=3, dim=80, scale=0.5),
  "heads of 128": Case(130, 260, dim=128, causal=True, buckets=(64, 200)),
  "heads of 256": Case(260, 130, dim=256, segments="packed"),
  "no position": Case(200, 260, position=None, segments="padded"),
  "no position, causal": Case(260, 260, position=None, causal=True),
  "distance vector, scores about -5,000": Case(
    300, 200, position="vector", level=-5_000
  ),
  "alibi": Case(140, 260, heads=1, position="alibi"),
  "alibi, causal, offset": Case(
    *(140, 260),
    heads=1,
    position="alibi",
    causal=True,
    q_offset=90,
    segments="padded",
  ),
  "asymmetric alibi, traced offset": Case(
    *(140, 390),
    position="asymmetric",
    q_offset=200,
    traced_offset=True,
    scores=10,
  ),
  "fire, causal, offset, float32": Case(
    *(200, 300),
    position="fire",
    causal=True,
    q_offset=70,
    dtype="float32",
    scores=10,
  ),
  "fire, from the start of packed segments": Case(
    200, 300, position="fire", places="segments", segments="packed", batch=2
  ),
  "buckets at random places, padded": Case(
    300, 280, places="random", segments="padded", hidden=(3,), scores=1_500
  ),
  "asymmetric alibi at random places": Case(
    200, 300, position="asymmetric", places="random"
  ),
  "fully masked rows": Case(150, 270, batch=2, segments="masked"),
  # Far before, the diagonal and one near; the last rows see nothing else.
  "buckets of -inf": Case(400, 300, hidden=(0, 15, 20)),
  "far after of -inf, scores about -5,000": Case(
    150, 400, hidden=(31,), level=-5_000, segments="padded"
  ),
  "all buckets of -inf": Case(140, 130, causal=True, hidden=(*range(32),)),
}


# The sizes that T5's scores have, in tools/attention_error.py and on a chip.
T5_SCORES = {
  f"scores {name}": Case(500, 500, heads=4, segments="packed", **change)
  for name, change in {
    "to 10": dict(scores=10),
    "to 1,500": dict(scores=1_500),
    "to 10,000": dict(scores=10_000),
    "about -5,000": dict(level=-5_000),
  }.items()
}


def segment_ids(case, length, rng):
  ids = np.ones((case.batch, length), np.int32)
  if case.segments == "padded":
    ids[:, length - length // 3 :] = 0
  elif case.segments == "packed":
    cuts = np.sort(rng.integers(0, length + 1, (case.batch, 3)), axis=1)
    ids = 1 + (np.arange(length)[None, :, None] >= cuts[:, None]).sum(axis=-1)
    ids = np.where(ids == 4, 0, ids).astype(np.int32)
  elif case.segments == "masked":
    ids[0] = 0
    ids[1:, ::5] = 0
    ids[1:, 3::7] = length  # An id the other side does not have.
  return ids


@functools.lru_cache(maxsize=2)
def make_inputs(case: Case):
  """(arrays to differentiate, do, segment ids) as numpy, already rounded."""
  rng = np.random.default_rng(case.queries * 1000 + case.keys)

  def array(length, heads, size=1.0, first=None):
    x = rng.normal(size=(case.batch, length, heads, case.dim))
    # Products of size one, whatever the head dimension.
    x = x * (case.dim**-0.25) * size
    if first:
      x[..., 0] = first
    return np.array(jnp.asarray(x, case.dtype).astype(jnp.float32))

  kv_heads = case.kv_heads or case.heads
  # The greatest of that many normal numbers is about four deviations away.
  size, level = math.sqrt(case.scores / 4), math.sqrt(abs(case.level))
  q = array(case.queries, case.heads, size, math.copysign(level, case.level))
  k = array(case.keys, kv_heads, size, level)
  do, v = array(case.queries, case.heads), array(case.keys, kv_heads)
  shape = {
    None: (case.heads, 1),
    "buckets": (case.heads, case.buckets[0]),
    "vector": (case.heads, 2 * 50 + 1),
    "alibi": (case.heads,),
    "asymmetric": (case.heads,),
    "fire": ((2 + case.heads) * FIRE_WIDTH + case.heads + 2,),
  }[case.position]
  position = np.abs(rng.normal(size=shape)).astype(np.float32)
  if case.position == "alibi":
    position = Alibi.slopes(case.heads)
  if case.position == "asymmetric":
    # Far keys count.
    position = np.resize(np.float32([1 / 64, 1 / 128]), case.heads)
  if case.position == "fire":
    position = rng.normal(size=shape).astype(np.float32)
    # Some queries stand before the threshold.
    position[-2:] = 0.1, 60.5
  if case.hidden:
    position[0, list(case.hidden)] = -np.inf
  ids = None
  if case.segments:
    ids = (
      segment_ids(case, case.queries, rng),
      segment_ids(case, case.keys, rng),
    )
  return (q, k, v, position), do, ids


def distances(case):
  queries = np.arange(case.queries) + case.q_offset
  return np.arange(case.keys) - queries[:, None]


def token_positions(case):
  """Where queries (B or 1, Q) and keys (B or 1, K) stand, for the bias."""
  q, kv = np.arange(case.queries) + case.q_offset, np.arange(case.keys)
  if case.places == "random":
    rng = np.random.default_rng(case.keys)
    most = max(case.queries, case.keys)
    drawn = np.sort(rng.choice(2 * most, most, replace=False))
    q, kv = drawn[: case.queries], drawn[: case.keys]
  if case.places == "segments":
    # Ids rise along a row, but for padding at its end.
    within = lambda row: np.arange(len(row)) - np.argmax(
      row[None] == row[:, None], axis=1
    )
    return tuple(np.stack([*map(within, ids)]) for ids in make_inputs(case)[2])
  return q[None], kv[None]


def bucket_index(case):
  """(Q, K): which parameter of a head each pair reads."""
  q, kv = token_positions(case)
  d = kv[0] - q[0][:, None]
  if case.position == "vector":
    return np.clip(d, -50, 50) + 50
  num, furthest = case.buckets
  side = num // 2 if case.bidirectional else num
  behind = np.abs(d) if case.bidirectional else np.maximum(-d, 0)
  exact = side // 2
  # float32, as every T5 does it: the bucket of a power of two depends on it.
  ratio = np.log(
    np.maximum(behind, 1).astype(np.float32) / np.float32(exact)
  ) / np.float32(math.log(furthest / exact))
  far = exact + (ratio * np.float32(side - exact)).astype(int)
  bucket = np.where(behind < exact, behind, np.minimum(far, side - 1))
  return bucket + np.where(d > 0, side, 0) * case.bidirectional


def dense_bias(case, position):
  """float64 (B or 1, H, Q, K)."""
  q, kv = token_positions(case)
  if case.position is None:
    return np.zeros((1, case.heads, case.queries, case.keys))
  if case.position == "fire":
    return fire(position, case.heads, q, kv)[0]
  if case.position in ("alibi", "asymmetric"):
    d = (kv[0] - q[0][:, None]).astype(float)
    bias = -position[:, None, None] * np.abs(d)
    if case.position == "asymmetric":
      half = case.heads // 2
      bias[:half, d > 0] = bias[half:, d < 0] = -np.inf
    return bias[None]
  return position[:, bucket_index(case)].astype(np.float64)[None]


FIRE_WIDTH = 8


def fire_parts(x, heads):
  """The six arrays of FIRE that lie in one vector."""
  w = FIRE_WIDTH
  ends = np.cumsum([w, w, heads * w, heads, 1])
  hidden, hidden_bias, out, out_bias, c, threshold = (
    x[a:b] for a, b in zip([0, *ends], [*ends, len(x)])
  )
  out = out.reshape(heads, w)
  return hidden, hidden_bias, out, out_bias, c[0], threshold[0]


def fire(x, heads, q_BQ, kv_BK, ds_BHQK=None):
  """(FIRE's bias, the gradient in x where that of the bias is given)."""
  x = np.asarray(x, float)
  w, b, out, out_bias, c, threshold = fire_parts(x, heads)
  d = (q_BQ[:, :, None] - kv_BK[:, None]).astype(float)
  most = np.maximum(q_BQ, abs(threshold)).astype(float)
  a, n = np.log(abs(c * d) + 1), np.log(abs(c * most) + 1)[..., None] + 1e-6
  part = np.sign(d) * a / n
  hidden = part[..., None] * w + b
  active = hidden > 0
  relu = hidden * active
  bias = np.einsum("bqkw,hw->bhqk", relu, out) + out_bias[:, None, None]
  if ds_BHQK is None:
    return bias, None
  ds = np.asarray(ds_BHQK, float)
  if len(ds) > len(d):
    ds = ds.sum(axis=0, keepdims=True)
  dout = np.einsum("bhqk,bqkw->hw", ds, relu)
  dhidden = np.einsum("bhqk,hw->bqkw", ds, out) * active
  dpart = dhidden @ w
  da, dn = dpart * np.sign(d) / n, -(dpart * part / n).sum(axis=2)
  dmost = dn * abs(c) / (abs(c * most) + 1)
  dc = (da * abs(d) / (abs(c * d) + 1)).sum()
  dc += (dn * most / (abs(c * most) + 1)).sum()
  parts = (dhidden * part[..., None]).sum((0, 1, 2)), dhidden.sum((0, 1, 2))
  parts += dout.ravel(), ds.sum((0, 2, 3)), np.sign([c]) * dc
  dthreshold = dmost[abs(threshold) > q_BQ].sum()
  return bias, np.concatenate([*parts, np.sign([threshold]) * dthreshold])


def position_gradient(case, position, ds_BHQK):
  """The transpose of `dense_bias`, in float64."""
  q, kv = token_positions(case)
  if case.position is None:
    return np.zeros(position.shape)
  if case.position == "fire":
    return fire(position, case.heads, q, kv, ds_BHQK)[1]
  ds_HQK = np.asarray(ds_BHQK, float).sum(axis=0)
  if case.position in ("alibi", "asymmetric"):
    return -(ds_HQK * np.abs(kv[0] - q[0][:, None])).sum((1, 2))
  index = bucket_index(case).ravel()
  return np.stack(
    [np.bincount(index, x.ravel(), position.shape[1]) for x in ds_HQK]
  )


def visible(case: Case):
  """Boolean (B, H, Q, K): the pairs of softmax; a bias of -inf is none."""
  (*_, position), _, ids = make_inputs(case)
  seen = dense_bias(case, position) > -np.inf
  if case.causal:
    seen = seen & (distances(case) <= 0)
  if ids:
    q_ids, kv_ids = ids[0][:, None, :, None], ids[1][:, None, None, :]
    seen = seen & (q_ids == kv_ids) & (kv_ids != 0)
  shape = case.batch, case.heads, case.queries, case.keys
  return np.broadcast_to(seen, shape)


@functools.lru_cache(maxsize=2)
def oracle(case: Case):
  """([o, dq, dk, dv, dposition] in float64, the greatest score)."""
  (q, k, v, position), do, _ = make_inputs(case)
  q, k, v, do = (x.astype(np.float64) for x in (q, k, v, do))
  groups = q.shape[2] // k.shape[2]
  k, v = (np.repeat(x, groups, axis=2) for x in (k, v))
  s = case.scale * np.einsum("bqhd,bkhd->bhqk", q, k, optimize=True)
  s = s + dense_bias(case, position)
  mask = visible(case)
  s = np.where(mask, s, -np.inf)
  top = s.max(axis=-1, keepdims=True)
  e = np.exp(s - np.where(np.isfinite(top), top, 0))
  total = e.sum(axis=-1, keepdims=True)
  p = e / np.where(total == 0, 1, total)
  o = np.einsum("bhqk,bkhd->bqhd", p, v, optimize=True)
  dp = np.einsum("bqhd,bkhd->bhqk", do, v, optimize=True)
  ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True))
  dq = case.scale * np.einsum("bhqk,bkhd->bqhd", ds, k, optimize=True)
  dk = case.scale * np.einsum("bhqk,bqhd->bkhd", ds, q, optimize=True)
  dv = np.einsum("bhqk,bqhd->bkhd", p, do, optimize=True)
  fold = lambda x: x.reshape(*x.shape[:2], -1, groups, x.shape[3]).sum(axis=3)
  dposition = position_gradient(case, position, ds)
  return [o, dq, fold(dk), fold(dv), dposition], np.abs(s[mask]).max(initial=0)


def position_object(case, parameters):
  position = _in_the_row(case, parameters)
  if case.places == "row":
    return position
  return AtPositions(position, *map(jnp.asarray, token_positions(case)))


def _in_the_row(case, parameters):
  if case.position == "alibi":
    return Alibi(jnp.stack([parameters, parameters], axis=1))
  if case.position == "asymmetric":
    first = np.arange(case.heads) < case.heads // 2
    sides = [jnp.where(x, parameters, jnp.inf) for x in (first, ~first)]
    return Alibi(jnp.stack(sides, axis=1))
  if case.position == "fire":
    return Fire(*fire_parts(parameters, case.heads))
  if case.position == "vector":
    return DistanceVector(parameters)
  if case.position == "buckets":
    return RelativeBuckets(
      parameters,
      bidirectional=case.bidirectional,
      max_distance=case.buckets[1],
    )
  return None


def supported(implementation: str, case: Case) -> Case | None:
  """The case as this implementation takes it, or None."""
  if implementation == "mosaic_gpu":
    case = dataclasses.replace(case, dtype="bfloat16")
  dense = implementation in ("reference", "chunked")
  if not dense and (case.position == "fire" or case.places != "row"):
    return None
  if implementation == "mosaic_gpu" and case.dim > 128:
    return None
  return case


def kernel_attention(case, implementation):
  def attention(q, k, v, position, q_ids, kv_ids, q_offset):
    return flash_attention(
      q,
      k,
      v,
      position=position_object(case, position),
      causal=case.causal,
      q_segment_ids=q_ids,
      kv_segment_ids=kv_ids,
      scale=case.scale,
      q_offset=q_offset,
      implementation=implementation,
    )

  return attention


def naive_attention(case):
  """Dense, each product in the precision of its inputs; takes a whole bias."""

  def attention(q, k, v, bias_BHQK, q_ids, kv_ids, q_offset):
    del q_offset
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    # By itself, a chip multiplies float32 with fewer bits.
    product = functools.partial(
      jnp.einsum,
      precision="highest" if q.dtype == jnp.float32 else None,
      preferred_element_type=jnp.float32,
    )
    s = product("bqhd,bkhd->bhqk", q, k)
    mask = bias_BHQK > -jnp.inf
    s = s * case.scale + jnp.where(mask, bias_BHQK, 0)
    if case.causal:
      mask &= jnp.asarray(distances(case) <= 0)
    if q_ids is not None:
      same = q_ids[:, None, :, None] == kv_ids[:, None, None, :]
      mask &= same & (kv_ids[:, None, None, :] != 0)
    p = jnp.where(mask, jax.nn.softmax(s, axis=-1, where=mask), 0)
    p = p.astype(q.dtype)
    return product("bhqk,bkhd->bqhd", p, v).astype(q.dtype)

  return attention


@functools.lru_cache(maxsize=2)
def naive(case: Case):
  position = make_inputs(case)[0][3]
  bias = dense_bias(case, position).astype(np.float32)
  *found, ds_BHQK = gradients(naive_attention(case), case, position=bias)
  return [*found, position_gradient(case, position, ds_BHQK)]


def gradients(attention, case, *, poison=False, position=None):
  """[o, dq, dk, dv, dposition] of an attention function, as float64."""
  arrays, do, ids = make_inputs(case)
  position = jnp.asarray(arrays[3] if position is None else position)
  low = [jnp.asarray(x, case.dtype) for x in (*arrays[:3], do)]
  if poison:
    # Nobody may read what lies in padding.
    for n, side in enumerate((0, 1, 1, 0)):
      padding = (ids[side] == 0)[:, :, None, None]
      low[n] = jnp.where(padding, jnp.nan, low[n])

  def objective(q, k, v, position, do, ids, q_offset):
    q_ids, kv_ids = ids or (None, None)
    o = attention(q, k, v, position, q_ids, kv_ids, q_offset)
    if q_ids is None:
      product = o * do
    else:
      product = jnp.where((q_ids != 0)[:, :, None, None], o * do, 0)
    return product.astype(jnp.float32).sum(), o

  grad = jax.grad(objective, argnums=(0, 1, 2, 3), has_aux=True)
  *qkv, do = low
  if case.traced_offset:
    found, o = jax.jit(grad)(*qkv, position, do, ids, case.q_offset)
  else:
    fixed = lambda *x: grad(*x, case.q_offset)
    found, o = jax.jit(fixed)(*qkv, position, do, ids)
  return [np.asarray(x, np.float64) for x in (o, *found)]


class Error(NamedTuple):
  """Norms of one result: its error, naive attention's, rounding's, its own."""

  error: float
  naive: float
  rounding: float
  size: float

  @property
  def ratio(self) -> float:
    return self.error / max(self.naive, self.rounding, 1e-30)


def errors(found, case: Case) -> dict[str, Error]:
  """By name, of what `gradients` gave."""
  expected, top_score = oracle(case)
  # What rounding alone may do: a result to its dtype, a score to float32.
  unit = _unit(case, top_score)
  rows = {}
  for name, f, n, e in zip(NAMES, found, naive(case), expected):
    # A gradient can vanish (a single visible key); inputs are of size one.
    size = float(np.linalg.norm(e))
    floor = unit * max(size, 1e-2 * math.sqrt(e.size))
    norm = lambda x, e=e: float(np.linalg.norm(x - e))
    rows[name] = Error(norm(f), norm(n), floor, size)
  return rows


def _unit(case, top_score):
  unit = float(jnp.finfo(case.dtype).eps) / 2
  return unit + float(jnp.finfo(jnp.float32).eps) / 2 * top_score * math.log2(
    math.e
  )


def run(implementation: str, case: Case):
  """What `check_results` judges: [o, dq, dk, dv, dposition]."""
  attention = kernel_attention(case, implementation)
  return gradients(attention, case, poison=case.segments is not None)


def check(implementation: str, case: Case):
  check_results(run(implementation, case), case)


def check_results(found, case: Case):
  """Within twice the naive error, nowhere NaN, zero where all is masked."""
  _, do, _ = make_inputs(case)
  unit = _unit(case, oracle(case)[1])
  for (name, row), f in zip(errors(found, case).items(), found):
    assert np.isfinite(f).all(), f"{name} is not finite"
    assert row.ratio <= 2, (
      f"{name}: error {row.error:.2e} of {row.size:.2e}, "
      f"naive {row.naive:.2e}, rounding {row.rounding:.2e}"
    )
  o, dq, dk, dv, dposition = found
  if case.position == "buckets":
    # Each row of dS sums to zero, up to the rounding of its o . do.
    row = np.linalg.norm(o, axis=3) * np.linalg.norm(do, axis=3)
    sums = np.abs(dposition.sum(axis=1))
    assert (sums <= 4 * unit * np.linalg.norm(row) + 1e-6).all(), sums
  seen = visible(case)
  blind_BQH = ~seen.any(axis=3).swapaxes(1, 2)
  assert not o[blind_BQH].any() and not dq[blind_BQH].any()
  # Queries of a group of heads share their keys.
  unseen = ~seen.any(axis=2).reshape(case.batch, dk.shape[2], -1, case.keys)
  unseen_BKH = unseen.all(axis=2).swapaxes(1, 2)
  assert not dk[unseen_BKH].any() and not dv[unseen_BKH].any()
  if case.hidden:
    assert not dposition[0, list(case.hidden)].any()
