"""The crash campaign: real sweeps whose processes get signals at random moments, and the same numbers in the end.

    python -m tests.survive [--kills=200] [--seed=0] [--workdir=DIR]

Each sweep is launched again until it ends by itself, and is then compared with one that was left alone: every line of
every metrics.jsonl but its times, the final parameters and the results. One that lost a step, took one twice or differs
in a bit is named, its folder stays, and the exit code is 1.
"""

import argparse
import collections
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import cheap  # noqa: E402

from slm_jax import metrics  # noqa: E402
from slm_jax.ablate import workdir as workdirs  # noqa: E402
from slm_jax.run_files import read_run  # noqa: E402

TIMES = ('seconds', 'tokens_per_second', 'mfu', 'joules')  # the only metrics that may differ
RESULTS = ('loss', 'bits_per_byte', 'accuracy', 'held_out', 'tokens', 'bytes', 'flops', 'parent_flops', 'parameters')
STEPS, EVERY = 60, 20
NAMES = ['parent', 'x0.5', 'x1', 'x2', 'x4', 'alone1', 'alone2', 'alone3']
OTHER_TEXT = '--config.eval.bytes=900'

EXPERIMENT = f'''
"""Does a sweep survive?"""
import dataclasses

import launch
import tiny
from slm_jax.experiment import EvalConfig


def config():
  base = tiny.config({STEPS})
  model, rarely = dataclasses.replace(base.model, n_layers=1), EvalConfig(every={EVERY}, bytes=500, samples=0)
  run = dataclasses.replace(base.run, checkpoint_every=10, population=False)  # populations: equal but for rounding
  return dataclasses.replace(base, name='', model=model, transforms=(), eval=rarely, run=run)


def sweep():
  yield {{'name': 'parent'}}
  for factor in (0.5, 1, 2, 4):
    yield {{'name': f'x{{factor}}', 'init.arm': 'parent', 'optim.learning_rate': 1e-3 * factor}}
  for seed in (1, 2, 3):
    yield {{'name': f'alone{{seed}}', 'seed': seed}}


if __name__ == '__main__':
  launch.main()
'''


# ------------------------------------------------------------------------------------------------------------- launches


def start(folder: Path, *argv: str) -> 'subprocess.Popen[str]':
  """Starts a launch of the experiment in `folder`."""
  if not (folder / 'survive.py').exists():
    (folder / 'survive.py').write_text(EXPERIMENT)
  paths = os.pathsep.join(map(str, (HERE.parent, HERE)))
  env = {**os.environ, 'PYTHONPATH': paths, 'XLA_FLAGS': cheap.flags(1), 'JAX_PLATFORMS': 'cpu'}
  command = [sys.executable, 'survive.py', *argv]
  return subprocess.Popen(
    command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
  )


def undisturbed(folder: Path) -> Path:
  """The workdir of a sweep that was left alone."""
  process = start(folder, '--workdir=whole', '--local_workers=2')
  out, _ = process.communicate(timeout=500)
  assert process.returncode == 0, out
  return folder / 'whole'


def fresh(whole: Path, name: str) -> Path:
  """A workdir of that name with the data and the compiled programs already there: compiling again tests nothing."""
  workdir = whole.parent / name
  for part in ('data', 'cache'):
    shutil.copytree(whole / part, workdir / part)
  return workdir


def workers(launcher: 'subprocess.Popen[str]') -> list[int]:
  """The processes that a launcher has started and that still run."""
  try:
    children = Path(f'/proc/{launcher.pid}/task/{launcher.pid}/children').read_text().split()
  except OSError:
    return []
  return [int(child) for child in children if alive(int(child))]


def alive(process: int) -> bool:
  try:
    return Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[0] not in 'ZX'
  except OSError:
    return False


# -------------------------------------------------------------------------------------------------------- what is left


def results(workdir: Path) -> dict[str, tuple[list[dict[str, Any]], Any, dict[str, Any]]]:
  """`{name: (metrics without times, checksum of the parameters, results)}` of arms that are done."""
  found = {}
  experiment = workdirs.read_experiment(workdir)
  assert experiment is not None
  for arm_id, arm in experiment.arms.items():
    folder = workdirs.folder(workdir, arm_id)
    assert (folder / 'DONE').exists(), f'{arm["name"]} is not done'
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in metrics.read(folder / 'metrics.jsonl')]
    summary = {name: read_run(folder)[0]['summary'].get(name) for name in RESULTS}
    found[arm['name']] = lines, json.loads((folder / 'model' / 'model.json').read_text())['checksum'], summary
  return found


def assert_nothing_lost_and_nothing_twice(workdir: Path, whole: Path, names: Sequence[str]) -> None:
  found, expected = results(workdir), results(whole)
  assert list(found) == list(names), f'arms {", ".join(found)}'
  for name, (lines, _, _) in found.items():
    steps = [line['step'] for line in lines if line['kind'] == 'train']
    assert steps == list(range(1, STEPS + 1)), f'{name}: its steps are {steps}'
    evaluated = [line['step'] for line in lines if line['kind'] == 'eval']
    assert evaluated == [line['step'] for line in expected[name][0] if line['kind'] == 'eval'], f'{name}: {evaluated}'
    for what, own, theirs in zip(('metrics', 'parameters', 'results'), found[name], expected[name], strict=True):
      assert own == theirs, f'{name}: other {what}'


# --------------------------------------------------------------------------------------------------------- the signals


def kill_at_random(
  launcher: 'subprocess.Popen[str]',
  at_most: int,
  longest: float,
  rng: random.Random,
  number: signal.Signals = signal.SIGKILL,
) -> int:
  """Sends workers of a launch a signal until it ends, each after at most `longest` seconds of life; how many got it."""
  deaths: dict[int, float] = {}
  killed: set[int] = set()
  while launcher.poll() is None and len(killed) < at_most:
    for process in set(workers(launcher)) - killed:
      deaths.setdefault(process, time.monotonic() + rng.uniform(0.02, 1.0) * longest)
      if time.monotonic() > deaths[process] and len(killed) < at_most:
        os.kill(process, number)
        killed.add(process)
    time.sleep(0.02)
  return len(killed)


class Case(NamedTuple):
  """What gets which signal."""

  title: str
  number: signal.Signals
  to: str  # 'workers': each of them; 'launcher'
  argv: tuple[str, ...] = ('--local_workers=2', '--local_restarts=1000')
  evaluated: bool = False  # whether the arms are done, and are only evaluated again


ALONE = ('--local_workers=1',)  # the launcher trains in its own process
CASES = [
  *(Case(f'workers, {s.name}', s, 'workers') for s in (signal.SIGKILL, signal.SIGTERM)),
  *(Case(f'launcher, {s.name}', s, 'launcher') for s in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)),
  *(Case(f'one process, {s.name}', s, 'launcher', ALONE) for s in (signal.SIGKILL, signal.SIGTERM)),
  Case('evaluated again, SIGKILL', signal.SIGKILL, 'launcher', (*ALONE, OTHER_TEXT), evaluated=True),
]


class Count(NamedTuple):
  """What became of the sweeps of a case."""

  signals: int = 0
  launches: int = 0
  sweeps: int = 0
  identical: int = 0
  faults: tuple[str, ...] = ()


def disturb(case: Case, workdir: Path, life: float, most: int, rng: random.Random) -> tuple[int, int]:
  """Launches a sweep until it ends by itself; at most so many signals. `(signals that met a process, launches)`."""
  sent = 0
  for launches in itertools.count(1):
    process = start(workdir.parent, f'--workdir={workdir.name}', *case.argv)
    try:
      if case.to == 'workers':
        sent += kill_at_random(process, most - sent, 0.7 * life, rng, case.number)
      elif sent < most:
        try:
          process.wait(timeout=rng.uniform(0.02, 1.0) * life)
        except subprocess.TimeoutExpired:
          process.send_signal(case.number)
          sent += 1
      out, _ = process.communicate(timeout=600)
    finally:
      process.kill()
    if process.returncode == 0:
      return sent, launches
    assert process.returncode in (42, -case.number), f'exit code {process.returncode}: {out[-2000:]}'
  raise AssertionError('unreachable')


def campaign(folder: Path, kills: int, seed: int, say: Callable[[str], None]) -> dict[str, Count]:
  """Sends at least so many signals, in turns to the cases; `{title: what became of it}`."""
  rng = random.Random(seed)
  say('a sweep that is left alone ...')
  began = time.monotonic()
  whole = undisturbed(folder)
  lives = {'workers': (time.monotonic() - began) / 4, 'launcher': time.monotonic() - began}
  evaluated = shutil.copytree(whole, folder / 'evaluated')
  began = time.monotonic()
  process = start(folder, '--workdir=evaluated', *ALONE, OTHER_TEXT)
  assert process.wait(timeout=500) == 0
  again = time.monotonic() - began
  counts: dict[str, Count] = collections.defaultdict(Count)
  for turn, case in enumerate(itertools.cycle(CASES)):
    left = kills - sum(count.signals for count in counts.values())
    if left <= 0:
      return counts
    workdir = shutil.copytree(whole, folder / f'sweep{turn}') if case.evaluated else fresh(whole, f'sweep{turn}')
    before = counts[case.title]
    fault, sent, launches = '', 0, 0
    try:
      life = again if case.evaluated else lives[case.to]
      sent, launches = disturb(case, workdir, life, min(left, 12), rng)
      assert_nothing_lost_and_nothing_twice(workdir, evaluated if case.evaluated else whole, NAMES)
    except AssertionError as error:
      fault = f'{workdir}: {" ".join(str(error).split())[:500]}'
    counts[case.title] = Count(
      before.signals + sent,
      before.launches + launches,
      before.sweeps + 1,
      before.identical + (not fault),
      (*before.faults, *([fault] if fault else [])),
    )
    say(f'{case.title}: {sent} signals, {launches} launches: {fault or "identical"}; {max(left - sent, 0)} left')
    if not fault:
      shutil.rmtree(workdir)
  raise AssertionError('unreachable')


def table(counts: dict[str, Count]) -> Iterator[str]:
  form = '{:<26} {:>8} {:>9} {:>7} {:>10}'
  yield form.format('', 'signals', 'launches', 'sweeps', 'identical')
  total = [sum(column) for column in zip(*(count[:4] for count in counts.values()), strict=True)]
  for title, count in counts.items():
    yield form.format(title, *count[:4])
  yield form.format('in all', *total)
  for count in counts.values():
    yield from count.faults


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--kills', type=int, default=200, help='signals, in all')
  parser.add_argument('--seed', type=int, default=0, help='of their moments')
  parser.add_argument('--workdir', help='an empty folder; a temporary one unless given')
  options = parser.parse_args()
  if options.kills < 1:
    parser.error(f'--kills={options.kills}: must be positive')
  folder = Path(options.workdir or tempfile.mkdtemp(prefix='survive-')).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  if any(folder.iterdir()):
    parser.error(f'--workdir={options.workdir}: is not empty')
  counts = campaign(folder, options.kills, options.seed, lambda line: print(line, flush=True))
  print('\n'.join(['', *table(counts)]))
  faults = any(count.faults for count in counts.values())
  if not faults:
    shutil.rmtree(folder)
  return 1 if faults else 0


if __name__ == '__main__':
  sys.exit(main())
