"""What does it bring to train arms as a population? Arms per hour, against one after another and one process an arm.

    python -m experiments.bench_population [--sizes=100k,1m] [--arms=1,4,16,64] [--teacher=tiny_3m] [--workers=2]

Arms of one size and of one order of the data, with a frozen teacher that all of them learn from: `--teacher`, a preset,
or 'none'; by default ten times as large as they (30M for 10M). Four ways, with the project's own step, population and
pinning:

    sequence     one process, one arm after another, compiled once
    processes    one process an arm, as many at a time as `--workers`, each pinned to its share of this machine
    population   one process, one program for all arms
    populations  as many populations as workers, each pinned to its share (`--local_workers`)

They take turns, so that a busy machine slows all of them; reported is the fastest turn of each, in steps of one arm per
second of all together. Arms per hour are computed from this: `--steps` steps an arm, and what was measured from the
start of a process to the end of its first step: of every process of `processes` (with the compiled program found in the
cache), once otherwise. Evaluation and checkpoints are left out. Where the program of a population does not fit into
memory, it is made of half as many arms, as in training; `held` says of how many.

One arm is never a population: of 1 arm, the first two ways are all there is.
"""

import json
import math
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.arms_together import trainer
from experiments.turns import Contestant, closing, serve, take_turns
from launch import leash, places
from slm_jax import commands
from slm_jax.ablate.table import columns
from slm_jax.model.presets import presets

SIZES = {'100k': ('tiny_100k', 'tiny_1m'), '1m': ('tiny_1m', 'tiny_10m'), '10m': ('tiny_10m', 'tiny_30m')}
WAYS = ('sequence', 'processes', 'population', 'populations')

_SIZES = flags.DEFINE_list('sizes', list(SIZES), f'of {", ".join(SIZES)}')
_ARMS = flags.DEFINE_list('arms', ['1', '4', '16', '64'], 'numbers of arms')
_WAYS = flags.DEFINE_list('ways', list(WAYS), f'of {", ".join(WAYS)}; all of them are in memory at once')
_TEACHER = flags.DEFINE_string('teacher', '', 'preset of the teacher, or none (default: ten times the size)')
_WORKERS = flags.DEFINE_integer('workers', 2, 'processes at a time', lower_bound=1)
_ROUNDS = flags.DEFINE_integer('rounds', 4, 'turns of each contestant', lower_bound=1)
_SECONDS = flags.DEFINE_float('seconds', 3.0, 'length of a turn, about')
_STEPS = flags.DEFINE_integer('steps', 1000, 'steps of an arm, for arms per hour', lower_bound=1)
_OUT = flags.DEFINE_string('out', 'runs/bench_population/bench.json', 'where the figures go')
_WORKER = flags.DEFINE_string('worker', '', 'internal: what to run in this process')


# ---------------------------------------------------------------------------------------------------------- a worker


def work(size: str, n_arms: int, teacher: str, began: float, cache: str) -> None:
  """A process of a contestant: trains n_arms arms by one program, as a population if they are several."""
  import jax

  from slm_jax import perf

  perf.keep_freed_memory()
  if cache:
    perf.cache_compilations(Path(cache))
  step, held = trainer(SIZES[size][0], n_arms, teacher)
  step()
  facts = {'start_seconds': time.time() - began, 'held': held, 'device': jax.devices()[0].device_kind}
  step()

  def turn(seconds: float) -> dict[str, float]:
    steps, start = 0, time.perf_counter()
    while not steps or time.perf_counter() < start + seconds:
      step()
      steps += held
    return {'steps_per_second': steps / (time.perf_counter() - start)}

  serve(facts, turn)


# ----------------------------------------------------------------------------------------------------- the comparison


def teacher_of(size: str) -> str:
  return _TEACHER.value or SIZES[size][1]


def contestant(way: str, size: str, n_arms: int, cache: str) -> Contestant:
  """The processes of one way to train n_arms arms."""
  n = min(_WORKERS.value, n_arms) if way in ('processes', 'populations') else 1
  each = {'sequence': 1, 'processes': 1, 'population': n_arms, 'populations': n_arms // n}[way]
  spec = json.dumps([size, each, teacher_of(size), time.time(), cache if way == 'processes' else ''])
  worker = [sys.executable, '-m', 'experiments.bench_population', f'--worker={spec}']
  if n == 1:
    return Contestant((worker, {}))
  kind, devices = places.accelerators()
  pinned = [sys.executable, '-I', '-S', leash.__file__, str(os.getpid())]
  its = places.split(n, kind, devices)
  return Contestant(*(([*pinned, ','.join(map(str, place.cores)), *worker], place.env) for place in its))


def compare(size: str, n_arms: int) -> list[dict[str, Any]]:
  ways = [way for way in (WAYS if n_arms > 1 else WAYS[:2]) if way in _WAYS.value]
  with tempfile.TemporaryDirectory() as cache, closing([]) as contestants:
    if 'processes' in ways:
      contestant('processes', size, n_arms, cache).close()  # the first ones compile, for the cache
    for way in ways:
      contestants.append(contestant(way, size, n_arms, cache))
    turns = take_turns(contestants, _ROUNDS.value, _SECONDS.value)
    rows = [row(way, n_arms, its.facts, answers) for way, its, answers in zip(ways, contestants, turns, strict=True)]
  return [{'size': size, 'teacher': teacher_of(size), **r} for r in rows]


def row(way: str, n_arms: int, facts: list[dict[str, Any]], answers: list[dict[str, float]]) -> dict[str, Any]:
  n, steps = len(facts), _STEPS.value
  # A turn has one answer from each process.
  rate = max(sum(a['steps_per_second'] for a in answers[i : i + n]) for i in range(0, len(answers), n))
  start = max(f['start_seconds'] for f in facts)
  starts = math.ceil(n_arms / n) if way == 'processes' else 1  # one behind the other
  seconds = starts * start + n_arms * steps / rate
  held = sum(f['held'] for f in facts)
  return {
    'way': way,
    'arms': n_arms,
    'held': held,
    'steps_per_second': rate,
    'start_seconds': start,
    'arms_per_hour': 3600 * n_arms / seconds,
    'device': facts[0]['device'],
  }


def table(rows: list[dict[str, Any]]) -> str:
  """One line a way; the last two columns by arms per hour. One run has one teacher a size."""
  head = ('size', 'teacher', 'arms', 'way', 'held', 'steps/s', 'start s', 'arms/hour', 'of sequence', 'of processes')
  lines = [head]
  for r in rows:
    rival = {o['way']: o for o in rows if (o['size'], o['arms']) == (r['size'], r['arms'])}
    of = [f'{r["arms_per_hour"] / rival[w]["arms_per_hour"]:.2f}x' if w in rival else '–' for w in WAYS[:2]]
    speeds = (f'{r[name]:.1f}' for name in ('steps_per_second', 'start_seconds', 'arms_per_hour'))
    lines.append((r['size'], r['teacher'], f'{r["arms"]}', r['way'], f'{r["held"]}', *speeds, *of))
  return columns(lines, right=(2, *range(4, len(head))))


def main(argv: list[str]) -> None:
  if _WORKER.value:
    work(*json.loads(_WORKER.value))
    return
  wrong = [size for size in _SIZES.value if size not in SIZES] + [n for n in _ARMS.value if not n.isdigit() or n == '0']
  wrong += [way for way in _WAYS.value if way not in WAYS]
  wrong += [name for name in [_TEACHER.value] if name not in ('', 'none', *presets())] + argv[1:]
  if wrong:
    allowed = {'sizes': SIZES, 'ways': WAYS, 'arms': ['numbers from 1'], 'teacher': ['none', *presets()]}
    sys.exit(f'error: {wrong}: allowed: ' + '; '.join(f'--{name}: {", ".join(its)}' for name, its in allowed.items()))
  rows: list[dict[str, Any]] = []
  out = Path(_OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  for size in _SIZES.value:
    for n_arms in map(int, _ARMS.value):
      rows += compare(size, n_arms)
      out.write_text(json.dumps({'machine': platform.platform(), 'steps': _STEPS.value, 'rows': rows}, indent=1) + '\n')
      print(f'{size}, {n_arms} arms: measured', flush=True)
  print(f'\n{table(rows)}\n\n{out}')


if __name__ == '__main__':
  commands.show_any_text()
  app.run(main)
