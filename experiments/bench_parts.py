"""What do a teacher, pruning, the host and the data cost beside the step itself, and how soon does the first one come?

    python -m experiments.bench_parts [--layers=4] [--width=128] [--rounds=40] [--out=FILE]

Steps of one model in float32 take turns in one process, every other turn in reverse; reported are medians, and of
ratios the median of those of a turn, which a busy machine moves least. `teacher` is the forward pass of a model four
times as large with all its logits, `distill` a step that learns from it: the teacher's work, the student's and the
divergence. `prune` is a step between two mask updates, which must only multiply by masks.

    host     the loop of train.py around a step that computes next to nothing: what Python needs for each step,
             without its wait for data, which `input` is about
    input    tokens a second that one thread reads from a store, joins into batches and puts on the device
    first    from the start of Python to the first step's metrics, quickstart's student: with nothing compiled before
             (cold), and with its programs in the cache (warm); data and tokenizer are there
    import   `import slm_jax.train`, with JAX, Flax, Optax, Orbax and Grain

Targets: distill at most 1.15 times its parts, prune at most 1.05 times the plain step, host under 2 ms, input at least
100K tokens/s, first step within 15 s cold and 6 s warm, import within 1.5 s.
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from experiments.bench_first import first_steps, quickstart
from slm_jax import commands
from slm_jax.ablate.table import columns

_LAYERS = flags.DEFINE_integer('layers', 4, "the student's", lower_bound=1)
_WIDTH = flags.DEFINE_integer('width', 128, "the student's; the teacher is twice as wide", lower_bound=8)
_ROUNDS = flags.DEFINE_integer('rounds', 40, 'turns of each step', lower_bound=1)
_OUT = flags.DEFINE_string('out', 'runs/bench_parts/bench.json', 'where the figures go')

BATCH, LENGTH, VOCAB = 8, 256, 1024


def model_config(layers: int, width: int) -> Any:
  from slm_jax.model.config import ModelConfig

  heads = max(width // 32, 1)
  return ModelConfig(
    vocab_size=VOCAB,
    d_model=width,
    n_layers=layers,
    n_heads=heads,
    n_kv_heads=heads,
    head_dim=32,
    d_ff=3 * width,
    max_len=LENGTH,
  )


# ------------------------------------------------------------------------------------------------------------- steps


def steps(layers: int, width: int) -> dict[str, Callable[[], None]]:
  """What takes turns: plain, teacher, distill, prune."""
  import jax
  import numpy as np

  from slm_jax.distill.logits import distill
  from slm_jax.model import decoder
  from slm_jax.optim import OptimConfig, optimizer
  from slm_jax.prune.transform import prune
  from slm_jax.step import chain, init_state, make_step

  student = decoder.build(model_config(layers, width))
  teacher = decoder.build(model_config(layers, 2 * width))
  optim = optimizer(OptimConfig(), 1000)
  tokens = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
  ones = np.ones((BATCH, LENGTH))
  batch = jax.device_put(
    {
      'inputs': tokens[:, :-1],
      'targets': tokens[:, 1:],
      'segments': ones.astype('int32'),
      'mask': ones.astype('float32'),
    }
  )
  its = jax.jit(teacher.init)(jax.random.PRNGKey(7))

  def step_of(transform: Any) -> Callable[[], None]:
    params = jax.jit(student.init)(jax.random.PRNGKey(1))
    state = init_state(jax.random.PRNGKey(0), params, optim, transform)
    take = jax.jit(make_step(student, optim, transform), donate_argnums=0)

    def step() -> None:
      nonlocal state
      state, metrics = take(state, batch, {'teacher': its})
      jax.block_until_ready(metrics)

    return step

  logits = jax.jit(lambda params, batch: teacher.head(params, teacher.hidden(params, batch)))
  return {
    'plain': step_of(chain()),
    'teacher': lambda: jax.block_until_ready(logits(its, batch)),
    'distill': step_of(distill(teacher, weight=0.5, temperature=1.0)),
    'prune': step_of(prune(0.5, first=1, last=10**6, every=10**6)),
  }


def turns(contestants: dict[str, Callable[[], None]], rounds: int) -> list[dict[str, float]]:
  """Seconds of a step of each, turn by turn."""
  for take in contestants.values():
    for _ in range(3):  # compiles; and masks are chosen once
      take()
  found = []
  for turn in range(rounds):
    took = {}
    for name in contestants if turn % 2 else reversed(contestants):
      start = time.perf_counter()
      contestants[name]()
      took[name] = time.perf_counter() - start
    found.append(took)
  return found


# ------------------------------------------------------------------------------------------------- around the steps


def host_seconds(workdir: Path, steps: int = 400) -> float:
  """Of the loop, a step, without waiting for data; the step itself adds one to a counter."""
  import jax.numpy as jnp

  from slm_jax import train
  from slm_jax.config import override
  from slm_jax.preempt import Preemption

  config = override(quickstart(steps), {'eval.every': steps, 'run.log_every': 10})
  job = train.prepare(config, workdir, workdir / 'host')
  one = {name: jnp.float32(1) for name in ('loss', 'total', 'grad_norm', 'learning_rate')}

  def nothing(state: Any, batch: Any, frozen: Any) -> Any:
    return state._replace(step=state.step + 1), {**one, 'tokens': batch['mask'].sum()}

  return train.train(job._replace(step=nothing), Preemption(), 'host')['seconds_step'] / steps


def input_rate(workdir: Path, seconds: float = 2.0) -> float:
  """Tokens a second, one thread."""
  from slm_jax import train

  job = train.prepare(quickstart(1000), workdir, workdir / 'input')
  done, start = 0, time.perf_counter()
  while time.perf_counter() - start < seconds:
    job.place(job.dataset.batch(done))
    done += 1
  return done * job.config.data.batch_size * job.config.data.seq_len / (time.perf_counter() - start)


def import_seconds() -> float:
  """Of the fastest of three."""
  timed = 'import time; t = time.time(); import slm_jax.train; print(time.time() - t)'
  return min(float(subprocess.check_output([sys.executable, '-c', timed], text=True)) for _ in range(3))


def figures(layers: int, width: int, rounds: int) -> list[tuple[str, float, str, float]]:
  """(what, figure, unit, target); rates are to be at least the target, all else at most."""
  from slm_jax import perf

  with tempfile.TemporaryDirectory() as folder:
    workdir = Path(folder)
    cold, warm = first_steps(workdir)
    perf.keep_freed_memory()
    host, rate = host_seconds(workdir), input_rate(workdir)
  took = turns(steps(layers, width), rounds)
  plain, teacher = (1e3 * statistics.median(turn[name] for turn in took) for name in ('plain', 'teacher'))
  distilling = statistics.median(turn['distill'] / (turn['plain'] + turn['teacher']) for turn in took)
  return [
    ('plain step', plain, 'ms', 0.0),
    ('teacher, forward', teacher, 'ms', 0.0),
    ('distill / (plain + teacher)', distilling, 'x', 1.15),
    ('prune / plain', statistics.median(turn['prune'] / turn['plain'] for turn in took), 'x', 1.05),
    ('host, a step', 1e3 * host, 'ms', 2.0),
    ('input, one thread', rate, 'tokens/s', 100e3),
    ('first step, cold', cold, 's', 15.0),
    ('first step, warm', warm, 's', 6.0),
    ('import slm_jax.train', import_seconds(), 's', 1.5),
  ]


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    sys.exit(f'error: {" ".join(argv[1:])}: not a flag')
  logging.set_verbosity('warning')
  rows = figures(_LAYERS.value, _WIDTH.value, _ROUNDS.value)
  lines = [('', 'figure', 'target', '')]
  for what, x, unit, target in rows:
    met = '' if not target else 'met' if (x >= target if unit == 'tokens/s' else x <= target) else 'NOT MET'
    shown = f'{x:,.0f}' if x > 1000 else f'{x:.2f}'
    lines.append((what, f'{shown} {unit}', f'{target:,g}' if target else '', met))
  print(columns(lines, right=range(1, 3)))
  out = Path(_OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  named = [dict(zip(('what', 'figure', 'unit', 'target'), row, strict=True)) for row in rows]
  sizes = {'layers': _LAYERS.value, 'width': _WIDTH.value}
  out.write_text(json.dumps({'machine': platform.platform(), **sizes, 'rows': named}, indent=1) + '\n')
  print(f'\n{out}')


if __name__ == '__main__':
  commands.show_any_text()
  app.run(main)
