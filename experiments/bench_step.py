"""How fast is a training step? Tokens/s, MFU, compile time and memory, per model size and dtype; beside PyTorch's.

    python -m experiments.bench_step [--cases=0.8m,10.7m] [--dtypes=float32] [--rounds=12] [--torch=auto] [--out=FILE]

A step is forward, backward, clipping and AdamW on a batch of random tokens that lies on the device. MFU is
`flops_per_token` (causal attention counted half) over the float32 matmul rate measured in the same process. PyTorch, if
it is installed, runs the same architecture with its fused attention and fused AdamW (bench_torch.py), eagerly and,
where there is a C++ compiler, by torch.compile; 'of torch' is against the faster one of the same dtype.

Every contestant is a process of its own. They take turns, a few steps each, so that a busy machine slows all of them;
reported is each one's fastest step, and the ratio of those. No step of one overlaps a step of another.
"""

import json
import platform
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.turns import Contestant, closing, serve, take_turns
from slm_jax import commands
from slm_jax.ablate.table import columns

CASES = {
  # the settings of nanoGPT's examples for Shakespeare on a CPU and on a GPU
  '0.8m': {'layers': 4, 'heads': 4, 'width': 128, 'context': 64, 'batch': 12, 'vocab': 65},
  '10.7m': {'layers': 6, 'heads': 6, 'width': 384, 'context': 256, 'batch': 8, 'vocab': 65},
  # a larger vocabulary, where the head dominates
  '3m-8k': {'layers': 4, 'heads': 4, 'width': 192, 'context': 256, 'batch': 8, 'vocab': 8192},
}

TORCH = ('torch', 'torch-compile')

_CASES = flags.DEFINE_list('cases', ['0.8m', '10.7m'], f'of {", ".join(CASES)}')
_DTYPES = flags.DEFINE_list('dtypes', ['float32'], 'of float32, bfloat16')
_ROUNDS = flags.DEFINE_integer('rounds', 12, 'turns of each contestant', lower_bound=1)
_SECONDS = flags.DEFINE_float('seconds', 1.0, 'length of a turn, about')
_TORCH = flags.DEFINE_enum('torch', 'auto', ['auto', 'yes', 'no'], 'compare with PyTorch')
_OUT = flags.DEFINE_string('out', 'runs/bench_step/bench.json', 'where the figures go')
_WORKER = flags.DEFINE_string('worker', '', 'internal: what to run in this process')


# ---------------------------------------------------------------------------------------------------------- a worker


def jax_step(case: dict[str, int], dtype: str) -> tuple[Any, dict[str, Any]]:
  """(a function that takes one step and waits for it, facts about it)."""
  import jax
  import numpy as np

  from slm_jax import perf, sharding
  from slm_jax.model import decoder
  from slm_jax.model.config import ModelConfig
  from slm_jax.model.flops import flops_per_token, parameter_count
  from slm_jax.optim import OptimConfig, optimizer
  from slm_jax.step import init_state, make_step

  perf.keep_freed_memory()
  width, b, t = case['width'], case['batch'], case['context']
  config = ModelConfig(
    vocab_size=case['vocab'],
    d_model=width,
    n_layers=case['layers'],
    n_heads=case['heads'],
    n_kv_heads=case['heads'],
    head_dim=width // case['heads'],
    d_ff=4 * width,
    max_len=t,
    norm='layer',
    mlp='gelu',
    positions='learned',
    dtype=dtype,
  )
  devices = sharding.devices(sharding.make_mesh(1, 1, 1), False)
  model, optim = decoder.build(config, devices), optimizer(OptimConfig(), 1000)
  tokens = np.random.default_rng(0).integers(0, case['vocab'], (b, t + 1)).astype(np.int32)
  ones = np.ones((b, t))
  batch = jax.device_put(
    {
      'inputs': tokens[:, :-1],
      'targets': tokens[:, 1:],
      'segments': ones.astype('int32'),
      'mask': ones.astype('float32'),
    }
  )
  state = init_state(jax.random.PRNGKey(0), jax.jit(model.init)(jax.random.PRNGKey(1)), optim)
  start = time.perf_counter()
  compiled = jax.jit(make_step(model, optim), donate_argnums=0).lower(state, batch, {}).compile()
  facts = {
    'compile_seconds': time.perf_counter() - start,
    'parameters': parameter_count(config),
    'flops_per_token': flops_per_token(config, t),
    'peak_flops': perf.measured_matmul(),
    'version': jax.__version__,
    'device': jax.devices()[0].device_kind,
  }

  def step():
    nonlocal state
    state, metrics = compiled(state, batch, {})
    return float(metrics['loss'])

  return step, facts


def work(spec: str) -> None:
  """A contestant: says what it is, then takes a turn for each line on standard input and prints its step times."""
  engine, case, dtype = spec.split(':')
  if engine in TORCH:
    from experiments.bench_torch import torch_step

    step, facts = torch_step(CASES[case], dtype, engine == 'torch-compile')
  else:
    step, facts = jax_step(CASES[case], dtype)
  for _ in range(3):
    step()

  def turn(seconds: float) -> dict[str, Any]:
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
      start = time.perf_counter()
      step()
      times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    return {'times': times, 'peak_bytes': peak}

  serve(facts, turn)


# ----------------------------------------------------------------------------------------------------- the comparison


def compare(specs: list[str], rounds: int, seconds: float) -> list[dict[str, Any]]:
  """Figures of each contestant; they run in turns."""
  command = [sys.executable, '-m', 'experiments.bench_step', '--worker']
  with closing([]) as contestants:
    for spec in specs:  # one after another: each compiles, and measures the machine, alone
      contestants.append(Contestant(([*command, spec], {})))
    turns = take_turns(contestants, rounds, seconds)
    return [row(spec, its.facts[0], answers) for spec, its, answers in zip(specs, contestants, turns, strict=True)]


def row(spec: str, facts: dict[str, Any], turns: list[dict[str, Any]]) -> dict[str, Any]:
  engine, case, dtype = spec.split(':')
  times = sorted(t for turn in turns for t in turn['times'])
  tokens = CASES[case]['batch'] * CASES[case]['context']
  speed = tokens / times[0]
  return {
    'case': case,
    'engine': engine,
    'dtype': dtype,
    **facts,
    'step_ms': 1e3 * times[0],
    'step_ms_median': 1e3 * times[len(times) // 2],
    'tokens_per_second': speed,
    'mfu': speed * facts['flops_per_token'] / facts['peak_flops'] if 'peak_flops' in facts else None,
    'peak_bytes': max(turn['peak_bytes'] for turn in turns),
    'steps': len(times),
  }


def table(rows: list[dict[str, Any]]) -> str:
  head = ('case', 'engine', 'dtype', 'step ms', 'median', 'tokens/s', 'MFU', 'compile s', 'peak MiB', 'of torch')
  lines = [head]
  for r in rows:
    alike = (o for o in rows if (o['case'], o['dtype']) == (r['case'], r['dtype']) and o['engine'] in TORCH)
    baseline = max((o['tokens_per_second'] for o in alike), default=0)
    lines.append(
      (
        r['case'],
        r['engine'],
        r['dtype'],
        f'{r["step_ms"]:.1f}',
        f'{r["step_ms_median"]:.1f}',
        f'{r["tokens_per_second"]:,.0f}',
        f'{r["mfu"]:.0%}' if r['mfu'] else '–',
        f'{r["compile_seconds"]:.1f}' if 'compile_seconds' in r else '–',
        f'{r["peak_bytes"] / 2**20:,.0f}',
        f'{r["tokens_per_second"] / baseline:.2f}x' if baseline else '–',
      )
    )
  return columns(lines, right=range(3, len(head)))


def main(argv: list[str]) -> None:
  if _WORKER.value:
    work(_WORKER.value)
    return
  unknown = sorted(set(_CASES.value) - set(CASES)) + sorted(set(_DTYPES.value) - {'float32', 'bfloat16'})
  if unknown or len(argv) > 1:
    sys.exit(f'error: {unknown + argv[1:]}: --cases of {", ".join(CASES)}; --dtypes of float32, bfloat16')
  with_torch = _TORCH.value == 'yes'
  if _TORCH.value == 'auto':
    import importlib.util

    with_torch = importlib.util.find_spec('torch') is not None
  engines = [engine for engine in TORCH if with_torch and (engine == 'torch' or shutil.which('g++'))]
  rows = []
  for case in _CASES.value:
    specs = [f'{engine}:{case}:{dtype}' for dtype in _DTYPES.value for engine in ['jax', *engines]]
    rows += compare(specs, _ROUNDS.value, _SECONDS.value)
  print(table(rows))
  out = Path(_OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(json.dumps({'machine': platform.platform(), 'rows': rows}, indent=1) + '\n')
  print(f'\n{out}')


if __name__ == '__main__':
  commands.show_any_text()
  app.run(main)
