"""Where parameters, optimizer state and batches lie on a mesh of devices.

The logical axes of a parameter, and over which mesh axes they are split, are in
rules.py. A mesh has four:

  data      rows; parameters are whole on every device
  fsdp      rows, and the `embed` axis of parameters and optimizer (ZeRO-3)
  model     heads, feed-forward width, vocabulary (tensor parallel)
  sequence  the length of rows (context parallel), for long documents
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from fat5_jax import trees
from fat5_jax.distributed.rules import (
  logical_axes,
  standard_logical_axis_rules,
)
from fat5_jax.errors import UserError, nearest
from fat5_jax.models import partitioning
from fat5_jax.models.config import T5Config

# Outer to inner: neighbours on the inner axes are near on the wire, and tensor
# parallelism talks the most.
MESH_AXES = ("data", "fsdp", "sequence", "model")


@dataclasses.dataclass(frozen=True)
class Partitioner:
  """The mesh of a run and the rules by which arrays are split over it.

  Attributes:
    mesh: sizes by axis, {"fsdp": 8, "model": 4}: within a slice where there
      are several. An axis that is not named is 1, but `data`, which takes the
      devices that are left; so does one of size -1.
    dcn_mesh: sizes by axis between slices, which a slower network joins;
      `data` takes what is left here too. None is one slice.
    num_partitions: T5X's name for the size of `model`.
    model_parallel_submesh: T5X's (x, y, z, cores) of a TPU torus that one
      model's shards take; its product is the size of `model`.
    logical_axis_rules: see standard_logical_axis_rules.
    devices: None is all there are.
  """

  mesh: Mapping[str, int] | None = None
  dcn_mesh: Mapping[str, int] | None = None
  num_partitions: int | None = None
  model_parallel_submesh: Sequence[int] | None = None
  logical_axis_rules: Sequence[tuple[str, Any]] = dataclasses.field(
    default_factory=standard_logical_axis_rules
  )
  devices: Sequence[Any] | None = None

  def __post_init__(self):
    for field in ("mesh", "dcn_mesh"):
      for axis, size in (getattr(self, field) or {}).items():
        if axis not in MESH_AXES:
          raise UserError(
            f"{field.upper()} names {axis!r}.{nearest(axis, MESH_AXES)} A mesh"
            f" has {', '.join(MESH_AXES)}"
          )
        if not isinstance(size, int) or (size < 1 and size != -1):
          raise UserError(
            f"{field.upper()}[{axis!r}] = {size!r} must be a positive number of"
            " devices, or -1 for those left over"
          )
    for name, axes in self.logical_axis_rules:
      for axis in (axes,) if isinstance(axes, str) else axes or ():
        if axis not in MESH_AXES:
          raise UserError(
            f"LOGICAL_AXIS_RULES split {name!r} over {axis!r}; a mesh has"
            f" {', '.join(MESH_AXES)}"
          )
      if name == "vocab" and not isinstance(axes, str | None):
        raise UserError("LOGICAL_AXIS_RULES may split 'vocab' over one axis")

  # ---- The mesh ----

  def _sizes(self) -> tuple[list[int], list[int]]:
    """(sizes within a slice, between slices), in the order of MESH_AXES."""
    devices = self._devices
    wanted = dict(self.mesh or {})
    for field, size in (
      ("NUM_PARTITIONS", self.num_partitions),
      (
        "MODEL_PARALLEL_SUBMESH",
        self.model_parallel_submesh and math.prod(self.model_parallel_submesh),
      ),
    ):
      if size is not None and wanted.setdefault("model", size) != size:
        raise UserError(
          f"{field} asks for {size} shards of a model, and the mesh for"
          f" {wanted['model']}: set one of them"
        )
    slices = len({_slice_of(d) for d in devices})
    if self.dcn_mesh and slices == 1:
      # Devices that tell no slice: a host is one.
      slices = len({d.process_index for d in devices})
    between = _complete(self.dcn_mesh or {}, slices, "DCN_MESH", "slices")
    within = _complete(wanted, len(devices) // slices, "MESH", "devices")
    return within, between

  @functools.cached_property
  def _devices(self) -> list[Any]:
    return list(jax.devices() if self.devices is None else self.devices)

  @functools.cached_property
  def device_mesh(self) -> jax.sharding.Mesh:
    """The mesh; neighbours on its inner axes are near on the wire.

    Raises:
      UserError: if its sizes do not make the number of devices.
    """
    within, between = self._sizes()
    devices = self._devices
    if math.prod(between) > 1:
      array = mesh_utils.create_hybrid_device_mesh(
        within,
        between,
        devices,
        process_is_granule=len({_slice_of(d) for d in devices}) == 1,
        allow_split_physical_axes=True,
      )
    elif self.model_parallel_submesh is not None:
      array = _tiled_by_submesh(devices, self.model_parallel_submesh)
      array = array.reshape(within)
    else:
      array = mesh_utils.create_device_mesh(
        within, devices, allow_split_physical_axes=True
      )
    return jax.sharding.Mesh(
      array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )

  @functools.cached_property
  def sizes(self) -> dict[str, int]:
    """{axis: size}, slices included; found without making the mesh."""
    return {
      axis: a * b for axis, a, b in zip(MESH_AXES, *self._sizes(), strict=True)
    }

  def describe(self) -> str:
    """ "fsdp 8 x model 4", or "1 device"."""
    parts = [f"{axis} {n}" for axis, n in self.sizes.items() if n > 1]
    return " x ".join(parts) or "1 device"

  def axes_of(self, logical: str) -> tuple[str, ...]:
    """The mesh axes of more than one device that split a logical axis."""
    for name, axes in self.logical_axis_rules:
      if name == logical:
        axes = (axes,) if isinstance(axes, str) else axes or ()
        return tuple(a for a in axes if self.sizes[a] > 1)
    return ()

  def ways(self, logical: str) -> int:
    """Into how many parts a logical axis is split."""
    return math.prod(self.sizes[axis] for axis in self.axes_of(logical))

  # ---- Shardings ----

  def _named(self, *spec) -> NamedSharding:
    return NamedSharding(self.device_mesh, P(*spec))

  @property
  def replicated(self) -> NamedSharding:
    return self._named()

  def batch_sharding(self) -> NamedSharding:
    return self._named(self.axes_of("batch"))

  def parameter_sharding(
    self, name: str, shape: Sequence[int]
  ) -> NamedSharding:
    """Where a parameter lies; a scanned one has its layers in front."""
    names = logical_axes(name)
    if names is None:
      return self.replicated
    names = ("layers",) * (len(shape) - len(names)) + names
    axes = partitioning.mesh_axes(
      self.device_mesh, self.logical_axis_rules, names, shape
    )
    return self._named(*axes)

  def shardings(self, tree: Any, params: Any = None) -> Any:
    """Shardings of a tree of parameters, or of what an optimizer keeps.

    A leaf of an optimizer's state (`params` given) that has the shape of the
    parameter at the end of its path lies as that does. The rest, a counter,
    Adafactor's rows and columns, is small, and on every device.
    """
    shapes = {
      trees.path_keys(path): leaf.shape
      for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def of(path, leaf):
      keys = trees.path_keys(path)
      if params is None:
        return self.parameter_sharding("/".join(keys), leaf.shape)
      for start in range(len(keys)):
        if shapes.get(keys[start:]) == leaf.shape:
          name = "/".join(keys[start:])
          return self.parameter_sharding(name, leaf.shape)
      return self.replicated

    return jax.tree_util.tree_map_with_path(of, tree)

  def place(self, abstract: Any, params: Any = None) -> Any:
    """The same shapes, with their shardings."""
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      abstract,
      self.shardings(abstract, params),
    )

  # ---- Running ----

  def jit(self, function: Callable[..., Any], **options: Any):
    """jax.jit that traces and runs on this mesh; `lower` too."""
    compiled = jax.jit(function, **options)

    @functools.wraps(function)
    def call(*args):
      with partitioning.using(self.device_mesh, self.logical_axis_rules):
        return compiled(*args)

    def lower(*args):
      with partitioning.using(self.device_mesh, self.logical_axis_rules):
        return compiled.lower(*args)

    call.lower = lower
    return call

  def rows(self, batch_size: int) -> tuple[int, int]:
    """[first, end) of the rows of a batch that this process's devices hold.

    Hosts among which a model or a row is split hold the same rows.
    """
    indices = self.batch_sharding().addressable_devices_indices_map(
      (batch_size,)
    )
    ranges = [index[0].indices(batch_size)[:2] for index in indices.values()]
    return min(a for a, _ in ranges), max(b for _, b in ranges)

  def row_groups(self, batch_size: int) -> int:
    """How many different sets of rows the processes hold."""
    first, end = self.rows(batch_size)
    return max(1, batch_size // (end - first))

  def to_devices(
    self, batch: Mapping[str, np.ndarray], first_row: int, batch_size: int
  ) -> dict[str, jax.Array]:
    """A batch of global arrays, from the rows that this process needs.

    Args:
      batch: arrays of rows `first_row` and following.
      first_row: see `rows`; 0 where the batch is whole.
      batch_size: rows over all processes.
    """
    sharding = self.batch_sharding()

    def put(x: np.ndarray) -> jax.Array:
      shape = (batch_size, *x.shape[1:])

      def part(index):
        start, stop, _ = index[0].indices(batch_size)
        return x[start - first_row : stop - first_row]

      return jax.make_array_from_callback(shape, sharding, part)

    return {key: put(np.asarray(x)) for key, x in batch.items()}

  def round_up(self, rows: int) -> int:
    """The next number of rows that divides over the devices."""
    ways = self.ways("batch")
    return -(-rows // ways) * ways

  # ---- What must divide ----

  def check(
    self,
    config: T5Config,
    batch_size: int | None = None,
    lengths: Mapping[str, int] | None = None,
    num_microbatches: int | None = None,
  ) -> None:
    """Raises UserError, with what to change, if the run cannot be split so."""
    for logical, field, size in (
      ("heads", "num_heads", config.num_heads),
      ("joined_kv", "num_heads", config.num_heads),
      ("mlp", "mlp_dim", config.mlp_dim),
      ("vocab", "vocab_size", config.vocab_size),
      ("embed", "emb_dim", config.emb_dim),
    ):
      ways = self.ways(logical)
      if size % ways:
        raise UserError(
          f"{field} = {size} does not divide over the {ways} devices of mesh"
          f" axis {' x '.join(self.axes_of(logical))} ({self.describe()})."
          f" Choose a size that divides {size}, or keep {logical!r} whole:"
          f" LOGICAL_AXIS_RULES = (({logical!r}, None),)"
        )
    if batch_size is not None:
      ways, parts = self.ways("batch"), num_microbatches or 1
      if batch_size % (ways * parts):
        axes = " x ".join(self.axes_of("batch"))
        split = f"{ways} device" + "s" * (ways > 1)
        if axes:
          split += f" of mesh axis {axes}"
        if parts > 1:
          split += f", {parts} microbatches each"
        raise UserError(
          f"BATCH_SIZE = {batch_size} does not divide over {split}"
          f" ({self.describe()}). The nearest that does:"
          f" {-(-batch_size // (ways * parts)) * ways * parts}"
        )
    ways = self.ways("length")
    for name, length in (lengths or {}).items():
      # A head's targets are labels, which are not split.
      is_text = name == "inputs" or config.is_language_model
      if is_text and length % ways:
        raise UserError(
          f"TASK_FEATURE_LENGTHS[{name!r}] = {length} does not divide over the"
          f" {ways} devices of mesh axis {' x '.join(self.axes_of('length'))}."
          f" The nearest that does: {-(-length // ways) * ways}"
        )


def put_parts(
  target: jax.ShapeDtypeStruct, read: Callable[[Any], np.ndarray]
) -> jax.Array:
  """An array of which a host reads the parts that its own devices hold.

  Args:
    target: shape, type and sharding.
    read: gives the part that an index picks; asked once for a part, however
      many devices hold it, and once for all where they hold all of it.
  """
  shape, sharding = target.shape, target.sharding
  indices = sharding.addressable_devices_indices_map(shape).values()
  held = len(set(map(str, indices))) * math.prod(sharding.shard_shape(shape))
  cast = lambda x: np.asarray(x).astype(target.dtype, copy=False)
  parts: dict[str, np.ndarray] = {}
  if held == math.prod(shape):
    # A file's chunk is read whole for any part of it.
    get = cast(read(...)).__getitem__
  else:
    get = lambda index: cast(read(index))

  def part(index):
    key = str(index)
    if key not in parts:
      parts[key] = get(index)
    return parts[key]

  return jax.make_array_from_callback(shape, sharding, part)


def _slice_of(device) -> int:
  return getattr(device, "slice_index", 0) or 0


def _complete(
  wanted: Mapping[str, int], count: int, name: str, what: str
) -> list[int]:
  """Sizes of all axes whose product is `count`."""
  sizes = {axis: wanted.get(axis, 1) for axis in MESH_AXES}
  if "data" not in wanted and -1 not in sizes.values():
    sizes["data"] = -1
  open_axes = [axis for axis, size in sizes.items() if size == -1]
  if len(open_axes) > 1:
    raise UserError(
      f"{name} leaves {' and '.join(open_axes)} open; only one may be -1"
    )
  known = math.prod(size for size in sizes.values() if size != -1)
  fits = count % known == 0 if open_axes else known == count
  if not fits:
    asked = " x ".join(f"{a} {n}" for a, n in sizes.items() if n not in (1, -1))
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    raise UserError(
      f"{name}: {asked or 'data 1'} makes {known}, and the number of {what} is"
      f" {count}: sizes must multiply to"
      f" {'one of ' + ', '.join(map(str, divisors)) if open_axes else count}"
    )
  return [count // known if sizes[a] == -1 else sizes[a] for a in MESH_AXES]


def _tiled_by_submesh(
  devices: Sequence[Any], submesh: Sequence[int]
) -> np.ndarray:
  """Devices as (tiles, those of a tile) of a TPU torus, as T5X tiles it.

  Raises:
    UserError: if the devices are no torus, or the submesh does not tile it.
  """
  if not hasattr(devices[0], "coords"):
    raise UserError(
      "MODEL_PARALLEL_SUBMESH is for TPUs, whose chips have coordinates; use"
      " NUM_PARTITIONS"
    )
  place = lambda d: (*d.coords, getattr(d, "core_on_chip", 0))
  lowest = np.min([place(d) for d in devices], axis=0)
  extent = np.max([place(d) for d in devices], axis=0) - lowest + 1
  if len(submesh) != 4 or any(n % s for n, s in zip(extent, submesh)):
    raise UserError(
      f"MODEL_PARALLEL_SUBMESH = {tuple(submesh)} does not tile the torus"
      f" (x, y, z, cores) = {tuple(int(n) for n in extent)}"
    )
  tile = lambda d: tuple((np.array(place(d)) - lowest) // submesh)
  inside = lambda d: tuple((np.array(place(d)) - lowest) % submesh)
  ordered = sorted(devices, key=lambda d: (tile(d), inside(d)))
  array = np.empty(len(devices), object)
  array[:] = ordered
  return array.reshape(-1, math.prod(submesh))
