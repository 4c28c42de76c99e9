"""What stands where in WORKDIR.

experiment.json       which experiment this is, and every arm that was ever launched here: `Experiment`
arms/<arm_id>/        one run: config.json, run.json, metrics.jsonl, lost.json, samples.json, checkpoints/, model/, DONE
code/<digest>/        the experiment's own files as they were at a launch; run.json of an arm says which
replaced/             folders of arms that --rerun made again
reports/<key>.html    a report for every launch; index.html lists them, report.html is that of the latest whole sweep
plots/<key>/          its plots as files
results.csv           every arm
lock                  held by the launch at work here; each arm's folder has one too
.experiment.lock      held for the moment in which experiment.json is changed
"""

import contextlib
import datetime
import fcntl
import os
import socket
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Required, TypedDict

from slm_jax import revision, schema
from slm_jax.config import ConfigError, require, to_dict
from slm_jax.files import DamagedFile, read_json, warn_once, write_bytes, write_json
from slm_jax.run_files import Count, read_config

if TYPE_CHECKING:
  from slm_jax.experiment import EvalConfig

KEY_LETTERS = set(string.ascii_lowercase + string.digits + '-')
FORMAT = 2  # 1: an arm's id was a hash of all its settings (adopt.py)


class Launch(NamedTuple):
  """One launch: the arms that it was about, and what they answered. Launches of the same arms are one."""

  key: str  # names its report: reports/<key>.html
  arms: tuple[str, ...] = ()  # ids
  whole: bool = True  # whether these are all arms of a sweep
  asked: str = ''  # the part of the command line that chose them
  when: str = ''  # the last time, ISO 8601
  question: str = ''  # the docstring of the experiment file
  baseline: str = ''  # name of the arm that others are compared with
  code: str = ''  # digest of the experiment's own files
  answer: str = ''  # the text that the experiment's own report(rows) returned
  claims: tuple[Mapping[str, str], ...] = ()  # what it claimed, with verdicts: fields of `claims.Decided`


class Experiment(NamedTuple):
  """experiment.json: what the launches of a workdir leave for its reports."""

  name: str
  launches: tuple[Launch, ...] = ()  # the latest one last
  arms: Mapping[str, Mapping[str, Any]] = {}  # {arm id: {name, group, parents, diff, command}}, first launched first

  @property
  def latest(self) -> Launch:
    """The launch to report on: of `results.read`'s rows, if there was none."""
    return self.launches[-1] if self.launches else Launch('', tuple(self.arms))

  def with_launch(self, launch: Launch) -> 'Experiment':
    """With a launch as the latest one, in place of an earlier one of its key."""
    others = tuple(other for other in self.launches if other.key != launch.key)
    return self._replace(launches=(*others, launch))


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


def is_evaluated(workdir: Path, arm_id: str, asked: 'EvalConfig') -> bool:
  """Whether an arm that is done was evaluated as is asked for now. `every` does not count: it is of the way there."""
  wanted, default = ({f'eval.{k}': v for k, v in to_dict(its).items()} for its in (asked, type(asked)()))
  config, _ = read_config(folder(workdir, arm_id))
  recorded = {key: value for key, value in config.items() if key.startswith('eval.')}
  return not recorded or {**default, **recorded, 'eval.every': asked.every} == wanted


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
  fault = fault or schema.fault(written, Count, 'format') or schema.fault(values.get('arms'), list[_Entry], 'arms')
  if not fault:
    values['arms'] = {entry.pop('arm_id'): entry for entry in values['arms']}
    values = values if written > 1 else _of_format_1(values)
    fault = _fault(values)
  if fault:
    raise DamagedFile(f'{path}: damaged ({fault}); move it away and launch again: the arms and their results stay')
  return Experiment(values['name'], tuple(map(_launch, values.get('launches', ()))), values['arms'])


def _fault(values: Mapping[str, Any]) -> str:
  """Says what is wrong with the entries of experiment.json; '' if nothing is."""
  unknown = sorted(values.keys() - set(Experiment._fields))
  if unknown or 'name' not in values:
    return f'{unknown[0]}: unknown' if unknown else 'name is missing'
  if fault := schema.fault(dict(values), Experiment):
    return fault
  arms, launches = values['arms'], values.get('launches', ())
  unknown = sorted({key for launch in launches for key in launch} - set(Launch._fields))
  strange = [arm_id for arm_id in arms if arm_id in ('', '.', '..') or not arm_id.isprintable() or '/' in arm_id]
  lost = [arm_id for launch in launches for arm_id in launch.get('arms', ()) if arm_id not in arms]
  odd = [key for entry in arms.values() for key, pair in entry.get('diff', {}).items() if len(pair) != 2]
  keys = [launch.get('key', '') for launch in launches]
  faults = [f'launches: {key}: unknown' for key in unknown[:1]] + [
    f'{key!r} is no key of a launch' for key in keys if not key or not set(key) <= KEY_LETTERS
  ]
  faults += [f'{arm_id!r} is no id of an arm' for arm_id in strange[:1] + lost[:1]]
  return next(iter([*faults, *(f'diff.{key}: expected two values' for key in odd[:1])]), '')


def known_experiment(workdir: Path) -> Experiment | None:
  """`read_experiment` for who only looks: None for a damaged file, with a warning. ConfigError for a newer version."""
  try:
    return read_experiment(workdir)
  except DamagedFile as error:
    warn_once(str(error))
    return None


def _launch(values: Mapping[str, Any]) -> Launch:
  return Launch(**{**values, 'arms': tuple(values.get('arms', ())), 'claims': tuple(values.get('claims', ()))})


def _of_format_1(values: Mapping[str, Any]) -> dict[str, Any]:
  """The entries of a file of format 1, which knew the latest launch only."""
  launch = {'key': 'format-1'} | {key: values[key] for key in ('question', 'baseline', 'answer') if key in values}
  rest = {key: value for key, value in values.items() if key not in ('question', 'baseline', 'answer', 'latest')}
  return {**rest, 'launches': [{**launch, 'arms': values.get('latest', [])}]}


def write_experiment(workdir: Path, experiment: Experiment) -> None:
  values: dict[str, Any] = {'name': experiment.name, 'launches': [each._asdict() for each in experiment.launches]}
  # A list keeps the order of the arms, which a JSON object with sorted keys does not.
  values['arms'] = [{'arm_id': arm_id, **entry} for arm_id, entry in experiment.arms.items()]
  write_json(workdir / 'experiment.json', {'format': FORMAT, **values})


def keep_code(workdir: Path, files: Mapping[str, Path]) -> None:
  """Copies the experiment's own files to code/<digest>/, unless that copy exists."""
  copy = workdir / 'code' / revision.digest(revision.hash_files(files))
  for name, path in files.items():
    if not (copy / name).exists():
      write_bytes(copy / name, path.read_bytes())


def set_aside(workdir: Path, arm_id: str) -> Path:
  """Moves an arm's folder to replaced/, so that the arm can be made again. Returns the new place."""
  target = workdir / 'replaced' / arm_id
  while target.exists():
    target = target.with_name(f'{target.name}+')
  target.parent.mkdir(exist_ok=True)
  os.rename(folder(workdir, arm_id), target)
  return target


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
