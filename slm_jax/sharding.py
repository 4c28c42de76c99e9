"""Sharding: one table from the model's logical axes to mesh axes, applied to the arguments of the jitted step.

No model or loss code mentions devices; the compiler propagates what the arguments say, and what `devices` says of the
residual stream between layers. Change `RULES` (or pass another table) and the same step runs data-parallel, fully
sharded, tensor-parallel, or with sequences cut along time as well.

The default for small models is data parallelism: every device has all parameters, each its share of the optimiser's
state (ZeRO, arXiv 1910.02054), and gradients are added up once an update (`losses.gradient`, groups).
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slm_jax.config import ConfigError, require
from slm_jax.model.fused import Devices

AXES = ('slice', 'data', 'fsdp', 'tensor')
REPLICAS = ('slice', 'data')  # along these, devices have the same parameters
Rules = Mapping[str, str | tuple[str, ...] | None]

# logical axis -> mesh axis (or axes); what is not named here is replicated
RULES: Rules = {
  'batch': ('slice', 'data', 'fsdp'),
  'time': None,  # of the residual stream between layers; 'tensor': sequence parallelism (arXiv 2205.05198)
  'embed': 'fsdp',
  'vocab': 'tensor',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
}


def make_mesh(data: int = 0, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A `slice x data x fsdp x tensor` mesh over all devices, those of a host side by side.

  data: copies of the parameters, of all slices together; 0 takes what is left. `slice` is as long as there are TPU
  slices, which only the slower data-centre network joins: what crosses is one reduction of gradients an update.
  """
  if devices is None:
    devices = jax.devices()
  if not isinstance(devices, range):  # numbers stand for devices where only the shape matters
    devices = sorted(devices, key=lambda device: (_slice(device), device.process_index, device.id))
  rest, n = fsdp * tensor, len(devices)
  if data == 0:
    require(n % rest == 0, f'run.fsdp={fsdp}, run.tensor={tensor}: {rest} does not divide the {n} devices')
    data = n // rest
  require(data * rest == n, f'run: data x fsdp x tensor = {data} x {fsdp} x {tensor} is not the {n} devices')
  slices = len(set(map(_slice, devices)))
  require(data % slices == 0, f'run.data_parallel={data}: does not split over the {slices} slices')
  return Mesh(np.asarray(devices).reshape(slices, data // slices, fsdp, tensor), AXES)


def _slice(device: jax.Device) -> int:
  """The TPU slice that a device is in; 0 where there are none."""
  return getattr(device, 'slice_index', None) or 0


def rules_of_teachers(spread: bool) -> Rules:
  """Of frozen parameters; spread: over 'data' too, and gathered, inside of a slice, when they are used."""
  return {**RULES, 'embed': ('data', 'fsdp')} if spread else RULES


def devices(mesh: Mesh, mapped: bool = False, grouped: bool = False) -> Devices:
  """What a model is told of the devices that its programs are for.

  mapped: whether those are many arms' under vmap. grouped: whether the model sees one of `groups` of rows, which the
  vmap around it spreads.
  """
  first, heads = mesh.devices.flat[0], RULES.get('heads')
  rows = tuple(axis for axis in _axes(RULES['batch']) if not (grouped and axis in REPLICAS))
  if not (heads is None or isinstance(heads, str)) or heads != RULES.get('kv_heads'):
    raise ConfigError(f'sharding.RULES: heads={heads!r}, kv_heads={RULES.get("kv_heads")!r}: must be one mesh axis')
  layout: dict[str, Any] = {}
  if not mapped and mesh.size > 1:
    layout = {'stream': functools.partial(_stream, mesh, rows), 'embedded': functools.partial(_embedded, mesh, rows)}
  several = grouped and _ways(mesh, REPLICAS) > 1
  return Devices(first.platform, mesh, rows, heads, _widest_head(first), mapped, several, **layout)


def _widest_head(device: jax.Device) -> int:
  """That its cuDNN can do: more from Hopper on; an AMD GPU ('gfx942') has none."""
  capability = str(getattr(device, 'compute_capability', 0.0))
  if capability.startswith('gfx'):
    return 0
  return 256 if float(capability) >= 9 else 128


def groups(mesh: Mesh) -> dict[str, Any]:
  """Of rows whose gradients are added up once, at the end: how many, and the mesh axes over which they are spread."""
  return {'groups': _ways(mesh, REPLICAS), 'axis': REPLICAS}


def _stream(mesh: Mesh, rows: tuple[str, ...], x_BTD: jax.Array) -> jax.Array:
  """Says how the residual stream lies: by rows, and, if RULES say so, by time; each device has all of its width.

  Otherwise the compiler may take the layout of the embeddings for it, which fsdp cuts along the width.
  """
  time = _axes(RULES['time'])
  ways = [_ways(mesh, axes) for axes in (rows, time)]
  if x_BTD.shape[0] % ways[0] or x_BTD.shape[1] % ways[1]:
    return x_BTD
  where = PartitionSpec(rows or None, time or None, None)
  return jax.lax.with_sharding_constraint(x_BTD, NamedSharding(mesh, where))


def _embedded(
  mesh: Mesh, rows: tuple[str, ...], look_up: Callable[[jax.Array], jax.Array], tokens_BT: jax.Array
) -> jax.Array:
  """Each device looks its part of the width up, for the tokens of those with whom it shares the width.

  Left alone, the compiler looks it up for the tokens of all devices, and sends what it finds between slices too.
  """
  width = _axes(RULES['embed'])
  others = tuple(axis for axis in rows if axis not in width)
  if len(tokens_BT) % _ways(mesh, others):
    return look_up(tokens_BT)

  def lies(x, *axes):
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(others or None, None, *axes)))

  return lies(look_up(lies(tokens_BT)), width or None)


def _axes(target: str | tuple[str, ...] | None) -> tuple[str, ...]:
  return (target,) if isinstance(target, str) else target or ()


def _ways(mesh: Mesh, axes: Sequence[str]) -> int:
  return math.prod(mesh.shape[axis] for axis in axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sequences over all axes but `tensor`; every entry of a batch has B as its first axis."""
  return NamedSharding(mesh, PartitionSpec(RULES['batch']))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def check_batch(mesh: Mesh, batch_size: int, accumulate: int) -> None:
  """Each micro-batch must split evenly over the devices that share it."""
  ways = _ways(mesh, _axes(RULES['batch']))
  require(
    batch_size % (ways * accumulate) == 0,
    f'data.batch_size={batch_size}: not divisible by train.accumulate={accumulate} x {ways} data-parallel devices',
  )


def share(mesh: Mesh) -> tuple[int, int]:
  """`(i, n)`: of n equal parts of a batch, one after another, this host feeds its devices the i-th.

  Hosts that hold parts of one tensor-parallel model feed the same rows. ConfigError if two hosts share some of theirs.
  """
  ours, its = len(mesh.local_devices), mesh.shape['tensor']
  n_hosts = mesh.size // ours
  require(
    ours % its == 0 or its % ours == 0,
    f'run.tensor={its}: neither divides the {ours} devices of a host nor is divided by them',
  )
  together = max(its // ours, 1)
  return jax.process_index() // together, n_hosts // together


def spec(
  axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, name: str, rules: Rules | None = None
) -> PartitionSpec:
  """The partition of one array from its logical axes; an axis that does not divide is an error that names it."""
  parts = []
  for axis, size in zip(axes, shape, strict=True):
    target = (RULES if rules is None else rules).get(axis) if axis else None
    ways = _ways(mesh, _axes(target))
    if size % ways:
      raise ConfigError(
        f'{name}: axis {axis!r} of size {size} does not split over {ways} devices of mesh axis {target!r}'
      )
    parts.append(target if ways > 1 else None)
  return PartitionSpec(*parts)


def shardings(tree: Any, axes: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
  """NamedShardings for every array of `tree` (a TrainState, parameters, a teacher).

  axes: the model's logical axes, a tree like its parameters. An array belongs to a parameter if its path in `tree` ends
  with the parameter's path and it has as many axes: moments, masks, averages and the parameters themselves do. All
  other arrays (counters, keys, factored statistics, and a single number in place of one) are replicated. rules: RULES
  unless given.
  """
  table = {_names(path): value for path, value in jax.tree_util.tree_leaves_with_path(axes, is_leaf=_is_axes)}

  def of(path, leaf):
    names = _names(path)
    for start in range(len(names)):
      logical = table.get(names[start:])
      if logical is not None and len(logical) == len(leaf.shape) and math.prod(leaf.shape) > 1:
        return NamedSharding(mesh, spec(logical, leaf.shape, mesh, '.'.join(map(str, names[start:])), rules))
    return replicated(mesh)

  return jax.tree_util.tree_map_with_path(of, tree)


def spread(layout: Any, shapes: Any, mesh: Mesh) -> Any:
  """The layout of an optimiser's state, cut over 'data' as well: along the first axis that divides, and is not cut yet.
  Each slice has all of it, so that the new parameters are gathered inside of one.

  Layers come first, so that an optimiser that needs whole matrices (Muon) has them, wherever their number divides.
  """
  ways = mesh.shape['data']

  def of(where, leaf):
    parts = [*where.spec, *[None] * (len(leaf.shape) - len(where.spec))]
    free = [i for i, size in enumerate(leaf.shape) if parts[i] is None and size % ways == 0]
    if ways == 1 or not free:
      return where
    parts[free[0]] = 'data'
    return NamedSharding(mesh, PartitionSpec(*parts))

  return jax.tree.map(of, layout, shapes)


def abstract(shapes: Any, layout: Any) -> Any:
  """Shapes with their shardings: what a checkpoint is restored into."""
  return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, layout)


def place(params: Any, axes: Any, mesh: Mesh) -> Any:
  """`params`, which every host has, on the devices, as `shardings` says."""

  def put(x, where):
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

  return jax.tree.map(put, to_host(params), shardings(params, axes, mesh))


def to_host(tree: Any) -> Any:
  """The arrays as numpy arrays, whole, on every host."""

  def get(x):
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
      return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)

  return jax.tree.map(get, tree)


def placer(mesh: Mesh) -> Callable[[Any], Any]:
  """A function that puts one host's share of a batch onto its devices."""
  where, (_, n) = batch_sharding(mesh), share(mesh)

  def put(x):
    return jax.make_array_from_process_local_data(where, x, (n * len(x), *x.shape[1:]))

  def place(batch):
    if jax.process_count() == 1:
      return jax.device_put(batch, where)  # all entries in one call: half the time
    with jax.transfer_guard('allow'):  # this transfer is meant, which JAX does not see
      return {k: put(v) for k, v in batch.items()}

  return place


def _is_axes(value: Any) -> bool:
  return isinstance(value, tuple) and all(v is None or isinstance(v, str) for v in value)


def _names(path: tuple[Any, ...]) -> tuple[Any, ...]:
  return tuple(getattr(p, 'key', getattr(p, 'name', getattr(p, 'idx', None))) for p in path)
