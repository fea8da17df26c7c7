"""The tiles that a kernel visits, in a list made before it starts.

A grid over all tiles would spend a step on each that no segment makes visible:
on 62 of 64 of a row of 32k tokens packed from documents of 512. Here a step of
the grid is an entry of a list in scalar memory, and what is not in the list is
neither computed nor fetched.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_attention.blocked import Plan

# Sorts of a visit. A row of tiles of which none is visible has an empty one,
# since its result must be written.
_EMPTY, _MASKED, _WHOLE = range(3)
_SORT_BITS = 2
_END = np.iinfo(np.int32).max


class Place(NamedTuple):
  """A tile: batch row, the block that stays, the block that moves."""

  b: jax.Array
  outer: jax.Array
  inner: jax.Array


@dataclasses.dataclass(frozen=True)
class Numbering:
  """How an entry holds a Place and its sort: b, outer, inner, sort."""

  outer_bits: int
  inner_bits: int

  def pack(self, place: Place, sort):
    row = (place.b << self.outer_bits) | place.outer
    return (((row << self.inner_bits) | place.inner) << _SORT_BITS) | sort

  def unpack(self, entry) -> Place:
    row = self.row(entry)
    inner = (entry >> _SORT_BITS) & ((1 << self.inner_bits) - 1)
    outer = row & ((1 << self.outer_bits) - 1)
    return Place(row >> self.outer_bits, outer, inner)

  def row(self, entry):
    """Of a place, all but the block that moves, as one number."""
    return entry >> (self.inner_bits + _SORT_BITS)

  def batch(self, entry):
    return self.row(entry) >> self.outer_bits


class Visits(NamedTuple):
  """The entries in their order, with one of no place before and after.

  Attributes:
    entries_N: int32.
    count: how many are visited; traced where ids or an offset decide.
    numbering: of the entries.
  """

  entries_N: jax.Array
  count: int | jax.Array
  numbering: Numbering


def make_visits(
  plan: Plan, segments, shift, batch: int, nq: int, nk: int, *, keys_stay: bool
) -> Visits:
  """The tiles that may hold a visible pair; at least one a row of tiles.

  Args:
    plan: the geometry.
    segments: blocked.Segments, or None.
    shift: of the queries' positions, in units of the plan.
    batch: rows of the batch.
    nq: query blocks.
    nk: key blocks.
    keys_stay: whether query blocks move past a key block, or the reverse.
  """
  outers, inners = (nk, nq) if keys_stay else (nq, nk)
  numbering = Numbering((outers - 1).bit_length(), (inners - 1).bit_length())
  place = Place(*jnp.ogrid[:batch, :outers, :inners])
  sort = jnp.full((batch, outers, inners), _WHOLE)
  if plan.masked:
    sort = _sort_by_ids(segments)
    sort = sort.swapaxes(1, 2) if keys_stay else sort
  if plan.causal:
    i, j = place[2:0:-1] if keys_stay else place[1:]
    sort = jnp.where(plan.step(i, j, shift) <= plan.last, sort, _EMPTY)
  entries, count = numbering.pack(place, sort), sort.size
  if plan.masked or plan.causal:
    seen = sort != _EMPTY
    kept = seen | ~seen.any(axis=2, keepdims=True) & (place.inner == 0)
    entries = jnp.sort(jnp.where(kept, entries, _END), axis=None)
    count = kept.sum(dtype=jnp.int32)
  entries = entries.astype(jnp.int32).ravel()
  entries_N = jnp.pad(entries, 1, constant_values=(-1, _END))
  return Visits(entries_N, count, numbering)


def _sort_by_ids(segments):
  """(B, nq, nk): what ids alone say of each tile."""
  q, kv = segments.q_range_BI3[:, :, None], segments.kv_range_BJ3[:, None]
  some = (q[..., 0] <= kv[..., 1]) & (kv[..., 0] <= q[..., 1])
  whole = q[..., 2] == kv[..., 2]
  return jnp.where(some, jnp.where(whole, _WHOLE, _MASKED), _EMPTY)


@dataclasses.dataclass(frozen=True)
class Visit:
  """A kernel's view of its n-th visit: `before` and `after` are neighbours."""

  place: Place
  sort: jax.Array
  first_of_row: jax.Array
  last_of_row: jax.Array
  first_of_batch: jax.Array
  last_of_batch: jax.Array
  last: jax.Array


def read_visit(entries, n, numbering: Numbering) -> Visit:
  before, entry, after = (entries[n + k] for k in range(3))
  changed = lambda part, other: part(entry) != part(other)
  return Visit(
    numbering.unpack(entry),
    entry & ((1 << _SORT_BITS) - 1),
    changed(numbering.row, before),
    changed(numbering.row, after),
    changed(numbering.batch, before),
    changed(numbering.batch, after),
    after == _END,
  )


@dataclasses.dataclass(frozen=True)
class Tile:
  """What a visit has to do: static but for where the tile is.

  Attributes:
    has_tile: whether a tile of the bias is added.
    has_constant: whether a number is.
    masked: whether some of its pairs are invisible by their ids.
    step: of the Plan.
    offset: of the Plan.
    near: whether the step is a near one.
  """

  has_tile: bool
  has_constant: bool
  masked: bool
  step: jax.Array
  offset: jax.Array
  near: jax.Array


def run_visit(visit: Visit, i, j, offset, plan: Plan, body) -> None:
  """Runs body(Tile) as tile (i, j) needs it; an empty visit runs none."""
  step = plan.step(i, j, offset[0])
  near = (step >= plan.first) & (step <= plan.last)
  if not plan.biased:
    cases = [(True, False, False)]
  elif plan.tails:
    # Far tiles have a tile of their own too, one a side.
    cases = [(True, True, True)]
  else:
    cases = [(near, True, False), (jnp.logical_not(near), False, True)]
  masks = [(True, False)]
  if plan.masked:
    masks = [(visit.sort == _WHOLE, False), (visit.sort == _MASKED, True)]
  elif plan.causal:
    masks = [(visit.sort == _WHOLE, False)]
  for (sort, *has), (visible, masked) in itertools.product(cases, masks):
    tile = Tile(*has, masked, step, step * plan.unit - offset[1], near)
    if sort is True and visible is True:
      body(tile)
    else:
      pl.when(jnp.logical_and(sort, visible))(functools.partial(body, tile))
