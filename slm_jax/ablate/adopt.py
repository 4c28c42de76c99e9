"""Arms that an earlier version recorded under other ids.

An arm's id is the hash of its settings. Format 1 hashed all of them, settings of evaluation included; format 2 hashes
what differs from its default. The settings themselves stand in config.json, so a finished or interrupted arm of format
1 is recognised by what it is: its folder gets the new id, and nothing is trained again.
"""

import fcntl
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.arms import Arm
from slm_jax.config import ConfigError, identity, to_dict
from slm_jax.files import read_json, write_json

FIRST = 'format_1.json'  # in an adopted folder: the id and the configuration that format 1 recorded


def find_adoptable(workdir: Path, arms: Sequence[Arm]) -> dict[str, str]:
  """Returns `{id of an arm: name of the folder that holds it under its id of format 1}`. Nothing is written.

  arms: parents first; the ids that they refer to are translated on the way.
  """
  wanted = [arm for arm in arms if not workdirs.folder(workdir, arm.arm_id).exists()]
  if not wanted:
    return {}
  recorded = _recorded(workdir, {arm.arm_id for arm in arms})
  found: dict[str, str] = {}
  new_ids = {}  # by the old ones
  for arm in arms:
    if old := _read(workdirs.folder(workdir, arm.arm_id) / FIRST).get('arm_id'):
      new_ids[old] = arm.arm_id  # a launch that was killed meanwhile had come so far
  for arm in wanted:
    alike = recorded.get(_seeds(to_dict(arm.config)), {})
    match = next((old for old, settings in alike.items() if old not in new_ids and _same(settings, arm, new_ids)), None)
    if match is not None:
      found[arm.arm_id], new_ids[match] = match, arm.arm_id
  return found


def adopt(workdir: Path, arms: Iterable[Arm], found: Mapping[str, str]) -> None:
  """Renames the folders that `find_adoptable` found. The caller holds the workdir's lock.

  ConfigError if a process still works on one of them. A launch that is killed in between is followed by one that finds
  the rest.
  """
  by_id = {arm.arm_id: arm for arm in arms}
  for old in found.values():
    _require_idle(workdirs.folder(workdir, old))
  _rename_in_experiment(workdir, {old: new for new, old in found.items()})
  for new, old in found.items():
    folder = workdirs.folder(workdir, old)
    with workdirs.writing(workdir):
      if not (folder / FIRST).exists():
        write_json(folder / FIRST, {'arm_id': old, 'config': _read(folder / 'config.json')})
      evaluated = _read(folder / FIRST)['config'].get('eval')  # as it was: the launch evaluates the arm again
      write_json(folder / 'config.json', {**to_dict(by_id[new].config), 'eval': evaluated})
      os.rename(folder, workdirs.folder(workdir, new))


def _read(path: Path) -> dict[str, Any]:
  """Empty if the file is not there, or damaged."""
  return read_json(path)[0] or {}


def _rename_in_experiment(workdir: Path, new_ids: Mapping[str, str]) -> None:
  experiment = workdirs.read_experiment(workdir)
  if experiment is None:
    return
  arms = {
    new_ids.get(arm_id, arm_id): {**entry, 'parents': [new_ids.get(p, p) for p in entry.get('parents', ())]}
    for arm_id, entry in experiment.arms.items()
  }
  launches = tuple(
    each._replace(arms=tuple(new_ids.get(arm_id, arm_id) for arm_id in each.arms)) for each in experiment.launches
  )
  with workdirs.writing(workdir):
    workdirs.write_experiment(workdir, experiment._replace(arms=arms, launches=launches))


def _recorded(workdir: Path, known: set[str]) -> dict[Any, dict[str, Mapping[str, Any]]]:
  """The settings of every folder of format 1 that is none of the known ids: `{seeds: {folder: settings}}`."""
  found: dict[Any, dict[str, Mapping[str, Any]]] = {}
  for path in sorted((workdir / 'arms').glob('*/config.json')):
    folder = path.parent
    if folder.name not in known and _read(folder / 'run.json').get('format', 1) == 1:
      settings = _read(folder / FIRST).get('config') or _read(path)
      found.setdefault(_seeds(settings), {})[folder.name] = settings
  return found


def _seeds(settings: Mapping[str, Any]) -> Any:
  data = settings.get('data')
  return settings.get('seed'), data.get('seed') if isinstance(data, Mapping) else None


def _same(recorded: Mapping[str, Any], arm: Arm, new_ids: Mapping[str, str]) -> bool:
  """Whether recorded settings are those of an arm in all that can change its result."""
  return _equal(recorded, to_dict(arm.config, semantic_only=True), identity(arm.config), to_dict(arm.config), new_ids)


def _equal(recorded: Any, settings: Any, identifying: Any, everything: Any, new_ids: Mapping[str, str]) -> bool:
  """Compares recorded settings with an arm's semantic ones.

  identifying: those that differ from their defaults; a setting that was not recorded must not be among them.
  everything: the semantic settings and all others; a recorded setting that is neither is an unknown one.
  """
  if isinstance(settings, Mapping):
    if not isinstance(recorded, Mapping) or recorded.keys() - everything.keys():
      return False
    return all(
      _equal(recorded[key], value, (identifying or {}).get(key), everything[key], new_ids)
      if key in recorded
      else key not in (identifying or {})
      for key, value in settings.items()
    )
  if isinstance(settings, list) and any(isinstance(item, Mapping) for item in settings):
    if not isinstance(recorded, list) or len(recorded) != len(settings):
      return False
    parts = zip(recorded, settings, identifying, everything, strict=True)
    return all(_equal(*part, new_ids) for part in parts)
  if isinstance(recorded, list):
    return [_translate(item, new_ids) for item in recorded] == settings
  return _translate(recorded, new_ids) == settings


def _translate(value: Any, new_ids: Mapping[str, str]) -> Any:
  return new_ids.get(value, value) if isinstance(value, str) else value


def _require_idle(folder: Path) -> None:
  """ConfigError if another process holds the arm's lock."""
  path = folder / 'lock'
  if not path.exists():
    return
  with open(path, 'a+', encoding='utf-8') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ConfigError(f'{folder}: a process of an earlier version works on this arm; wait for it') from None
