"""Sharding: one table from the model's logical axes to mesh axes, applied to the arguments of the jitted step.

No model or loss code mentions devices; the compiler propagates what the arguments say. Change `RULES` (or pass another
table) and the same step runs data-parallel, fully sharded or tensor-parallel.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slm_jax.config import ConfigError, require

AXES = ('data', 'fsdp', 'tensor')

# logical axis -> mesh axis (or axes); what is not named here is replicated
RULES: Mapping[str, str | tuple[str, ...]] = {
  'batch': ('data', 'fsdp'),
  'embed': 'fsdp',
  'vocab': 'tensor',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
}


def make_mesh(data: int = 0, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A `data x fsdp x tensor` mesh over all devices; data=0 takes what is left."""
  devices = jax.devices() if devices is None else devices
  rest, n = fsdp * tensor, len(devices)
  if data == 0:
    require(n % rest == 0, f'run.fsdp={fsdp}, run.tensor={tensor}: {rest} does not divide the {n} devices')
    data = n // rest
  require(data * rest == n, f'run: data x fsdp x tensor = {data} x {fsdp} x {tensor} is not the {n} devices')
  return Mesh(np.asarray(devices).reshape(data, fsdp, tensor), AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sequences over `data` and `fsdp`; every entry of a batch has B as its first axis."""
  return NamedSharding(mesh, PartitionSpec(RULES['batch']))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def check_batch(mesh: Mesh, batch_size: int, accumulate: int) -> None:
  """Each micro-batch must split evenly over the devices that share it."""
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  require(
    batch_size % (ways * accumulate) == 0,
    f'data.batch_size={batch_size}: not divisible by train.accumulate={accumulate} x {ways} data-parallel devices',
  )


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, name: str) -> PartitionSpec:
  """The partition of one array from its logical axes; an axis that does not divide is an error that names it."""
  parts = []
  for axis, size in zip(axes, shape, strict=True):
    target = RULES.get(axis) if axis else None
    ways = mesh.shape[target] if isinstance(target, str) else 1
    if size % ways:
      raise ConfigError(
        f'{name}: axis {axis!r} of size {size} does not split over {ways} devices of mesh axis {target!r}'
      )
    parts.append(target if ways > 1 else None)
  return PartitionSpec(*parts)


def shardings(tree: Any, axes: Any, mesh: Mesh) -> Any:
  """NamedShardings for every array of `tree` (a TrainState, parameters, a teacher).

  axes: the model's logical axes, a tree like its parameters. An array belongs to a parameter if its path in `tree` ends
  with the parameter's path and it has as many axes: moments, masks, averages and the parameters themselves do. All
  other arrays (counters, keys, factored statistics) are replicated.
  """
  table = {_names(path): value for path, value in jax.tree_util.tree_leaves_with_path(axes, is_leaf=_is_axes)}

  def of(path, leaf):
    names = _names(path)
    for start in range(len(names)):
      logical = table.get(names[start:])
      if logical is not None and len(logical) == len(leaf.shape):
        return NamedSharding(mesh, spec(logical, leaf.shape, mesh, '.'.join(map(str, names[start:]))))
    return replicated(mesh)

  return jax.tree_util.tree_map_with_path(of, tree)


def abstract(shapes: Any, layout: Any) -> Any:
  """Shapes with their shardings: what a checkpoint is restored into."""
  return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, layout)


def place(params: Any, axes: Any, mesh: Mesh) -> Any:
  """`params` on the devices, as `shardings` says."""
  return jax.device_put(params, shardings(params, axes, mesh))


def placer(mesh: Mesh) -> Callable[[Any], Any]:
  """A function that puts one host's part of a batch onto its devices."""
  where = batch_sharding(mesh)
  return lambda batch: {k: jax.make_array_from_process_local_data(where, v) for k, v in batch.items()}


def _is_axes(value: Any) -> bool:
  return isinstance(value, tuple) and all(v is None or isinstance(v, str) for v in value)


def _names(path: tuple[Any, ...]) -> tuple[Any, ...]:
  return tuple(getattr(p, 'key', getattr(p, 'name', getattr(p, 'idx', None))) for p in path)
