"""Where the workers of a pool run: each on its share of this machine's cores, and of its GPUs or TPU chips."""

import importlib.util
import math
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slm_jax import chips
from slm_jax.config import require

PLUGINS = {'cuda': ('jax_cuda12_plugin', 'jax_cuda13_plugin'), 'tpu': ('libtpu',)}  # without one, JAX cannot use them
NAMES = {'cuda': 'GPU', 'tpu': 'TPU chip'}
GPU_MEMORY = 0.9  # of a GPU that several workers share, for all of them; JAX takes 0.75 for one


class Place(NamedTuple):
  """What one worker is pinned to."""

  cores: tuple[int, ...]  # none: not pinned, where the system cannot
  env: Mapping[str, str]
  devices: tuple[str, ...] = ()  # of the accelerators, those that it sees
  kind: str = ''  # of these: cuda or tpu

  def __str__(self) -> str:
    parts = [_numbered('core', self.cores)] if self.cores else []
    parts += [_numbered(NAMES[self.kind], self.devices)] if self.devices else []
    return ', '.join(parts) or 'this machine'


def accelerators(env: Mapping[str, str] = os.environ, dev: Path = Path('/dev')) -> tuple[str, list[str]]:
  """`('cuda' or 'tpu', names of the devices that JAX would use)`, or `('', [])`; found without importing JAX.

  GPUs: CUDA_VISIBLE_DEVICES, else what `nvidia-smi -L` lists. TPU chips: TPU_VISIBLE_CHIPS, else /dev/accelN (up to v4)
  or /dev/vfio/N (v5 and later). JAX_PLATFORMS rules out what it does not name.
  """
  wanted = env.get('JAX_PLATFORMS', '').replace('gpu', 'cuda')
  for kind, plugins in PLUGINS.items():
    if (not wanted or kind in wanted.split(',')) and any(map(importlib.util.find_spec, plugins)):
      found = _gpus(env) if kind == 'cuda' else _chips(env, dev)
      if found:
        return kind, found
  return '', []


def _gpus(env: Mapping[str, str]) -> list[str]:
  if 'CUDA_VISIBLE_DEVICES' in env:
    return [name for name in env['CUDA_VISIBLE_DEVICES'].split(',') if name]
  try:
    done = subprocess.run(['nvidia-smi', '-L'], capture_output=True, env=dict(env), check=True)
  except (OSError, subprocess.CalledProcessError):
    return []
  return re.findall(r'^GPU (\d+):', done.stdout.decode(errors='replace'), re.MULTILINE)


def _chips(env: Mapping[str, str], dev: Path) -> list[str]:
  if 'TPU_VISIBLE_CHIPS' in env:
    return [name for name in env['TPU_VISIBLE_CHIPS'].split(',') if name]
  found = list(dev.glob('accel[0-9]*')) or list((dev / 'vfio').glob('[0-9]*'))
  return [str(i) for i in range(len(found))]


def split(n: int, kind: str, devices: Sequence[str], env: Mapping[str, str] = os.environ) -> list[Place]:
  """n places of this machine.

  Cores and GPUs are dealt out in equal runs; those that are left over stay idle, so that all places are alike. Where
  there are fewer than places, they are shared. A TPU chip serves one process: more places than chips are a ConfigError.
  """
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else []
  require(
    kind != 'tpu' or n <= len(devices),
    f'--local_workers={n}: this machine has {len(devices)} TPU chips, and a chip serves one process',
  )
  own_devices = [(name,) for name in devices[:n]] if kind == 'tpu' else _deal(devices, n)
  sharing = -(-n // len(devices)) if devices else 1
  together = sharing if devices else n  # a machine without accelerators is one chip
  share = {chips.SHARE: repr(1 / together)} if together > 1 else {}  # so that each is charged for its part
  return [
    Place(tuple(own), {**_pin(kind, i, its, env), **_memory(kind, sharing, env), **share}, tuple(its), kind)
    for i, (own, its) in enumerate(zip(_deal(cores, n), own_devices, strict=True))
  ]


def _deal(things: Sequence[Any], n: int) -> list[Sequence[Any]]:
  each = len(things) // n
  if each:
    return [things[i * each : (i + 1) * each] for i in range(n)]
  return [things[i % len(things) :][:1] if things else () for i in range(n)]


def _pin(kind: str, i: int, devices: Sequence[str], env: Mapping[str, str]) -> dict[str, str]:
  if kind == 'cuda':
    return {'CUDA_VISIBLE_DEVICES': ','.join(devices)}
  if kind == 'tpu':  # bounds count chips; as documented for Cloud TPU VMs, not tried on one
    one = dict.fromkeys(('TPU_CHIPS_PER_PROCESS_BOUNDS', 'TPU_PROCESS_BOUNDS'), '1,1,1')
    pod = {'TPU_SKIP_MDS_QUERY': '1', 'TPU_HOST_BOUNDS': '1,1,1', 'TPU_WORKER_HOSTNAMES': 'localhost'}
    on_pod = ',' in env.get('TPU_WORKER_HOSTNAMES', '')
    return {'TPU_VISIBLE_CHIPS': devices[0], 'TPU_PROCESS_PORT': str(8476 + i), **one, **(pod if on_pod else {})}
  return {}


def _memory(kind: str, sharing: int, env: Mapping[str, str]) -> dict[str, str]:
  """What a worker may take of a GPU that others are on too, unless the user has said."""
  said = {'XLA_PYTHON_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_PREALLOCATE'} & env.keys()
  if kind != 'cuda' or sharing == 1 or said:
    return {}
  return {'XLA_PYTHON_CLIENT_MEM_FRACTION': f'{math.floor(1000 * GPU_MEMORY / sharing) / 1000:.3f}'}


def _numbered(name: str, numbers: Sequence[Any]) -> str:
  """'core 3', 'cores 0-3', 'GPUs 0,2'."""
  if len(numbers) == 1:
    return f'{name} {numbers[0]}'
  listed = ','.join(map(str, numbers))
  run = ','.join(str(int(numbers[0]) + i) for i in range(len(numbers))) if str(numbers[0]).isdigit() else ''
  return f'{name}s {numbers[0]}-{numbers[-1]}' if listed == run else f'{name}s {listed}'
