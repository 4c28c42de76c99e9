"""What stands where in WORKDIR.

experiment.json       which experiment this is, and every arm that was ever launched here: `Experiment`
arms/<arm_id>/        one run: config.json, run.json, metrics.jsonl, lost.json, samples.json, checkpoints/, model/, DONE
results.csv  report.html  plots/
lock                  held by the launch at work here; each arm's folder has one too
.experiment.lock      held for the moment in which experiment.json is changed
"""

import contextlib
import datetime
import fcntl
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Required, TypedDict

from slm_jax import schema
from slm_jax.config import ConfigError, require
from slm_jax.files import DamagedFile, read_json, warn_once, write_json

FORMAT = 1


class Experiment(NamedTuple):
  """experiment.json: what the launches of a workdir leave for its reports."""

  name: str
  question: str = ''  # the docstring of the experiment file
  baseline: str = ''  # name of the arm that others are compared with
  answer: str = ''  # what the experiment's own report(rows) said
  latest: tuple[str, ...] = ()  # arm ids of the latest launch
  arms: Mapping[str, Mapping[str, Any]] = {}  # {arm id: {name, group, parents, diff, command}}, first launched first


class _Entry(TypedDict, total=False):
  """An arm in experiment.json."""

  arm_id: Required[str]
  name: str
  group: str
  parents: list[str]
  diff: dict[str, list[Any]]
  command: str


def folder(workdir: Path, arm_id: str) -> Path:
  return workdir / 'arms' / arm_id


def is_done(workdir: Path, arm_id: str) -> bool:
  return (folder(workdir, arm_id) / 'DONE').exists()


def read_experiment(workdir: Path) -> Experiment | None:
  """What experiment.json says; None where there is none. DamagedFile, or ConfigError for a newer version."""
  path = workdir / 'experiment.json'
  values, fault = read_json(path)
  if values is None and not fault:
    return None
  values = values or {}
  written = values.pop('format', None)
  newer = isinstance(written, int) and written > FORMAT
  require(not newer, f'{path}: format {written}, written by a newer version (this one knows {FORMAT})')
  fault = fault or ('' if written else 'format is missing') or schema.fault(values.get('arms'), list[_Entry], 'arms')
  if not fault:
    values['arms'] = {entry.pop('arm_id'): entry for entry in values['arms']}
    fault = _fault(values)
  if fault:
    raise DamagedFile(f'{path}: damaged ({fault}); move it away and launch again: the arms and their results stay')
  return Experiment(**{**values, 'latest': tuple(values.get('latest', ()))})


def _fault(values: Mapping[str, Any]) -> str:
  """Says what is wrong with the entries of experiment.json; '' if nothing is."""
  unknown = sorted(values.keys() - set(Experiment._fields))
  if unknown or 'name' not in values:
    return f'{unknown[0]}: unknown' if unknown else 'name is missing'
  if fault := schema.fault(dict(values), Experiment):
    return fault
  arms = values['arms']
  strange = [arm_id for arm_id in arms if arm_id in ('', '.', '..') or not arm_id.isprintable() or '/' in arm_id]
  lost = [arm_id for arm_id in values.get('latest', ()) if arm_id not in arms]
  odd = [key for entry in arms.values() for key, pair in entry.get('diff', {}).items() if len(pair) != 2]
  faults = [f'{arm_id!r} is no id of an arm' for arm_id in strange[:1] + lost[:1]]
  return next(iter([*faults, *(f'diff.{key}: expected two values' for key in odd[:1])]), '')


def known_experiment(workdir: Path) -> Experiment | None:
  """`read_experiment` for who only looks: None for a damaged file, with a warning. ConfigError for a newer version."""
  try:
    return read_experiment(workdir)
  except DamagedFile as error:
    warn_once(str(error))
    return None


def write_experiment(workdir: Path, experiment: Experiment) -> None:
  values = experiment._asdict()
  # A list keeps the order of the arms, which a JSON object with sorted keys does not.
  values['arms'] = [{'arm_id': arm_id, **entry} for arm_id, entry in experiment.arms.items()]
  write_json(workdir / 'experiment.json', {'format': FORMAT, **values})


def check_workdir(workdir: Path, name: str) -> None:
  """ConfigError if `workdir` cannot be this experiment's."""
  require(
    '://' not in str(workdir) and ':/' not in str(workdir), f'--workdir={workdir}: only local folders can be used'
  )
  with writing(workdir):
    require(workdir.is_dir() or not workdir.exists(), f'--workdir={workdir}: is not a folder')
    found = read_experiment(workdir)
  require(
    found is None or found.name == name,
    f'--workdir={workdir}: holds the experiment {found and found.name!r}, this is {name!r}; choose another folder',
  )


def check_arms(workdir: Path) -> None:
  """ConfigError if no experiment was ever launched there."""
  with writing(workdir):
    require((workdir / 'arms').is_dir(), f'{workdir}: no arms there; expected the --workdir of an experiment')


@contextlib.contextmanager
def lock(where: Path) -> Iterator[None]:
  """Holds `where`/lock, or ConfigError that names who does. The kernel drops it when the process ends, however."""
  with writing(where):
    where.mkdir(parents=True, exist_ok=True)
    file = open(where / 'lock', 'a+', encoding='utf-8')  # noqa: SIM115  held until the end of the block
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise ConfigError(
        f'{where}: another launch is at work here ({file.read().strip() or "it just started"})'
      ) from None
    file.truncate(0)
    now = datetime.datetime.now().astimezone().isoformat(timespec='seconds')
    file.write(f'process {os.getpid()} on {socket.gethostname()} since {now}\n')
    file.flush()
    yield


@contextlib.contextmanager
def recording(workdir: Path) -> Iterator[None]:
  """Holds experiment.json while it is read, changed and written. Others wait, for it takes a moment.

  Workers that start together all want their arms to be in it; `lock`, which a launch holds to its end, would refuse
  all but one of them.
  """
  with writing(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / '.experiment.lock', 'a', encoding='utf-8') as file:
      fcntl.flock(file, fcntl.LOCK_EX)
      yield


@contextlib.contextmanager
def writing(where: Path) -> Iterator[None]:
  """Turns the system's refusal (disk full, no permission) into one line."""
  try:
    yield
  except OSError as error:
    raise ConfigError(f'{error.filename or where}: {error.strerror or error}') from error
