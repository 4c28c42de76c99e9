"""Settings without effect: those that somebody set, and that the others of their section leave nothing to change.

A section says which of its settings count only under a condition (`needs`, see slm_jax/config.py). That such a setting
is not at its default is a mistake where the sweep sets it for this very arm, or where no arm reads it: the table of
results would show it as if it had been tried. It is none where another arm of the sweep reads it, as where only some
arms of a base with `init.by` start from another one; nor where the experiment's own file reads it, and the command line
has switched that off. Then it is a remark.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from slm_jax.ablate.sweep import Changes
from slm_jax.conditions import Conditional, conditional
from slm_jax.config import ConfigError

if TYPE_CHECKING:
  from slm_jax.ablate.arms import Arm
  from slm_jax.experiment import Config


def check(own: 'Config', configs: 'Sequence[Config]', changes: Sequence[Changes]) -> None:
  """ConfigError for a setting without effect that is a mistake.

  own: the base as the experiment's file has it. changes: the overrides of the first of the configurations; those of
  further ones, which are trials of a search, were chosen by nobody.
  """
  used: set[tuple[str, str]] | None = None
  for config, change in zip(configs, changes, strict=False):
    for setting in (each for each in conditional(config) if not each.counts):
      if not _sets(change, setting.key):
        used = _used([own, *configs]) if used is None else used
        if _known_by(setting) in used:
          continue
      where = f' (in the arm {change["name"]!r})' if change.get('name') else ''
      raise ConfigError(
        f'config.{setting.key}={setting.value!r}: has no effect without {setting.needs}; '
        f'allowed: {setting.default!r}{where}'
      )


def remarks(arms: 'Sequence[Arm]') -> list[str]:
  """A line for each setting that some of the arms do not read."""
  found: dict[tuple[str, str], list[Conditional]] = {}
  for arm in arms:
    for setting in conditional(arm.config):
      if not setting.counts:
        found.setdefault(_known_by(setting), []).append(setting)
  return [
    f'{own[0].key}={own[0].value!r} has no effect in {len(own)} of {len(arms)} arms, without {own[0].needs}'
    for own in found.values()
  ]


def _sets(change: Changes, key: str) -> bool:
  return any(key == name or key.startswith(f'{name}.') for name in change)


def _used(configs: 'Iterable[Config]') -> set[tuple[str, str]]:
  return {_known_by(setting) for config in configs for setting in conditional(config) if setting.counts}


def _known_by(setting: Conditional) -> tuple[str, str]:
  return setting.key, repr(setting.value)
