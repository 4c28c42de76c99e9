"""Budgets: a sweep that would take more than it may is refused or trimmed before it starts, and stops at the limit.

A limit is for all arms of the sweep together, those included that earlier launches finished, failed or left half done;
so launching again neither starts the count anew nor counts anything twice. What has been used is read from the result
store alone (run.json, metrics.jsonl), so every worker on every engine sees the same.

    flops   model FLOPs of training, teachers' forward passes included (of the steps; not of texts or caches they made)
    dollars chip-hours times the price (chips.toml, or run.price)
    hours   of training and of what a process takes before it, compiling say, summed over the arms: n workers side by
            side use n of them an hour
"""

import collections
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slm_jax import chips, metrics
from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.arms import Arm
from slm_jax.ablate.table import short
from slm_jax.config import ConfigError
from slm_jax.files import warn_once
from slm_jax.run_files import read_run


class Amount(NamedTuple):
  """What one arm, or all of them, take."""

  flops: float = 0.0
  dollars: float = 0.0
  hours: float = 0.0


class Limits(NamedTuple):
  """The most that all arms of a sweep may take together."""

  flops: float = math.inf
  dollars: float = math.inf
  hours: float = math.inf


FLAGS = ('max_flops', 'max_cost', 'max_hours')  # what the limits are called on the command line, in their order
_UNITS = ('{} FLOPs', '${}', '{} hours')


def total(amounts: Collection[Amount]) -> Amount:
  return Amount(*(math.fsum(part) for part in zip(*amounts, strict=True))) if amounts else Amount()


def exceeded(amount: Amount, limits: Limits) -> str:
  """The first limit that the amount is above, as on the command line; '' if it is within all."""
  over = (flag for flag, much, limit in zip(FLAGS, amount, limits, strict=True) if much > limit)
  return next((f'--{flag}={limits[FLAGS.index(flag)]:g}' for flag in over), '')


def shown(amount: Amount, flag: str) -> str:
  """'3.4T FLOPs', '$12.5' or '1.25 hours': the part of an amount that '--max_flops=...' and the like limit."""
  i = FLAGS.index(flag.lstrip('-').partition('=')[0])
  return _UNITS[i].format(short(amount[i]))


# ---------------------------------------------------------------------------------------------- before it starts


def fit(
  arms: Sequence[Arm],
  amounts: Mapping[str, Amount],
  done: Collection[str],
  limits: Limits,
  besides: Amount = Amount(),
) -> list[Arm]:
  """The arms, parents first, that stay within the limits: all, or what is left after dropping from the end.

  besides: what the sweep used outside of these arms.

  The repetitions go first: every arm of the last seed, then of the one before, so that those which stay are paired.
  When only one seed is left, arms go one by one. A finished arm stays, and a parent of an arm that stays.
  """
  kept = list(arms)

  def within() -> bool:
    return not exceeded(total([besides, *(amounts[arm.arm_id] for arm in kept)]), limits)

  def drop(unwanted: Callable[[Arm], bool]) -> None:
    needed: set[str] = set()
    stay = []
    for arm in reversed(kept):  # children before their parents
      if arm.arm_id in needed or arm.arm_id in done or not unwanted(arm):
        needed.update(arm.parents.values())
        stay.append(arm)
    kept[:] = reversed(stay)

  seeds = list(dict.fromkeys(_seed(arm) for arm in arms))
  while len(seeds) > 1 and not within():
    last = seeds.pop()
    drop(lambda arm: _seed(arm) == last)  # noqa: B023  used before the next turn
  for candidate in reversed(kept.copy()):
    if within():
      break
    drop(lambda arm: arm.arm_id == candidate.arm_id)  # noqa: B023
  return kept


def _seed(arm: Arm) -> tuple[Any, ...]:
  return arm.config.seed, arm.config.data.seed


def require_price(arms: Sequence[Arm], kind: str) -> None:
  """ConfigError if dollars cannot be counted: the price of an hour is not known, or nothing is paid for it."""
  for arm in arms:
    price, why = chips.price(kind, arm.config.run.price)
    if not price:
      raise ConfigError(f'--max_cost: {why}; give one, in dollars an hour of a chip: --config.run.price=DOLLARS')


# --------------------------------------------------------------------------------------------------- while it runs


def spent(workdir: Path, arm: Arm, flops_per_step: Callable[[Arm], float]) -> Amount:
  """What an arm has used so far: by its summary if it is done, else by the last line of its log.

  Steps that were lost with a process and taken again cost time and money; model FLOPs are those of steps that count.
  """
  folder = workdirs.folder(workdir, arm.arm_id)
  run, fault = read_run(folder)
  if fault:
    warn_once(f'{folder / "run.json"}: damaged ({fault}); what this arm used is read from its log, without dollars')
  used = run.get('summary') or next(iter(collections.deque(metrics.read(folder / 'metrics.jsonl'), maxlen=1)), {})
  besides = lost(workdir, arm)
  if used.get('seconds_redone') is not None:  # it is done
    besides = used['seconds_redone'] + (used.get('seconds_start') or 0.0)
  hours, flops, dollars = ((used.get('seconds') or 0.0) + besides) / 3600, used.get('flops'), used.get('dollars')
  if flops is None:
    flops = used['step'] * flops_per_step(arm) if used.get('step') else 0.0
  if dollars is None:
    kind = run.get('device_kind', 'cpu')
    price, _ = chips.price(kind, arm.config.run.price)
    whole = chips.count(kind, run.get('devices', 1), run.get('processes', 1))
    dollars = hours * whole * run.get('chip_share', 1.0) * (price or 0.0)
  return Amount(flops, dollars, hours)


def lost(workdir: Path, arm: Arm) -> float:
  """Seconds that brought an arm, which is not done, no further: of steps that it takes again, and of starts."""
  path = workdirs.folder(workdir, arm.arm_id) / metrics.LOST
  seconds, fault = metrics.read_lost(path)
  if fault:
    warn_once(f'{path}: damaged ({fault}), and left out: seconds that were lost are not counted')
  return sum(seconds.get(name) or 0.0 for name in ('redone', 'start'))


def admission(
  limits: Limits, workdir: Path, arms: Sequence[Arm], flops_per_step: Callable[[Arm], float]
) -> Callable[[Arm], str]:
  """A function that says why an arm may not be started now, '' if it may: asked before each arm of a sweep.

  arms: the whole sweep. What runs elsewhere at the time counts as far as its log goes, so a sweep ends above a limit by
  what its arms in flight still take.
  """
  finished: dict[str, Amount] = {}

  def admit(arm: Arm) -> str:
    if limits == Limits():
      return ''
    for each in arms:
      if each.arm_id not in finished and workdirs.is_done(workdir, each.arm_id):
        finished[each.arm_id] = spent(workdir, each, flops_per_step)
    unfinished = [spent(workdir, each, flops_per_step) for each in arms if each.arm_id not in finished]
    used = total([*finished.values(), *unfinished])
    for flag, much, limit in zip(FLAGS, used, limits, strict=True):
      if much >= limit:
        return f'--{flag}={limit:g} is reached ({shown(used, flag)} used)'
    return ''

  return admit
