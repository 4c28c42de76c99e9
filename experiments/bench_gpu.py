"""How fast is one accelerator? 124M and 1B in bfloat16, decoding, populations; PyTorch beside it if installed.

    launch/bench_gpu.sh                                  # on the machine with the card; ends within 9 minutes
    python -m experiments.bench_gpu [--rows=124m,1b,...] [--minutes=9] [--smoke] [--out=FILE]

    124m, 1b        steps of a Llama-shaped model, contexts of 1,024 and 2,048; MFU counts causal attention half
    torch-...       the same sizes as a GPT by torch.compile, fused attention and fused AdamW, bfloat16 autocast
    decode          tokens a second of 124M, 64 rows, a prompt of 128 and 128 new tokens, greedy
    population      8 arms of 1M under one teacher of 10M in one program, against one arm: times as many steps a second
    124m-packed     124m with documents in its rows, which attention has to keep apart
    attention       bench_attention.py: the fused kernel's worst error, and how many times as fast it is
    cut             bench_cut.py: tokens a second of GPT-2's halves and masks, in multiples of its own
    first           bench_first.py: seconds to the quickstart student's first step, nothing compiled before and all

Each row is a process of its own, with the card to itself; a batch that does not fit is halved until it does. Rows for
which no time is left are left out, and say so. (Compiling rows side by side was tried: each compilation times matrix
products on the card, and those of eleven at once starved each other of memory.) Steps are timed in runs of ten, waited
for at the end; reported is the fastest run. `kernels` are the fused ones found in the compiled program. Needs jax,
flax, optax and orbax (`first` also grain and array_record), no network.
--smoke: tiny sizes, for a machine without a card: that the script runs, not how fast anything is.
"""

import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments import bench_attention, bench_first
from experiments.bench_attention import fastest
from slm_jax import commands

CASES = {
  '124m': {'layers': 12, 'heads': 12, 'width': 768, 'mlp': 2048, 'context': 1024, 'batch': 32, 'vocab': 50304},
  '1b': {'layers': 16, 'heads': 16, 'width': 2048, 'mlp': 5632, 'context': 2048, 'batch': 16, 'vocab': 50304},
}
CASES['124m-packed'] = CASES['124m']
SMOKE = {'layers': 2, 'heads': 2, 'width': 64, 'mlp': 128, 'context': 64, 'batch': 4, 'vocab': 512}
ROWS = ('124m', '1b', 'torch-124m', 'torch-1b', 'decode', 'population', '124m-packed', 'attention', 'cut', 'first')
WHOLE = 1 << 30  # tokens of a chunk: all logits at once

_ROWS = flags.DEFINE_list('rows', list(ROWS), f'of {", ".join(ROWS)}')
_MINUTES = flags.DEFINE_float('minutes', 9.0, 'after which nothing more is started or waited for', lower_bound=0.1)
_SMOKE = flags.DEFINE_bool('smoke', False, 'tiny sizes')
_OUT = flags.DEFINE_string('out', 'runs/bench_gpu/bench.json', 'where the figures go')
_WORKER = flags.DEFINE_string('worker', '', 'internal: the row of this process')


# --------------------------------------------------------------------------------------------------------- a worker


def model_config(case: dict[str, int]) -> Any:
  from slm_jax.model.config import ModelConfig

  return ModelConfig(
    vocab_size=case['vocab'],
    d_model=case['width'],
    n_layers=case['layers'],
    n_heads=case['heads'],
    n_kv_heads=case['heads'],
    head_dim=case['width'] // case['heads'],
    d_ff=case['mlp'],
    max_len=case['context'],
    dtype='bfloat16',
  )


def with_room(of: Callable[[dict[str, int]], dict[str, Any]], case: dict[str, int]) -> dict[str, Any]:
  """of(the case) with the largest batch that fits of the case's, its half, ..."""
  while True:
    try:
      return of(case)
    except Exception as error:  # jax and torch have their own, and not every machine has torch
      if not any(says in str(error) for says in ('RESOURCE_EXHAUSTED', 'out of memory')) or case['batch'] == 1:
        raise
      case = {**case, 'batch': case['batch'] // 2}


def trained(case: dict[str, int], packed: bool = False) -> dict[str, Any]:
  """Tokens a second and MFU."""
  import jax
  import numpy as np

  from slm_jax import perf, sharding
  from slm_jax.model import decoder, fused
  from slm_jax.model.flops import flops_per_token, parameter_count
  from slm_jax.optim import OptimConfig, optimizer
  from slm_jax.step import init_state, make_step

  config, mesh = model_config(case), sharding.make_mesh(devices=jax.devices()[:1])
  model, optim = decoder.build(config, sharding.devices(mesh)), optimizer(OptimConfig(), 1000)
  b, t = case['batch'], case['context']
  tokens = np.random.default_rng(0).integers(0, case['vocab'], (b, t + 1)).astype(np.int32)
  batch = {'inputs': tokens[:, :-1], 'targets': tokens[:, 1:], 'mask': np.ones((b, t), np.float32)}
  if packed:
    batch['segments'] = 1 + 4 * np.arange(t, dtype=np.int32)[None] // t + np.zeros((b, 1), np.int32)
  batch = jax.device_put(batch)
  fresh = jax.jit(lambda key: init_state(key, model.init(key), optim))
  step_of = jax.jit(make_step(model, optim, chunk=WHOLE), donate_argnums=0)
  began = time.perf_counter()
  compiled = step_of.lower(jax.eval_shape(fresh, jax.random.PRNGKey(0)), batch, {}).compile()
  compiling = time.perf_counter() - began
  state = fresh(jax.random.PRNGKey(0))

  def take() -> Any:
    nonlocal state
    state, metrics = compiled(state, batch, {})
    return metrics['loss']

  step = fastest(take, jax.block_until_ready, 3 if not _SMOKE.value else 1)
  speed = b * t / step
  return {
    'batch': b,
    'parameters': parameter_count(config),
    'tokens_per_second': speed,
    'mfu': speed * flops_per_token(config, t) / perf.peak_flops()[0],
    'peak_bytes': (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use'),
    'kernels': fused.kernels_in(compiled.as_text()),
    'compile_seconds': compiling,
    'loss': float(take()),
  }


def torch_trained(case: dict[str, int]) -> dict[str, Any]:
  """The same by PyTorch."""
  import torch

  from experiments.bench_torch import Gpt

  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  b, t = case['batch'], case['context']
  model = Gpt(case).to(device)
  optim = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
  tokens = torch.randint(case['vocab'], (b, t + 1), device=device)
  inputs, targets, loss_of = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.compile(model)

  def take() -> Any:
    with torch.autocast(device, dtype=torch.bfloat16):
      loss = loss_of(inputs, targets)
    optim.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optim.step()
    return loss

  step = fastest(take, lambda loss: loss.item(), 3 if not _SMOKE.value else 1)
  parameters = sum(p.numel() for p in model.parameters())
  return {'batch': b, 'parameters': parameters, 'tokens_per_second': b * t / step, 'version': torch.__version__}


def decoded(case: dict[str, int]) -> dict[str, Any]:
  import jax
  import jax.numpy as jnp

  from slm_jax.model import decoder
  from slm_jax.model.decode import generate

  config, rows = model_config(case), 64 if not _SMOKE.value else 2
  half = min(128, case['context'] // 2)
  params = jax.jit(decoder.build(config).init)(jax.random.PRNGKey(0))
  prompt = jnp.ones((rows, half), jnp.int32)

  def write(params: Any, prompt: Any) -> Any:
    length, key = jnp.full(rows, half), jax.random.PRNGKey(0)
    return generate(config, params, prompt, length, key, max_new=half, temperature=0.0)

  run = jax.jit(write).lower(params, prompt).compile()
  seconds = fastest(lambda: run(params, prompt), jax.block_until_ready, 3 if not _SMOKE.value else 1, steps=1)
  return {'batch': rows, 'tokens_per_second': rows * half / seconds}


def population() -> dict[str, Any]:
  """Arms' steps a second, of eight together and of one."""
  from experiments.arms_together import trainer

  student, teacher = ('tiny_1m', 'tiny_10m') if not _SMOKE.value else ('tiny_100k', 'none')
  found = []
  for n in (8, 1):
    take, held = trainer(student, n, teacher)
    found.append(held / fastest(take, lambda last: last, 3 if not _SMOKE.value else 1))
  return {'arms': 8, 'steps_per_second': found[0], 'of_one_arm': found[0] / found[1]}


def cuts() -> dict[str, Any]:
  """`{case: [reading, writing]}`, in multiples of the whole model's tokens a second."""
  sizes = ('--model=gpt2', '--batch=16', '--context=1024') if not _SMOKE.value else ('--model=tiny_1m', '--context=64')
  with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / 'bench.json'
    command = [sys.executable, '-m', 'experiments.bench_cut', '--dtype=bfloat16', '--rounds=5', *sizes, f'--out={out}']
    if code := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
      sys.exit(code)  # its last line says why
    whole, *others = json.loads(out.read_text())['rows']
  return {row['case']: [round(row[key] / whole[key], 2) for key in ('reading', 'writing')] for row in others}


def first_steps() -> dict[str, Any]:
  with tempfile.TemporaryDirectory() as folder:
    cold, warm = bench_first.first_steps(Path(folder))
  return {'cold_seconds': cold, 'warm_seconds': warm}


def work(row: str) -> dict[str, Any]:
  case = SMOKE if _SMOKE.value else CASES.get(row.removeprefix('torch-'), CASES['124m'])
  if row == 'attention':
    return bench_attention.summary(_SMOKE.value)
  if row == 'decode':
    return decoded(case)
  if row == 'population':
    return population()
  if row == 'cut':
    return cuts()
  if row == 'first':
    return first_steps()
  if row.startswith('torch-'):
    return with_room(torch_trained, case)
  return with_room(lambda case: trained(case, row.endswith('-packed')), case)


# ------------------------------------------------------------------------------------------------------- the whole


def main(argv: list[str]) -> None:
  if _WORKER.value:
    print(json.dumps(work(_WORKER.value)))
    return
  unknown = [row for row in _ROWS.value if row not in ROWS] + argv[1:]
  if unknown:
    sys.exit(f'error: {", ".join(unknown)}: --rows of {", ".join(ROWS)}')
  end = time.monotonic() + 60 * _MINUTES.value
  rows: dict[str, dict[str, Any]] = {}
  for row in _ROWS.value:
    rows[row] = figures(row, end - time.monotonic())
    print(row, '  '.join(f'{name} {shown(x)}' for name, x in rows[row].items()), flush=True)
  out = Path(_OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(json.dumps({'machine': platform.platform(), **versions(), 'rows': rows}, indent=1) + '\n')
  print(f'\n{out}')


def figures(row: str, seconds: float) -> dict[str, Any]:
  """Of a process of its own; {'error': ...} if there are none."""
  if row.startswith('torch-') and importlib.util.find_spec('torch') is None:
    return {'error': 'torch is not installed'}
  if seconds < 5:
    return {'error': 'no time was left'}
  command = [sys.executable, '-m', 'experiments.bench_gpu', f'--worker={row}', f'--smoke={_SMOKE.value}']
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=dict(os.environ))
  except subprocess.TimeoutExpired:
    return {'error': 'took longer than was left'}
  if done.returncode:
    return {'error': done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else f'exit {done.returncode}'}
  return json.loads(done.stdout.strip().splitlines()[-1])


def versions() -> dict[str, Any]:
  """Asked of another process: this one must not hold the card's memory."""
  asked = 'import jax, json; d = jax.devices(); print(json.dumps({"device": d[0].device_kind, "jax": jax.__version__}))'
  return json.loads(subprocess.check_output([sys.executable, '-c', asked], text=True).splitlines()[-1])


def shown(x: Any) -> str:
  if not isinstance(x, float):
    return str(x)
  return f'{x:,.0f}' if x > 100 else f'{x:.3g}'


if __name__ == '__main__':
  commands.show_any_text()
  app.run(main)
