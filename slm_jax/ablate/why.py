"""Why two arms are not one; and whether an arm that is done was made by the code that is here now."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.arms import Arm, shown
from slm_jax.config import ConfigError, flatten, require, to_dict
from slm_jax.revision import source
from slm_jax.run_files import read_config, read_run


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


def drift(arms: Iterable[Arm], workdir: Path) -> str:
  """One line if arms that are done were made by other code than is here now, else ''."""
  done = [arm.arm_id for arm in arms if workdirs.is_done(workdir, arm.arm_id)]
  now = source() if done else {}
  others, changed = 0, set()
  for arm_id in done:
    then = read_run(workdirs.folder(workdir, arm_id))[0].get('source')
    if then is not None and then != now:  # a record without it is of an unknown code: nothing can be said
      others += 1
      changed |= {name for name in {**then, **now} if then.get(name) != now.get(name)}
  if not others:
    return ''
  return (
    f'{others} of {len(done)} finished arms were made by other code (since then {", ".join(sorted(changed))} changed);'
    ' another --workdir would run them anew'
  )
