"""TPU slices to compile for, described by the `libtpu` package on a machine that has no TPU."""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

from launch.topologies import FAMILIES
from slm_jax import chips
from slm_jax.chips import Chip
from slm_jax.config import ConfigError, require, to_install

KINDS = {'v4': 'v4', 'v5e': 'v5litepod', 'v5p': 'v5p', 'v6e': 'v6e'}  # name in chips.toml and libtpu: in topologies.py

# libtpu looks for the TPU VM that it expects to be on, and says at length that it is not.
_QUIET = {
  'JAX_PLATFORMS': 'cpu',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_WORKER_ID': '0',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_MIN_LOG_LEVEL': '3',
  'TPU_STDERR_LOG_LEVEL': '3',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # nobody's TPU is at stake
}


def prepare() -> None:
  """Sets the environment for compiling without a TPU; before JAX is imported."""
  for name, value in _QUIET.items():
    os.environ.setdefault(name, value)


def check(topology: str, num_slices: int) -> tuple[str, str]:
  """`(chip, shape)` of 'v5e:16x16'. ConfigError if there is no such slice, or no libtpu to ask about it."""
  kind, _, shape = topology.partition(':')
  flag = f'--topology={topology or "(not given)"}'
  require(kind in KINDS, f'{flag}: expected one of {", ".join(f"{kind}:SHAPE" for kind in KINDS)}; as in v5e:16x16')
  known = FAMILIES[KINDS[kind]].topologies
  require(
    bool(re.fullmatch(r'\d+(x\d+)+', shape)) and shape in known,
    f'{flag}: {kind} has no slice {shape or "without a shape"}; there is: {", ".join(known)}',
  )
  require(num_slices > 0, f'--num_slices={num_slices}: must be positive')
  require(num_slices <= 1000, f'--num_slices={num_slices}: must lie in [1, 1000]')
  require(
    importlib.util.find_spec('libtpu') is not None,
    f'{flag}: needs the package libtpu, which is not installed: {to_install("aot")}',
  )
  return kind, shape


def devices(topology: str, num_slices: int = 1) -> tuple[Sequence[Any], Chip]:
  """The chips of so many slices, one JAX device each, and what they are. ConfigError: see `check`."""
  kind, shape = check(topology, num_slices)
  from jax.experimental import topologies

  options: dict[str, Any] = {'num_slices': num_slices} if num_slices > 1 else {}
  if kind == 'v4':
    options['chip_config_name'] = 'megacore'  # its two cores are one device, as JAX has them
  if shape == '1x1':
    options['chips_per_host_bounds'] = (1, 1, 1)
  try:
    described = topologies.get_topology_desc(platform='tpu', topology_name=topology, **options)
  except Exception as error:
    raise ConfigError(f'--topology={topology}, --num_slices={num_slices}: libtpu refuses ({error})') from error
  return described.devices, chips.table()[kind]
