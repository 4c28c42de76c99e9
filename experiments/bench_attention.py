"""The fused attention of this machine's accelerator against the reference: how wrong, and how many times as fast?

    python -m experiments.bench_attention

Of a few cases with windows, documents, grouped queries and several head sizes: the worst error of results and
gradients, as a share of the largest value, of the kernel in bfloat16 against the reference in float32; and the time of
both in bfloat16.
"""

import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import app

from slm_jax import commands

CASES = (  # heads of queries, of keys and values, their size; window, documents in a row
  (12, 12, 64, 0, False),
  (12, 12, 64, 300, True),
  (16, 4, 128, 0, True),
  (16, 4, 128, 300, False),
  (4, 2, 256, 0, True),
)


def fastest(take: Callable[[], Any], wait: Callable[[Any], Any], runs: int, steps: int = 10) -> float:
  """Seconds of a step, of the fastest of the runs."""
  wait(take())
  best = float('inf')
  for _ in range(runs):
    start = time.perf_counter()
    for _ in range(steps):
      last = take()
    wait(last)
    best = min(best, (time.perf_counter() - start) / steps)
  return best


def cases(b: int, t: int) -> Iterator[tuple[str, Any, Any, list[Any]]]:
  """(what it is, configuration, documents or None, [queries, keys, values, cotangent])."""
  import jax.numpy as jnp
  import numpy as np

  from slm_jax.model.attention import document_starts
  from slm_jax.model.config import ModelConfig

  for h, g, k, window, packed in CASES:
    local = {'window': window, 'global_every': 2} if window else {}
    config = ModelConfig(n_heads=h, n_kv_heads=g, head_dim=k, dtype='bfloat16', **local)
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(b, t, n, k)), 'bfloat16') for n in (h, g, g, h)]
    segments = np.cumsum(rng.random((b, t)) < 1 / 200, axis=1).astype(np.int32)
    name = f'{h}/{g} heads of {k}' + (f', window {window}' if window else '') + (', documents' if packed else '')
    yield name, config, document_starts(jnp.asarray(segments)) if packed else None, arrays


def reference(config: Any, documents: Any, t: int) -> Callable[..., Any]:
  """Attention of a local layer by attention.py."""
  import jax.numpy as jnp

  from slm_jax.model.attention import attention

  slot = jnp.arange(t)[None]
  low = jnp.zeros_like(slot) if documents is None else documents
  low = jnp.maximum(low, slot - config.window + 1) if config.window else low
  return lambda q, k, v: attention(q, k, v, low, slot, config.query_scale)


def pulled_back(attend: Callable[..., Any]) -> Callable[..., Any]:
  """(q, k, v, cotangent) -> the result and its three gradients."""
  import jax

  def both(q, k, v, cotangent):
    z, pull = jax.vjp(attend, q, k, v)
    return (z, *pull(cotangent))

  return both


def measured(smoke: bool = False) -> dict[str, Any]:
  """{'errors': {case: the worst}, 'times_as_fast': {case: as the reference}}; SystemExit if a kernel is not used."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from slm_jax import sharding
  from slm_jax.model import fused

  b, t = (2, 64) if smoke else (8, 1024)
  devices = sharding.devices(sharding.make_mesh(devices=jax.devices()[:1]))
  errors: dict[str, Any] = {}
  ratios: dict[str, float] = {}
  for name, config, documents, arrays in cases(b, t):
    fast = fused.attend_by(config, devices, documents, b, t)
    if fast is None:
      errors[name] = 'the reference was chosen'
      continue
    ours = pulled_back(lambda q, k, v, fast=fast: fast(q, k, v, jnp.asarray(False)))
    slow = pulled_back(reference(config, documents, t))
    in_float32 = [x.astype('float32') for x in arrays]
    with jax.default_matmul_precision('highest'):
      exact = jax.jit(slow).lower(*in_float32).compile()
    compiled = [jax.jit(fn).lower(*arrays).compile() for fn in (ours, slow)]
    if not fused.kernels_in(compiled[0].as_text()):
      sys.exit(f'error: {name}: a fused kernel was chosen, and the program has none')
    pairs = zip(compiled[0](*arrays), exact(*in_float32), strict=True)
    errors[name] = max(float(np.abs(np.asarray(x, np.float32) - y).max() / np.abs(y).max()) for x, y in pairs)
    took = [fastest(functools.partial(run, *arrays), jax.block_until_ready, 3) for run in compiled]
    ratios[name] = took[1] / took[0]
  return {'errors': errors, 'times_as_fast': ratios}


def summary(smoke: bool) -> dict[str, Any]:
  found = measured(smoke)
  by_kernel, ratios = [x for x in found['errors'].values() if isinstance(x, float)], found['times_as_fast'].values()
  worst = {'worst_error': max(by_kernel), 'times_as_fast': min(ratios)} if by_kernel else {}
  return {'cases': len(found['errors']), 'fused': len(by_kernel), **worst}


def main(argv: list[str]) -> None:
  if argv[1:]:
    sys.exit(f'error: {" ".join(argv[1:])}: takes no arguments')
  found = measured()
  for name, error in found['errors'].items():
    ratio = found['times_as_fast'].get(name)
    print(name.ljust(44), error if ratio is None else f'worst error {error:.2%}, {ratio:.2f} times as fast')


if __name__ == '__main__':
  commands.show_any_text()
  app.run(main)
