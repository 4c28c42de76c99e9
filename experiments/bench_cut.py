"""Is a cut model faster, and is a masked one? Tokens per second before and after, reading and writing.

    python -m experiments.bench_cut [--model=tiny_10m] [--batch=8] [--context=256] [--rounds=7] [--dtype=bfloat16]
                                    [--out=FILE]

Of a model with random parameters: half of its layers, of its feed-forward width, of its key/value groups (with their
query heads), of its width, and all of these; and masks, half and nine tenths of the layers' matrices zero. Reading is a
forward pass of a batch with logits; writing is decoding of a batch with the cache, 64 tokens after a prompt of 16.
All take turns in one process; reported is the fastest turn of each, against the whole model's.
"""

import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags

from slm_jax import commands
from slm_jax.ablate.table import columns
from slm_jax.config import ConfigError, require

NEW, PROMPT = 64, 16  # tokens

_MODEL = flags.DEFINE_string('model', 'tiny_10m', 'a preset')
_BATCH = flags.DEFINE_integer('batch', 8, 'sequences', lower_bound=1)
_CONTEXT = flags.DEFINE_integer('context', 256, 'tokens that are read', lower_bound=1)
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ('float32', 'bfloat16'), 'of activations and parameters')
_ROUNDS = flags.DEFINE_integer('rounds', 7, 'turns of each', lower_bound=1)
_OUT = flags.DEFINE_string('out', 'runs/bench_cut/bench.json', 'where the figures go')


def shapes(config: Any) -> dict[str, Any]:
  """The whole model's configuration and its cuts'."""
  for name in ('n_layers', 'd_ff', 'n_kv_heads', 'd_model'):
    require(getattr(config, name) % 2 == 0, f'{name}={getattr(config, name)} of --model={_MODEL.value}: has no half')
  halves = {
    'layers': {'n_layers': config.n_layers // 2},
    'channels': {'d_ff': config.d_ff // 2},
    'groups': {'n_kv_heads': config.n_kv_heads // 2, 'n_heads': config.n_heads // 2},
    'width': {'d_model': config.d_model // 2},
  }
  everything = {name: n for half in halves.values() for name, n in half.items()}
  cuts = {f'half of the {unit}': half for unit, half in halves.items()} | {'half of all': everything}
  return {'whole': config, **{name: dataclasses.replace(config, **cut) for name, cut in cuts.items()}}


def timed(config: Any, zeros: float) -> tuple[Callable[[], Any], Callable[[], Any]]:
  """(reads a batch, writes one), compiled; zeros: of the layers' matrices, as a mask that was applied."""
  import jax
  import jax.numpy as jnp

  from slm_jax import sharding
  from slm_jax.model import decoder
  from slm_jax.model.decode import generate
  from slm_jax.prune import criteria
  from slm_jax.prune.matrices import matrices, put
  from slm_jax.prune.patterns import select

  model = decoder.build(config, sharding.devices(sharding.make_mesh(devices=jax.devices()[:1])))
  params = jax.jit(model.init)(jax.random.PRNGKey(0))
  if zeros:
    w = matrices(params)
    params = put(params, {name: w[name] * mask for name, mask in select(criteria.magnitude(w), 1 - zeros).items()})
  tokens = jnp.zeros((_BATCH.value, _CONTEXT.value), jnp.int32)
  forward = jax.jit(lambda params, tokens: model.head(params, model.hidden(params, {'inputs': tokens})))
  write = jax.jit(generate, static_argnums=0, static_argnames=('max_new', 'eos', 'pad'))
  prompt, lengths = tokens[:, :PROMPT], jnp.full(_BATCH.value, PROMPT)
  key, warm = jax.random.PRNGKey(1), jnp.float32(1)

  def writes():
    return write(config, params, prompt, lengths, key, max_new=NEW, temperature=warm, eos=-1, pad=0)

  jax.block_until_ready((forward(params, tokens), writes()))
  return (lambda: jax.block_until_ready(forward(params, tokens))), (lambda: jax.block_until_ready(writes()))


def seconds(work: Callable[[], Any]) -> float:
  start = time.perf_counter()
  work()
  return time.perf_counter() - start


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    sys.exit(f'error: unexpected: {" ".join(argv[1:])}')
  import jax

  from slm_jax.model.flops import flops_per_token, parameter_count
  from slm_jax.model.presets import preset
  from slm_jax.prune.target import kv_bytes

  try:
    whole = dataclasses.replace(preset(_MODEL.value, '--model'), dtype=_DTYPE.value, param_dtype=_DTYPE.value)
    found = shapes(whole)
  except ConfigError as error:
    sys.exit(f'error: {error}')
  cases = [(name, config, 0.0) for name, config in found.items()]
  cases += [(f'mask, {share:.0%} zeros', found['whole'], share) for share in (0.5, 0.9)]
  work = [timed(config, zeros) for _, config, zeros in cases]
  best = [[float('inf')] * 2 for _ in cases]
  for turn in range(_ROUNDS.value):
    for i in range(len(cases)) if turn % 2 == 0 else reversed(range(len(cases))):
      best[i] = [min(old, seconds(one)) for old, one in zip(best[i], work[i], strict=True)]
  rows = [
    {
      'case': name,
      'parameters': parameter_count(config),
      'flops_per_token': flops_per_token(config, _CONTEXT.value, backward=False),
      'kv_bytes': kv_bytes(config),
      'reading': _BATCH.value * _CONTEXT.value / reads,
      'writing': _BATCH.value * NEW / writes,
    }
    for (name, config, _), (reads, writes) in zip(cases, best, strict=True)
  ]
  print(table(rows))
  out = Path(_OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  device = f'{platform.platform()}, {jax.devices()[0].device_kind}, jax {jax.__version__}'
  out.write_text(json.dumps({'machine': device, 'model': _MODEL.value, 'rows': rows}, indent=1) + '\n')
  print(f'\n{out}')


def table(rows: list[dict[str, Any]]) -> str:
  whole = rows[0]
  head = (
    'case',
    'parameters',
    'FLOPs/token',
    'cache bytes',
    'reads tokens/s',
    'of whole',
    'writes tokens/s',
    'of whole',
  )
  lines = [head]
  for row in rows:
    shares = [f'{row[key] / whole[key]:.0%}' for key in ('parameters', 'flops_per_token', 'kv_bytes')]
    speeds = [(f'{row[key]:,.0f}', f'{row[key] / whole[key]:.2f}x') for key in ('reading', 'writing')]
    lines.append((row['case'], *shares, *speeds[0], *speeds[1]))
  return columns(lines, right=range(1, len(head)))


if __name__ == '__main__':
  commands.show_any_text()
  app.run(main)
