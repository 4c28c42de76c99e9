"""What the hardware can do, and what of it a run uses."""

import contextlib
import ctypes
import functools
import importlib.metadata
import math
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax.interpreters import partial_eval

from slm_jax import chips
from slm_jax.config import require
from slm_jax.revision import source

# Dense bfloat16 peak, FLOP/s a chip, as published by the vendors.
PEAK = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5p': 459e12,
  'TPU v5': 459e12,
  'TPU v6 lite': 918e12,
  'TPU v6e': 918e12,
  'NVIDIA A100-SXM4-40GB': 312e12,
  'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H200': 989e12,
}


def peak_flops() -> tuple[float, str]:
  """`(FLOP/s of all devices together, where the number is from)`. A device that is not in the table is measured."""
  devices = jax.devices()
  kind = devices[0].device_kind
  if kind in PEAK:
    return PEAK[kind] * len(devices), f'published bfloat16 peak of {kind}'
  # The fake devices of one CPU share its cores, so their number does not enter.
  count = jax.process_count() if devices[0].platform == 'cpu' else len(devices)
  return measured_matmul() * count, 'measured float32 matmul of this machine'


def published_peak(kind: str) -> float:
  """FLOP/s of one chip; ConfigError if nobody wrote it down."""
  require(kind in PEAK, f'{kind}: no published peak is known; add it to PEAK in slm_jax/perf.py, beside chips.toml')
  return PEAK[kind]


@functools.cache
def measured_matmul(n: int = 1024, seconds: float = 0.3) -> float:
  """FLOP/s of the fastest of several n x n float32 matrix products."""
  x = _here((n, n), 'float32')
  return 2 * n**3 / _fastest(jnp.matmul, x, x, seconds=seconds)


@functools.cache
def measured_products(n: int, dtype: str) -> float:
  """FLOP/s of what a matrix [n, n] takes in training, with 2,048 tokens: y = x w, and the gradients of x and w."""
  x, w = _here((2048, n), dtype), _here((n, n), dtype)
  calls = (jnp.matmul, x, w), (lambda y, w: y @ w.T, x, w), (lambda x, y: x.T @ y, x, x)
  return 3 * 2 * 2048 * n**2 / sum(_fastest(*call, seconds=0.05) for call in calls)


@functools.cache
def measured_elementwise() -> float:
  """Numbers a second that become x sigmoid(x), in float32 and in a cache's reach; for what is not a product."""
  x = _here((2048, 1024), 'float32')
  return x.size / _fastest(lambda x: x * jax.nn.sigmoid(x), x, seconds=0.1)


def _here(shape: tuple[int, int], dtype: str) -> jax.Array:
  return jax.device_put(jnp.ones(shape, dtype), jax.local_devices()[0])


def _fastest(function: Callable[..., Any], *arrays: jax.Array, seconds: float) -> float:
  """Seconds of the fastest of several calls."""
  call = jax.jit(function)
  call(*arrays).block_until_ready()
  best, end = float('inf'), time.perf_counter() + seconds
  while time.perf_counter() < end:
    start = time.perf_counter()
    call(*arrays).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return best


def matmul_flops(program: Any) -> float:
  """FLOPs of all matrix products that a `jax.make_jaxpr` executes: 2 M N K each, loops multiplied out.

  Unlike the count of `model/flops.py` this one has the recomputation (remat, chunked losses), the scores that a mask
  hides, the weights that are multiplied although they are pruned, and the steps' tokens that are padding. Results that
  nobody uses are left out, as the compiler does; of a `cond`, the dearest branch counts; a `while` counts once. What
  each device of a mesh does by itself counts for all of them. A fused kernel's products count for the blocks of its
  grid, of which a causal one skips those above the diagonal.
  """
  jaxpr, _ = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
  return _matmul_flops(jaxpr)


def _matmul_flops(jaxpr: Any) -> float:
  total = 0.0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      inner = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
      total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
    if eqn.primitive.name.startswith('dot_product_attention'):
      total += _cudnn_flops(eqn)
    parts = [_matmul_flops(part) for part in jax.extend.core.jaxprs_in_params(eqn.params)]
    inside = max(parts, default=0.0) if eqn.primitive.name == 'cond' else sum(parts)
    total += inside * _times(eqn)
  return total


def _times(eqn: Any) -> float:
  """How often what is inside of an equation runs."""
  if eqn.primitive.name == 'scan':
    return eqn.params['length']
  if eqn.primitive.name == 'shard_map':
    return eqn.params['mesh'].size
  if eqn.primitive.name == 'pallas_call':
    grid, name = eqn.params['grid_mapping'].grid, eqn.params.get('name') or ''
    # Splash: (.., heads, blocks of queries, of keys), in dkv (.., of keys, heads, of queries); a window has fewer.
    rows = grid[-3 if 'dkv' in name else -2] if len(grid) > 2 else 0
    return math.prod(grid) * (_causal(grid[-1]) if 'splash' in name and grid[-1] == rows else 1)
  return 1


def _causal(blocks: int) -> float:
  """The share of a square of blocks that is on or below its diagonal."""
  return (blocks + 1) / (2 * blocks)


def _cudnn_flops(eqn: Any) -> float:
  """Of its causal attention, q [B,T,H,K], k [B,S,G,K]: 2 products forward, 5 backward, in tiles of 128."""
  (b, t, h, k), s = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape[1]
  products = 5 if 'bwd' in eqn.primitive.name else 2
  return products * 2 * b * h * t * s * k * _causal(-(-t // 128))


def cache_compilations(folder: Path) -> None:
  """Keeps every compiled program in `folder`, so that the next arm, or the next launch, does not compile it again."""
  if jax.config.values['jax_compilation_cache_dir'] is None:
    jax.config.update('jax_compilation_cache_dir', str(folder.absolute()))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)  # small programs are what we have


def keep_freed_memory() -> None:
  """Makes glibc reuse the memory of a step's temporaries instead of returning it to the system after every step.

  Otherwise each step on the CPU maps and faults in all of it anew: a fifth of the time of a small model's step. What
  matters is one arena for all threads, so this works only before JAX has started its own: call it before anything is
  computed. Nothing happens where the C library has no mallopt.
  """
  mmap_threshold, trim_threshold, top_pad, arena_max = -3, -1, -2, -8  # glibc's malloc.h
  with contextlib.suppress(OSError, AttributeError):
    libc = ctypes.CDLL(None)
    for parameter, value in (
      (mmap_threshold, 2**31 - 1),
      (trim_threshold, 2**31 - 1),
      (top_pad, 64 << 20),
      (arena_max, 1),
    ):
      libc.mallopt(parameter, value)


def environment() -> dict[str, Any]:
  """What a result was made with: code, packages, machine. Beside the result, never in its identity."""
  packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')
  devices = jax.devices()
  return {
    'git': _git(),
    'source': source(),
    'packages': {name: _version(name) for name in packages},
    'python': platform.python_version(),
    'machine': platform.platform(),
    'device_kind': devices[0].device_kind,
    'devices': len(devices),
    'processes': jax.process_count(),
    'chip_share': chips.share(),
  }


def _version(name: str) -> str:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return 'not installed'


def _git() -> dict[str, Any]:
  def run(*args: str) -> str:
    here = Path(__file__).parent  # where the name of a changed file may be in any encoding
    return subprocess.run(('git', *args), cwd=here, capture_output=True, check=True).stdout.decode(errors='replace')

  try:
    return {'commit': run('rev-parse', 'HEAD').strip(), 'dirty': bool(run('status', '--porcelain').strip())}
  except (OSError, subprocess.CalledProcessError):
    return {'commit': None, 'dirty': None}
