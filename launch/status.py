"""`python -m launch.status WORKDIR [--watch]`: the state of every arm, on any engine, from the result store alone.

--watch redraws it on a terminal; elsewhere it prints the table, a line of totals now and then, and the table again.

    done        finished, and never run again
    running     a process holds the arm's lock; or, where that cannot be seen, something was written of late
    stalled     it was running, and its process is gone, or it has long been quiet: launch again
    damaged     a file of it cannot be trusted, with what mends it
    preempted   stopped with its state saved; launch again, if its engine does not do so by itself
    failed      for good, with the reason: it diverged, a bug, bad input
    blocked     an arm that it builds on is not done
    missing     never started

A lock (`slm_jax.ablate.workdir.lock`) is seen by the machine that holds it only; of an arm on another one, the time of
the last line of metrics.jsonl tells. Nothing is locked or written here, so looking never disturbs a run.
"""

import functools
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from slm_jax import commands, metrics
from slm_jax.ablate import results, table
from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.results import Row
from slm_jax.config import ConfigError, require
from slm_jax.progress import PERIOD, duration

FRESH = 600.0  # seconds after its last sign of life during which an arm on another machine counts as running
QUIET = 120.0  # seconds without a sign of life, of an arm that runs here, that are worth a word
STATES = (
  'running',
  'stalled',
  'failed',
  'damaged',
  'preempted',
  'blocked',
  'missing',
  'done',
)  # what matters most comes first
USAGE = 'usage: python -m launch.status WORKDIR [--watch]'
TAIL = 1 << 16  # bytes of a log that are read
PAUSE, LONGEST = 2.0, 60.0  # seconds between two drawings


class Status(NamedTuple):
  """One arm now."""

  arm_id: str
  name: str
  seed: int | None
  state: str
  note: str  # why, in words
  step: int
  steps: int | None
  loss: float | None  # the last one, in nats per token
  speed: float | None  # tokens a second; of a running arm
  left: float | None  # seconds to its last step at that speed; of a running arm


def read(workdir: Path) -> list[Status]:
  """Every arm of the workdir, in the order of their first launch. ConfigError if a newer version wrote it."""
  now, locks = time.time(), _locks()
  rows = results.read(workdir)
  found = {row.arm_id: _status(workdir, row, now, locks) for row in rows}
  for row in rows:
    if found[row.arm_id].state == 'blocked':
      parents = (found[parent] for parent in row.parents if parent in found)
      note = ', '.join(f'{_label(parent)} is {parent.state}' for parent in parents if parent.state != 'done')
      found[row.arm_id] = found[row.arm_id]._replace(note=note)
  return list(found.values())


def _status(workdir: Path, row: Row, now: float, locks: set[tuple[int, int]] | None) -> Status:
  folder = workdirs.folder(workdir, row.arm_id)
  state, note = _state(folder, row, now, locks)
  lines, damaged = _metrics(folder / 'metrics.jsonl')
  if damaged:
    note = '; '.join(filter(None, [note, f'metrics.jsonl: {damaged} damaged lines are left out']))
  train: dict[str, Any] = next((line for line in lines if line['kind'] == 'train'), {})
  losses = [line['loss'] for line in lines if line.get('loss') is not None]
  steps = row.config.get('train.steps')
  step = lines[0]['step'] if lines else 0
  speed = left = None
  if state == 'running' and train.get('tokens_per_second') and train.get('tokens'):
    speed = train['tokens_per_second'] / row.run.get('population', 1)  # each of n arms is booked 1/n of the time
    left = max(steps - step, 0) * train['tokens'] / max(train['step'], 1) / speed if steps else None
  loss = row.summary.get('loss', losses[0] if losses else None)
  return Status(row.arm_id, row.name, row.config.get('seed'), state, note, step, steps, loss, speed, left)


def _state(folder: Path, row: Row, now: float, locks: set[tuple[int, int]] | None) -> tuple[str, str]:
  """`(state, note)`; the note of a blocked arm is for its caller to add."""
  if row.status == 'done':
    return 'done', ''
  held, holder = _held(folder / 'lock', locks)
  quiet = max(now - max(_modified(folder / name) for name in ('metrics.jsonl', 'run.json', 'lock')), 0.0)
  if held:
    return 'running', f'quiet for {duration(quiet)}' if quiet > QUIET else ''
  if row.status == 'running':
    if held is None and quiet < FRESH:
      return 'running', f'by its last sign of life, {duration(quiet)} ago{f" ({holder})" if holder else ""}'
    return 'stalled', f'quiet for {duration(quiet)}, {f"{holder} is gone" if held is False else holder or "no lock"}'
  if row.status in ('failed', 'diverged', 'damaged'):
    state = 'damaged' if row.status == 'damaged' else 'failed'
    return state, ' '.join(str(row.run.get('error') or 'without a word').split())
  return row.status, ''


# ----------------------------------------------------------------------------------------------------- signs of life


def _held(path: Path, locks: set[tuple[int, int]] | None) -> tuple[bool | None, str]:
  """`(is the lock held? None if that cannot be seen from here, who took it last)`. It is not touched."""
  try:
    text, inode = path.read_text(encoding='utf-8').strip(), path.stat().st_ino
  except (OSError, UnicodeDecodeError):
    return None, ''
  words = re.match(r'process (\d+) on (\S+)', text)
  if not words or words[2] != socket.gethostname():
    return None, words[0] if words else ''
  pid = int(words[1])
  return ((pid, inode) in locks if locks is not None else _lives(pid)), words[0]


def _locks() -> set[tuple[int, int]] | None:
  """`(process, inode)` of every lock on this machine; None where the system does not list them."""
  try:
    lines = Path('/proc/locks').read_text().splitlines()
  except OSError:
    return None
  return {(int(pid), int(inode)) for pid, inode in re.findall(r' (\d+) \w+:\w+:(\d+) ', '\n'.join(lines))}


def _lives(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return True


def _modified(path: Path) -> float:
  try:
    return path.stat().st_mtime
  except OSError:
    return 0.0


def tail(path: Path) -> list[str]:
  """The last lines of a text, of which the first may be cut; none if there is no such file."""
  try:
    with open(path, 'rb') as file:
      file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
      return file.read().decode(errors='replace').splitlines(keepends=True)
  except OSError:
    return []


def _metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
  """`(the last whole lines of a metrics.jsonl, how many damaged ones are among them)`: the last one first.

  As many as tell the last step, loss and speed: a table of a thousand arms is drawn again and again.
  """
  text, lines, damaged = tail(path), list[dict[str, Any]](), 0
  cut = len(text) > 1 and sum(map(len, text)) >= TAIL  # the first of them, perhaps
  for line in reversed(text[cut:]):
    if line.endswith('\n'):
      values, fault = metrics.parse(line)
      lines += [values] if not fault else []
      damaged += bool(fault)
      if any(each['kind'] == 'train' for each in lines) and any(each.get('loss') is not None for each in lines):
        break
  return lines, damaged


# -------------------------------------------------------------------------------------------------------------- text


def show(statuses: Sequence[Status], height: int = 0) -> str:
  """The arms as a table, and their totals. height: at most so many lines, if positive; what matters most stays."""
  shown = statuses
  if height and len(statuses) > height - 4:
    by_weight = sorted(range(len(statuses)), key=lambda i: STATES.index(statuses[i].state))
    shown = [statuses[i] for i in sorted(by_weight[: max(1, height - 5)])]
  rows = [('state', 'arm', 'name', 'seed', 'step', 'loss', 'tokens/s', 'left', '')]
  rows += [
    (
      s.state,
      s.arm_id,
      s.name,
      str(s.seed),
      f'{s.step}/{s.steps}' if s.steps else str(s.step),
      table.number(s.loss, '.4f'),
      table.number(s.speed, ',.0f'),
      '–' if s.left is None else duration(s.left),
      s.note,
    )
    for s in shown
  ]
  more = [f'... and {len(statuses) - len(shown)} more'] if len(shown) < len(statuses) else []
  return '\n'.join([table.columns(rows, right=(3, 4, 5, 6, 7)), *more, '', totals(statuses)])


def totals(statuses: Sequence[Status]) -> str:
  """'8 arms: 2 running, 1 failed, 5 done; 67 % of all steps; 21,000 tokens/s'."""
  states = [s.state for s in statuses]
  parts = [f'{states.count(state)} {state}' for state in STATES if state in states]
  words = [f'{len(statuses)} arms: {", ".join(parts)}']
  steps = sum(s.steps or 0 for s in statuses)
  if steps:
    done = sum((s.steps or 0) if s.state == 'done' else min(s.step, s.steps or 0) for s in statuses)
    words.append(f'{done / steps:.0%} of all steps')
  if any(s.speed for s in statuses):
    words.append(f'{sum(s.speed or 0.0 for s in statuses):,.0f} tokens/s')
  return '; '.join(words)


def _label(status: Status) -> str:
  return f'{status.name} (seed {status.seed})'


class Screen:
  """A text at the bottom of a terminal that is drawn over and over, with lines of events above it."""

  def __init__(self, file: TextIO):
    self._file, self._lines = file, 0

  def draw(self, text: str) -> None:
    width = shutil.get_terminal_size().columns
    lines = [line[: width - 1] for line in text.split('\n')]
    self._write('\n'.join(lines))
    self._lines = len(lines)

  def say(self, line: str) -> None:
    self._write(line)
    self._lines = 0

  def _write(self, text: str) -> None:
    up = f'\x1b[{self._lines}A' if self._lines else ''
    self._file.write(f'{up}\r\x1b[J{text}\n')  # to where it begins, and clear from there
    self._file.flush()


class Live:
  """The table of some arms on a screen, drawn again when it is worth it: reading may take a tenth of the time."""

  def __init__(self, screen: Screen, workdir: Path, arm_ids: Iterable[str] = ()):
    self._screen, self._workdir, self._chosen = screen, workdir, frozenset(arm_ids)
    self._next = 0.0

  def look(self) -> list[Status] | None:
    """What it shows now, if it was drawn."""
    began = time.monotonic()
    if began < self._next:
      return None
    found = [s for s in read(self._workdir) if not self._chosen or s.arm_id in self._chosen]
    self._screen.draw(show(found, shutil.get_terminal_size().lines - 1))  # the cursor is below it
    now = time.monotonic()
    self._next = now + min(max(PAUSE, 9 * (now - began)), LONGEST)
    return found


class Lines:
  """The totals of some arms, a line now and then: what `Live` is without a terminal."""

  def __init__(self, say: Callable[[str], object], workdir: Path, arm_ids: Iterable[str] = ()):
    self._say, self._workdir, self._chosen = say, workdir, frozenset(arm_ids)
    self._next, self._said = time.monotonic() + PERIOD, ''

  def look(self) -> list[Status] | None:
    """What it shows now, if it is time."""
    if time.monotonic() < self._next:
      return None
    found = [s for s in read(self._workdir) if not self._chosen or s.arm_id in self._chosen]
    self._next = time.monotonic() + PERIOD
    if (line := totals(found)) != self._said:
      self._say(line)
      self._said = line
    return found


# ----------------------------------------------------------------------------------------------------------- command


def main(argv: Sequence[str]) -> int:
  commands.show_any_text()
  if '--help' in argv:
    print(USAGE)
    return 0
  try:
    folders = [argument for argument in argv if argument != '--watch']
    known = len(folders) == 1 and not folders[0].startswith('-')
    require(known, f'{USAGE}; got: {" ".join(argv) or "nothing"}')
    workdir, watch = Path(folders[0]), '--watch' in argv
    workdirs.check_arms(workdir)
    if watch and sys.stdout.isatty():
      _watch(Live(Screen(sys.stdout), workdir))
      return 0
    print(show(read(workdir)), flush=True)
    if watch:
      _watch(Lines(functools.partial(print, flush=True), workdir))
      print(show(read(workdir)))
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    pass
  return 0


def _watch(live: Live | Lines) -> None:
  """Until Ctrl-C, or nothing is left that could go on by itself."""
  ends = {'done', 'failed', 'blocked'}
  while not (found := live.look()) or any(s.state not in ends for s in found):
    time.sleep(0.2)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
