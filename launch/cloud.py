"""What the engines of clouds have in common: tools that are called, a folder that all machines mount, code to send.

A worker elsewhere needs the code, its data and the workdir. The workdir (and data files) must be on a share that is
mounted at the same path here and there: results appear here as they are written there, nothing is copied back, and a
path in a command means the same everywhere. Locks, appended lines and atomic renames are what "nothing is lost" is made
of, so the share must have them: NFS has (a Filestore instance, say); a bucket mounted by gcsfuse has not.
"""

import gzip
import hashlib
import io
import os
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import slm_jax
from launch.plan import Plan, Unit
from slm_jax.ablate import workdir as workdirs
from slm_jax.config import require
from slm_jax.run_files import read_run

MOST_DEVICES = 100_000  # more than any cluster has
PATIENCE = 90  # seconds until a file that another machine wrote to a network share must be seen here


class Result(NamedTuple):
  """How a command ended. The texts are empty if they were shown instead."""

  code: int
  out: str = ''
  err: str = ''

  @property
  def reason(self) -> str:
    """What a command that failed said, in one line: from its first word of an error on, or else the last words."""
    lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if line.lower().startswith('error')), max(0, len(lines) - 3))
    return ' '.join(lines[first:])[:300] or f'exit code {self.code}'


Call = Callable[..., Result]  # (argv, stdin='', show=False); engines take one, so that tests can give another


def call(argv: Sequence[str], stdin: str = '', show: bool = False) -> Result:
  """Runs a command to its end. show: its output goes to the terminal as it comes; else it is returned."""
  if show:
    return Result(subprocess.run(argv, stdin=subprocess.DEVNULL, check=False).returncode)
  # Whatever the locale is: what a tool says when it fails may be in any encoding.
  done = subprocess.run(argv, input=stdin, capture_output=True, encoding='utf-8', errors='replace', check=False)
  return Result(done.returncode, done.stdout, done.stderr)


def need(tool: str, how: str) -> None:
  """ConfigError if the command is not installed. how: what installs it."""
  require(shutil.which(tool) is not None, f'{tool}: no such command on this machine; to get it: {how}')


def launch_name(plan: Plan) -> str:
  """12 digits of the workdir's hash: it is in the names of all that a launch makes elsewhere."""
  return hashlib.sha256(str(plan.workdir).encode()).hexdigest()[:12]


def job_name(plan: Plan, unit: Unit) -> str:
  """The unit's name and 6 digits of its workdir's: two workdirs may hold the same arms. At most 35 characters."""
  return f'{unit.name}-{launch_name(plan)[:6]}'


class _Dumper(yaml.SafeDumper):
  """Quotes every string but plain words: YAML readers do not agree on what 1e3, on or 2026-01-01 are."""


def _string(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
  plain = re.fullmatch('[A-Za-z][A-Za-z_./-]*', value) is not None
  booleans = ('y', 'n', 'yes', 'no', 'on', 'off', 'true', 'false', 'null')
  style = None if plain and value.lower() not in booleans else '"'
  return dumper.represent_scalar('tag:yaml.org,2002:str', value, style=style)


_Dumper.add_representer(str, _string)


def to_yaml(value: Mapping[str, Any]) -> str:
  """YAML, a scalar on one line however long; safe as a here-document."""
  return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=2**31)


# --------------------------------------------------------------------------------------------------- what must hold


def check_share(plan: Plan, mount: str, flag: str) -> None:
  """ConfigError unless workdir and data lie on the share that is mounted at `mount`, here and on the workers.

  The experiment must be a module: where its file lies on this machine says nothing there.
  """
  from slm_jax.data.sources import EMBEDDED  # heavy, and needed by this alone

  file = None if getattr(plan.module, '__spec__', None) else getattr(plan.module, '__file__', None)
  start = f'start it with python -m experiments.{Path(file or "").stem}'
  require(file is None, f'{file}: workers elsewhere cannot start it as a file; {start}')
  require(os.path.isabs(mount), f'--{flag}={mount}: expected an absolute path')
  require(
    _below(str(plan.workdir), mount),
    f'--workdir={plan.workdir}: workers elsewhere share no folder with this machine but --{flag}={mount}; as in'
    f' --workdir={os.path.join(mount, plan.name)}',
  )
  for arm in plan.arms:
    data = arm.config.data
    files = [name for name in (*data.sources, *data.valid_sources) if name not in EMBEDDED and name[:3] != 'hf:']
    for name in [*files, *filter(None, [data.tokenizer_file])]:
      require(
        _below(name, mount),
        f'data: {name!r} cannot be read by workers elsewhere; put it below --{flag}={mount} and name it from there',
      )


def _below(path: str, folder: str) -> bool:
  path, folder = os.path.normpath(path), os.path.normpath(folder)
  return os.path.isabs(path) and os.path.commonpath([path, folder]) == folder and path != folder


def check_devices(plan: Plan, devices: int) -> None:
  """ConfigError if an arm cannot be spread over so many devices: now, and not when they are there and cost money."""
  from slm_jax import sharding

  require(devices <= MOST_DEVICES, f'{devices:,} devices: at most {MOST_DEVICES:,} can train an arm together')
  for run, batch_size, accumulate in {
    (arm.config.run, arm.config.data.batch_size, arm.config.train.accumulate) for arm in plan.arms
  }:
    mesh = sharding.make_mesh(run.data_parallel, run.fsdp, run.tensor, devices=range(devices))
    sharding.check_batch(mesh, batch_size, accumulate)


# -------------------------------------------------------------------------------------------------------- the code


def pack(plan: Plan) -> tuple[str, bytes]:
  """`(12 hex digits of its content, a .tar.gz)` of what a worker runs: this project and the experiment's own package.

  Holds slm_jax/, launch/, the package of the experiment's module (or its file) and requirements.lock; nothing else of
  the folder, so neither data nor secrets. The same files give the same bytes.
  """
  project = Path(slm_jax.__file__).parents[1]
  lock = project / 'requirements.lock'
  require(lock.is_file(), f'{lock}: not there; start from a copy of the whole project')
  roots = {'slm_jax': project / 'slm_jax', 'launch': Path(__file__).parent, 'requirements.lock': lock}
  spec, file = getattr(plan.module, '__spec__', None), getattr(plan.module, '__file__', None) or ''
  if spec and '.' in spec.name:
    roots[spec.name.partition('.')[0]] = Path(file).parents[spec.name.count('.') - 1]
  elif file:
    name = f'{spec.name}.py' if spec else os.path.normpath(file)
    require(not os.path.isabs(name) and name[:2] != '..', f'{file}: start it from its own folder, or with python -m')
    roots[name] = Path(file)
  raw = io.BytesIO()
  with tarfile.open(fileobj=raw, mode='w') as archive:
    for name, path in sorted((name, path) for root, at in roots.items() for name, path in _files(root, at)):
      entry = tarfile.TarInfo(name)
      entry.size, entry.mode = path.stat().st_size, 0o644
      with open(path, 'rb') as content:
        archive.addfile(entry, content)
  return hashlib.sha256(raw.getvalue()).hexdigest()[:12], gzip.compress(raw.getvalue(), mtime=0)


def _files(name: str, at: Path) -> list[tuple[str, Path]]:
  if at.is_file():
    return [(name, at)]
  found = [path for path in at.rglob('*') if path.is_file() and not path.is_symlink()]
  inside = [(path.relative_to(at), path) for path in found]
  return [
    (f'{name}/{relative.as_posix()}', path)
    for relative, path in inside
    if not any(part.startswith('.') or part == '__pycache__' for part in relative.parts)
  ]


def code_path(plan: Plan, content: str) -> Path:
  return plan.workdir / 'code' / f'{content}.tar.gz'


def send(plan: Plan) -> Path:
  """Puts the code into the workdir, as code/<content>.tar.gz; returns its path."""
  content, archive = pack(plan)
  path = code_path(plan, content)
  with workdirs.writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
      temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
      temporary.write_bytes(archive)
      os.replace(temporary, path)
  return path


# ----------------------------------------------------------------------------------------------------- what became


def is_done(plan: Plan, unit: Unit, patience: float = 0) -> bool:
  """Whether all arms of the unit are finished. patience: seconds that a network share may take to show it."""
  end = time.monotonic() + patience
  while True:
    for arm_id in unit.arms:  # listing a folder makes NFS look again
      folder = workdirs.folder(plan.workdir, arm_id)
      if not folder.is_dir() or 'DONE' not in os.listdir(folder) or not plan.is_finished(arm_id):
        break
    else:
      return True
    if time.monotonic() >= end:
      return False
    time.sleep(min(2, patience))


def can_start(plan: Plan, unit: Unit) -> bool:
  """Whether all that one of its arms builds on is done. Of the others its worker says that they are blocked."""
  arms = [arm for arm in plan.arms if arm.arm_id in unit.arms]
  return any(plan.is_done(arm.arm_id) or all(map(plan.is_done, arm.parents.values())) for arm in arms)


def why(plan: Plan, unit: Unit) -> str:
  """What the arms of a unit that are not done say in their run.json."""
  said = []
  for arm_id in unit.arms:
    if not plan.is_finished(arm_id):
      run, _ = read_run(workdirs.folder(plan.workdir, arm_id))
      said.append(
        f'{arm_id}: {run.get("status", "never started")}' + (f' ({run["error"]})' if run.get('error') else '')
      )
  return ', '.join(said) or 'all its arms are done'
