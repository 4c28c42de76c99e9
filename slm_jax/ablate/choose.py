"""Which arms of a sweep are wanted: by name, by id, by a setting, or the first few; and what they build on."""

import fnmatch
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from slm_jax.ablate.arms import Arm, shown
from slm_jax.config import ConfigError, flatten, require

ID = re.compile('[0-9a-f]{4,12}')  # or its beginning: fewer digits would be met by chance
LISTED = 20  # names in a message


class Chosen(NamedTuple):
  arms: list[Arm]  # parents first
  along: list[Arm]  # those of them that nobody asked for, and that will run because others build on them


def choose(
  arms: Sequence[Arm],
  *,
  only: Sequence[str] = (),
  exclude: Sequence[str] = (),
  limit: int | None = None,
  is_done: Callable[[str], bool] = lambda arm_id: False,
) -> Chosen:
  """The arms that meet one of `only` (if it is empty, all) and none of `exclude`, the first `limit` of them, and
  whatever they build on.

  A pattern is a name, the beginning of an id (four digits at least), or key=value, where the key may be the end of a
  dotted one: 'student*', '3f9c0a', 'learning_rate=1e-3', 'distill.weight=0.?'. * and ? stand for anything.
  arms: parents first. is_done: of an arm id; an arm that is done needs no parents.
  ConfigError if a pattern meets no arm, if no arm is left, or if one is excluded that another has to build on.
  """
  refused = {arm_id: pattern for pattern in exclude for arm_id in _met(arms, pattern, '--exclude')}
  wanted = (
    {arm_id for pattern in only for arm_id in _met(arms, pattern, '--only')} if only else {a.arm_id for a in arms}
  )
  asked = [arm.arm_id for arm in arms if arm.arm_id in wanted and arm.arm_id not in refused][:limit]
  require(len(asked) > 0, f'--exclude={",".join(exclude)}: leaves no arm')
  names = {arm.arm_id: arm.name for arm in arms}
  kept = set(asked)
  for arm in reversed(arms):  # children before parents
    for parent in arm.parents.values() if arm.arm_id in kept else ():
      if parent in kept or (is_done(arm.arm_id) and not is_done(parent)):
        continue
      if parent not in refused:
        kept.add(parent)
      elif not is_done(parent):
        raise ConfigError(
          f'--exclude={refused[parent]}: {arm.name!r} builds on {names[parent]!r}, which is not done; exclude both'
        )
  chosen = [arm for arm in arms if arm.arm_id in kept]
  along = kept.difference(asked)
  return Chosen(chosen, [arm for arm in chosen if arm.arm_id in along and not is_done(arm.arm_id)])


def _met(arms: Sequence[Arm], pattern: str, flag: str) -> set[str]:
  """The ids of the arms that a pattern means."""
  found = {arm.arm_id for arm in arms if any(fnmatch.fnmatchcase(name, pattern) for name in (arm.name, *arm.aliases))}
  if ID.fullmatch(pattern):
    found |= {arm.arm_id for arm in arms if arm.arm_id.startswith(pattern)}
  key, equals, value = pattern.partition('=')
  if equals:
    found |= {arm.arm_id for arm in arms if any(_is(setting, value) for setting in _settings(arm, key))}
  if not found:
    names = list(dict.fromkeys(arm.name for arm in arms))
    more = f' and {len(names) - LISTED:,} more' if len(names) > LISTED else ''
    known = f'{", ".join(names[:LISTED])}{more}'
    raise ConfigError(f'{flag}={pattern}: no arm has that name, id or setting; there is: {known}')
  return found


def _settings(arm: Arm, key: str) -> list[Any]:
  """What the arm has under a key or under all keys that end in it; a reference to an arm both by id and by name."""
  flat = flatten(arm.config)
  keys = [key] if key in flat else [full for full in flat if full.endswith(f'.{key}')]
  return [flat[full] for full in keys] + [arm.diff[full][1] for full in keys if full in arm.diff]


def _is(setting: Any, pattern: str) -> bool:
  """Whether a setting is the one that is meant: the same number, or its text as in tables."""
  if isinstance(setting, bool):
    return str(setting).lower() == pattern.lower()
  try:
    return float(setting) == float(pattern)
  except (TypeError, ValueError):
    return fnmatch.fnmatchcase(shown(setting), pattern)
