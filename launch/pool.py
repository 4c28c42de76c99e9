"""Workers as processes of this machine, a few at a time, each pinned to a place; what ends early is started again.

    waiting -> running -> done
       ^          |   \\-> failed   (exit code 1, or ended too often: what builds on it is blocked, the others go on)
       \\----------/                (exit code 42, or a signal: again, after a pause)

Workers share nothing with the pool but the result store: any of them, and the pool itself, may be killed at any time.
"""

import contextlib
import datetime
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch import leash, status
from launch.places import Place
from launch.plan import Plan, Unit
from launch.worker import outcome
from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.arms import Arm
from slm_jax.preempt import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED
from slm_jax.run_files import read_run

PAUSE = 0.1  # seconds between two looks at the workers
PATIENCE = 60.0  # seconds, at most, before a worker is started again


class Worker(NamedTuple):
  unit: Unit
  place: Place
  process: subprocess.Popen
  began: float  # time.time()


def run(
  plan: Plan,
  units: Sequence[Unit],
  places: Sequence[Place],
  *,
  restarts: int,
  fail_fast: bool = False,
  admit: Callable[[Arm], str] = lambda arm: '',
  say: Callable[[str], None] = print,
  look: Callable[[], object] = lambda: None,
) -> int:
  """Runs the units, one at each place; returns 0 if all arms are done in the end, 42 if asked to stop, else 1.

  restarts: how often one unit is started again. admit: see `worker.run_arms`. look: called between two looks at the
  workers. SIGTERM or Ctrl-C: all workers save and end. A second one kills them.
  """
  pool = Pool(plan, units, places, restarts, say)
  with asked_to_stop() as asked:
    try:
      while pool.running or (pool.waiting and not pool.closed):
        if asked:
          pool.close('stopping: the workers save what they have; once more to kill them')
          pool.signal(signal.SIGKILL if len(asked) > 1 else signal.SIGTERM)
        pool.collect()
        if fail_fast and pool.failed and not asked:
          pool.close('stopping: an arm failed, and --fail_fast')
          pool.signal(signal.SIGTERM)
        pool.start(admit)
        look()
        time.sleep(PAUSE)
    finally:  # none is left, whatever happened here
      pool.signal(signal.SIGKILL)
  if asked:
    say('stopped; launch again to go on from here')
    return EXIT_PREEMPTED
  return EXIT_DONE if all(plan.is_finished(arm.arm_id) for arm in plan.arms) else EXIT_FAILED


class Pool:
  """The state of a pool: which units wait, run, and have failed."""

  def __init__(
    self, plan: Plan, units: Sequence[Unit], places: Sequence[Place], restarts: int, say: Callable[[str], None]
  ):
    self._plan, self._restarts, self._say = plan, restarts, say
    self._arms = {arm.arm_id: arm for arm in plan.arms}
    self._numbers = {unit.name: f'{i}/{len(units)}' for i, unit in enumerate(units, 1)}
    self._ended: set[str] = set()  # names of units, done or failed
    self._again: dict[str, tuple[int, float]] = {}  # {unit: (starts after the first, not before)}
    self._free = list(places)
    self._told: set[tuple[int, int]] = set()  # (process, signal)
    self.waiting, self.running = list(units), list[Worker]()
    self.failed, self.closed = False, False

  # ---- starting

  def start(self, admit: Callable[[Arm], str]) -> None:
    """Starts what can be started; units of which nothing ever can have ended."""
    for unit in [unit for unit in self.waiting if self._ended.issuperset(unit.after)]:
      arms = self._to_run(unit)
      if not arms:
        self.waiting.remove(unit)
        self._end(unit)
      elif self._free and not self.closed and time.monotonic() >= self._again.get(unit.name, (0, 0.0))[1]:
        if refusal := admit(self._arms[arms[0]]):
          self.close(f'no more arms are started: {refusal}')
          break
        self.waiting.remove(unit)
        self._start(unit, arms)

  def _to_run(self, unit: Unit) -> list[str]:
    """Its arms that are not finished, and do not build on one that is not done."""
    return [arm_id for arm_id in unit.arms if not self._is_finished(arm_id) and not self._blockers(arm_id)]

  def _start(self, unit: Unit, arms: Sequence[str]) -> None:
    place = self._free.pop(0)
    command = [sys.executable, *self._plan.argv(*arms)[1:], '--distributed=off']
    cores = ','.join(map(str, place.cores))
    self._log(unit, f'started on {place}: {shlex.join(command)}')
    with workdirs.writing(self._log_file(unit)), open(self._log_file(unit), 'ab') as log:
      process = subprocess.Popen(
        [sys.executable, '-I', '-S', leash.__file__, str(os.getpid()), cores, *command],
        env={**os.environ, **place.env, 'PYTHONUNBUFFERED': '1'},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        process_group=0,  # Ctrl-C is the pool's business
      )
    self.running.append(Worker(unit, place, process, time.time()))
    self._say(f'{self._title(unit)}: starts on {place}')

  # ---- ending

  def collect(self) -> None:
    """Sees to the workers that have ended."""
    for worker in [worker for worker in self.running if worker.process.poll() is not None]:
      unit, code = worker.unit, worker.process.returncode
      self.running.remove(worker)
      self._free.append(worker.place)
      self._log(unit, f'ended: {_shown(code)}')
      starts = self._again.get(unit.name, (0, 0.0))[0]
      if code in (EXIT_DONE, EXIT_FAILED, 2) or not self._to_run(unit):  # 2: of Python, called wrongly
        self._end(unit, worker)
      elif self.closed:
        self._say(f'{self._title(unit)}: {_shown(code)}')
      elif starts >= self._restarts:
        self._end(unit, worker, f'{_shown(code)}, {starts + 1} times')
      else:
        self._again[unit.name] = starts + 1, time.monotonic() + min(PATIENCE, 0.1 * 2**starts)
        self.waiting.insert(0, unit)
        self._say(f'{self._title(unit)}: {_shown(code)}; starts again ({starts + 1} of {self._restarts})')

  def _end(self, unit: Unit, worker: Worker | None = None, reason: str = '') -> None:
    """Says what became of each of its arms."""
    self._ended.add(unit.name)
    for arm in (self._arms[arm_id] for arm_id in unit.arms):
      if self._is_finished(arm.arm_id):
        words = outcome(self._plan.workdir, arm, EXIT_DONE)
      elif blockers := self._blockers(arm.arm_id):
        words = f'blocked, {", ".join(blockers)} is not done'
      else:
        self.failed = True
        log = self._log_file(unit)
        words = f'failed ({reason or worker and why(self._plan.workdir, arm, worker.began, log)}); see {log}'
      self._say(f'[{self._numbers[unit.name]}] {arm.title}: {words}')

  def close(self, reason: str) -> None:
    """Nothing is started from now on."""
    if not self.closed:
      self._say(reason)
    self.closed = True

  def signal(self, number: int) -> None:
    """Sends a signal to every worker, once; SIGKILL to whatever it has started too, and waits for its end."""
    for worker in self.running:
      if (worker.process.pid, number) not in self._told and worker.process.poll() is None:
        self._told.add((worker.process.pid, number))
        if number != signal.SIGKILL:
          worker.process.send_signal(number)
          continue
        os.killpg(worker.process.pid, number)
        worker.process.wait()

  # ---- what it goes by

  def _is_finished(self, arm_id: str) -> bool:
    return self._plan.is_finished(arm_id)

  def _blockers(self, arm_id: str) -> list[str]:
    """What the arm still needs. One that is done needs nothing: it is only evaluated."""
    parents = () if self._plan.is_done(arm_id) else dict.fromkeys(self._arms[arm_id].parents.values())
    return [parent for parent in parents if not self._plan.is_done(parent)]

  def _title(self, unit: Unit) -> str:
    one = self._arms[unit.arms[0]].title
    return f'[{self._numbers[unit.name]}] {one if len(unit.arms) == 1 else f"{unit.name} ({len(unit.arms)} arms)"}'

  def _log_file(self, unit: Unit) -> Path:
    return self._plan.workdir / 'logs' / f'{unit.name}.log'

  def _log(self, unit: Unit, words: str) -> None:
    path = self._log_file(unit)
    with workdirs.writing(path):
      path.parent.mkdir(exist_ok=True)
      with open(path, 'a', encoding='utf-8', errors='backslashreplace') as log:
        log.write(f'[{datetime.datetime.now().astimezone().isoformat(timespec="seconds")}] {words}\n')


def why(workdir: Path, arm: Arm, began: float, log: Path) -> str:
  """Why an arm failed: what run.json says, if this worker wrote it, else the last thing that the log has."""
  folder = workdirs.folder(workdir, arm.arm_id)
  path, error = folder / 'run.json', read_run(folder)[0].get('error')
  if error and path.stat().st_mtime >= began:
    return ' '.join(str(error).split())
  for line in map(str.strip, reversed(status.tail(log))):
    if '] started on ' in line:
      break
    if line and '] ended: ' not in line and arm.arm_id not in line:  # neither the pool's words nor the worker's
      return line
  return 'without a word'


@contextlib.contextmanager
def asked_to_stop() -> Iterator[list[int]]:
  """The signals of this kind that came since."""
  seen: list[int] = []

  def note(number: int, frame: Any) -> None:
    seen.append(number)

  before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield seen
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _shown(code: int) -> str:
  """What an exit code of subprocess means."""
  if code < 0:
    with contextlib.suppress(ValueError):
      return f'ended by {signal.Signals(-code).name}'
  return 'preempted, with everything saved' if code == EXIT_PREEMPTED else f'exit code {code}'
