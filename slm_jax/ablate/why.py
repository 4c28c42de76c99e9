"""Why two arms are not one; and whether an arm that is done was made by the code that is here now."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.arms import Arm, shown
from slm_jax.config import ConfigError, flatten, require, to_dict
from slm_jax.revision import source
from slm_jax.run_files import read_config, read_run

LISTED = 5  # arms that are named in a message


class Known(NamedTuple):
  """An arm of the sweep, or one that an earlier launch left in the workdir."""

  title: str
  settings: Mapping[str, Any]  # the flat configuration, only what the id is a hash of


def explain(pair: Sequence[str], arms: Sequence[Arm], workdir: Path) -> str:
  """The settings in which two arms differ as far as their ids say, parents included; a line each.

  pair: two ids or their beginnings, of arms of the sweep or of the workdir. ConfigError if there is no such arm.
  """
  require(len(pair) == 2, f'--why={",".join(pair)}: expected two ids, as in --why=ID1,ID2')
  known = _known(arms, workdir)
  first, second = (_find(prefix, known, workdir) for prefix in pair)
  if first == second:
    return f'{first} ({known[first].title}) is one arm'
  return '\n'.join([f'{_named(first, known)} and {_named(second, known)} differ in', *_lines(first, second, known)])


def _lines(first: str, second: str, known: Mapping[str, Known], indent: str = '  ') -> list[str]:
  one, other = known[first].settings, known[second].settings
  lines = []
  for key in dict.fromkeys([*one, *other]):
    a, b = one.get(key), other.get(key)
    if a == b:
      continue
    both_arms = isinstance(a, str) and isinstance(b, str) and a in known and b in known
    lines.append(f'{indent}{key}: {_shown(key, one)} -> {_shown(key, other)}{", which differ in" if both_arms else ""}')
    if both_arms:
      lines += _lines(str(a), str(b), known, indent + '  ')
  return lines


def _shown(key: str, settings: Mapping[str, Any]) -> str:
  return (shown(settings[key]) or "''") if key in settings else 'not there'


def _named(arm_id: str, known: Mapping[str, Known]) -> str:
  return f'{arm_id} ({known[arm_id].title})'


def _known(arms: Iterable[Arm], workdir: Path) -> dict[str, Known]:
  known, left_out = {}, set()
  for arm in arms:
    settings = flatten(to_dict(arm.config, semantic_only=True))
    known[arm.arm_id] = Known(f'{arm.name}, seed {arm.config.seed}', settings)
    left_out |= flatten(arm.config).keys() - settings.keys()
  for path in sorted((workdir / 'arms').glob('*/config.json')):
    if path.parent.name not in known:
      settings, _ = read_config(path.parent)
      title = f'{settings.get("name") or "no name"}, seed {settings.get("seed")}, of an earlier launch'
      known[path.parent.name] = Known(title, {k: v for k, v in settings.items() if k not in left_out})
  return known


def _find(prefix: str, known: Mapping[str, Known], workdir: Path) -> str:
  found = [arm_id for arm_id in known if prefix and arm_id.startswith(prefix)]
  if len(found) == 1:
    return found[0]
  if found:
    raise ConfigError(f'--why={prefix}: could be any of {", ".join(found)}')
  raise ConfigError(f'--why={prefix}: no such id in this sweep or in {workdir}; --dry_run shows those of the sweep')


def made_by_other_code(arms: Iterable[Arm], workdir: Path, code: Mapping[str, str]) -> dict[str, set[str]]:
  """Returns `{id of a finished arm: the parts of the code that have changed since it was made}`.

  code: hashes of the experiment's own files as they are now, `revision.hash_files`. Of an arm whose record does not
  say by what code it was made, nothing is said.
  """
  done = [arm.arm_id for arm in arms if workdirs.is_done(workdir, arm.arm_id)]
  now = {'source': source() if done else {}, 'experiment': code}
  found = {}
  for arm_id in done:
    run, _ = read_run(workdirs.folder(workdir, arm_id))
    changed = {name for part in now for name in _changed(run.get(part), now[part])}
    if changed:
      found[arm_id] = changed
  return found


def _changed(then: Any, now: Mapping[str, str]) -> set[str]:
  if not isinstance(then, dict) or not then or not now:
    return set()
  return {name for name in {**then, **now} if then.get(name) != now.get(name)}


def made_with_other_settings(arms: Iterable[Arm], workdir: Path) -> dict[str, list[str]]:
  """Returns `{arm id: settings that were recorded with another value}`: an arm's id says nothing of defaults.

  It happens where the default of a transform in an experiment's own file was edited.
  """
  found = {}
  for arm in arms:
    recorded, _ = read_config(workdirs.folder(workdir, arm.arm_id))
    settings = flatten(to_dict(arm.config, semantic_only=True)) if recorded else {}
    differ = [key for key in settings if key in recorded and recorded[key] != settings[key]]
    if differ:
      found[arm.arm_id] = [f'{key}={shown(recorded[key])}, now {shown(settings[key])}' for key in differ]
  return found


def drift(arms: Sequence[Arm], outdated: Mapping[str, set[str]]) -> str:
  """Returns one line about the arms that `made_by_other_code` found; '' if there are none."""
  if not outdated:
    return ''
  names = list(dict.fromkeys(arm.title for arm in arms if arm.arm_id in outdated))
  more = f' and {len(names) - LISTED} more' if len(names) > LISTED else ''
  changed = ', '.join(sorted(set().union(*outdated.values())))
  return (
    f'warning: {len(outdated)} of {len(arms)} arms were made by other code (changed since then: {changed}):'
    f' {"; ".join(names[:LISTED])}{more}. --rerun makes them again; another --workdir keeps both'
  )
