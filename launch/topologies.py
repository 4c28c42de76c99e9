"""TPU slices by name: chips, hosts, topology, and what the engines call them.

What `N` of `v5p-N` counts differs: TensorCores for v4, v5p and tpu7x, chips for v5litepod and v6e. How many hosts a
slice has depends on the engine: 8 chips of v5litepod or v6e are one VM of the Cloud TPU API and two nodes on GKE.

Sources: the documentation of Cloud TPU and GKE, and XPK's table of systems. Not checked on a live system.
"""

import math
from typing import NamedTuple

from slm_jax.config import ConfigError


class Slice(NamedTuple):
  """One slice as one engine sees it."""

  name: str  # accelerator type: 'v5litepod-16'
  topology: str  # '4x4'
  chips: int
  hosts: int  # VMs, each with chips / hosts chips
  devices: int  # what JAX sees: two a chip of tpu7x, else one
  label: str  # GKE: cloud.google.com/gke-tpu-accelerator
  machine: str  # GKE: machine type of the node pool
  runtime: str  # Cloud TPU API: image of the VM

  @property
  def chip(self) -> str:
    """As chips.toml calls it."""
    family = self.name.rpartition('-')[0]
    return 'v5e' if family == 'v5litepod' else family

  def __str__(self) -> str:
    return f'{self.name}: topology {self.topology}, {self.chips} chips, {self.hosts} host{"s" * (self.hosts > 1)}'


class Family(NamedTuple):
  counts: int  # of what N counts, so many a chip
  devices: int  # of JAX, a chip
  most: int  # chips of one VM of the Cloud TPU API, where that is the whole slice; 0: not in that API
  label: str
  machine: str  # and -1t for a single chip, else -4t
  runtime: str
  topologies: tuple[str, ...]


_3D = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x12', '8x8x16', '8x16x16')
_2D = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')

FAMILIES = {
  'v4': Family(2, 1, 4, 'tpu-v4-podslice', 'ct4p-hightpu', 'tpu-ubuntu2204-base', _3D),
  'v5litepod': Family(1, 1, 8, 'tpu-v5-lite-podslice', 'ct5lp-hightpu', 'v2-alpha-tpuv5-lite', _2D),
  'v5p': Family(2, 1, 4, 'tpu-v5p-slice', 'ct5p-hightpu', 'v2-alpha-tpuv5', _3D),
  'v6e': Family(1, 1, 8, 'tpu-v6e-slice', 'ct6e-standard', 'v2-alpha-tpuv6e', _2D),
  'tpu7x': Family(2, 2, 0, 'tpu7x', 'tpu7x-standard', '', ('1x1x1', *_3D)),
}


def _slice(engine: str, name: str, family: Family, topology: str) -> Slice:
  chips = math.prod(map(int, topology.split('x')))
  a_host = min(chips, 4)
  if engine == 'tpu_vm' and chips <= family.most:
    a_host = chips
  return Slice(
    name=f'{name}-{chips * family.counts}',
    topology=topology,
    chips=chips,
    hosts=chips // a_host,
    devices=chips * family.devices,
    label=family.label,
    machine=f'{family.machine}-{a_host}t',
    runtime=family.runtime,
  )


ENGINES = {'tpu_vm': [name for name, family in FAMILIES.items() if family.most], 'gke': list(FAMILIES)}

TABLE = {
  (engine, its.name): its
  for engine, names in ENGINES.items()
  for name in names
  for its in (_slice(engine, name, FAMILIES[name], topology) for topology in FAMILIES[name].topologies)
}


def find(engine: str, name: str, flag: str) -> Slice:
  """The slice of that name on that engine; ConfigError that lists the family's, or the families, if there is none."""
  if (engine, name) in TABLE:
    return TABLE[engine, name]
  family = name.rpartition('-')[0]
  if family in ENGINES[engine]:
    sizes = [its for where, its in TABLE if where == engine and its.startswith(f'{family}-')]
    raise ConfigError(f'{flag}={name}: no such slice; there is: {", ".join(sizes)}')
  known = ', '.join(f'{family}-N' for family in ENGINES[engine])
  raise ConfigError(f'{flag}={name or "(not given)"}: expected one of {known}; as in v6e-16')
