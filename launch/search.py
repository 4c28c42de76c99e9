"""A search on this machine: round after round of trials, each an arm like any other."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from absl import flags

from slm_jax.ablate import search
from slm_jax.ablate.arms import MANY, Arm, base_of, expand, show_apart
from slm_jax.ablate.sweep import LARGEST, Changes
from slm_jax.config import require
from slm_jax.files import expanded

Run = Callable[[list[Arm], list[Arm]], None]  # (the arms so far, those of them to be run now)


def check(options: flags.FlagValues) -> None:
  """ConfigError if other flags cannot be meant beside --search."""
  require(
    options.launch == 'local', f'--launch={options.launch}: cannot wait for the rounds of --search; allowed: local'
  )
  for name in ('seeds', 'only', 'exclude', 'limit'):
    require(not options[name].value, f'--{name}: cannot be combined with --search')
  most, hint = (LARGEST, '') if options.yes else (MANY, '; --yes if so many are meant')
  for name in ('search', 'search_round'):
    trials = int(options[name].value or 0)
    require(trials <= most, f'--{name}={trials}: more than {most:,} arms{hint}')


def arms(
  module: ModuleType,
  options: flags.FlagValues,
  overrides: Mapping[str, str],
  run: Run | None = None,
  adopt: Callable[[Sequence[Arm]], object] = lambda arms: None,
) -> list[Arm]:
  """The arms of --sweep, if it is given, and the trials of the search as far as their losses are known, and one round.

  run: makes losses known, by running arms of a round that have none yet; after that, all trials are here unless a run
  failed. The later trials depend on it: they wait until it is launched again. A run that diverged is an answer.
  adopt: is given the arms of every round before their losses are asked for; see `existing.adopt_recorded`.
  """
  from slm_jax.data import sources  # heavier than the rest

  check(options)
  workdir, fingerprint = expanded(options.workdir), functools.cache(sources.content_of)
  limit = math.inf if options.yes else MANY
  found: dict[str, Arm] = {}

  def losses(trials: Sequence[Changes]) -> list[float | None]:
    now = expand(module, options.sweep, overrides, trials=trials, limit=limit, fingerprint=fingerprint)
    new = [arm for arm in now if arm.arm_id not in found]
    found.update((arm.arm_id, arm) for arm in new)
    adopt(now)
    missing = [arm for arm in new if search.outcome(workdir, arm.arm_id) is None]
    if missing and run:
      run(list(found.values()), missing)
    ids = {name: arm.arm_id for arm in now for name in (arm.name, *arm.aliases)}
    search.check_comparable(workdir, ids.values())
    return [search.outcome(workdir, ids[trial['name']]) for trial in trials]

  search.explore(module, base_of(module, overrides), options.search, options.search_round, losses)
  return list(found.values())


def best(plan_arms: Sequence[Arm], workdir: Path) -> str:
  """One line about the trial with the lowest loss; '' if there is none."""
  known = [(search.outcome(workdir, arm.arm_id), arm) for arm in plan_arms if arm.name.startswith('trial ')]
  finite = [(loss, arm) for loss, arm in known if loss is not None and loss < math.inf]
  if not finite:
    return ''
  bits, arm = min(finite, key=lambda pair: pair[0])
  changed = ', '.join(f'{key}={show_apart(pair)[1]}' for key, pair in arm.diff.items())
  return f'best: {arm.name}, {bits:.4g} bits per byte: {changed}'
