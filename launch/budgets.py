"""The flags of a launch that are about cost: budgets, and what time and money are predicted for."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from absl import flags

from launch.plan import Plan, units
from slm_jax import chips
from slm_jax.ablate import budget
from slm_jax.ablate.arms import Arm
from slm_jax.ablate.budget import FLAGS, Amount, Limits
from slm_jax.config import ConfigError, require

if TYPE_CHECKING:
  from slm_jax.ablate.cost import Device, Programs
  from slm_jax.ablate.measure import Pace

FEW = 8  # names in a message


def define(values: flags.FlagValues) -> None:
  about = {
    'max_flops': 'model FLOPs that all arms of the sweep may take together, those of earlier launches included',
    'max_cost': 'dollars likewise; run.price says what an hour of a chip costs',
    'max_hours': 'hours likewise, of starting and training, summed over the arms: n arms side by side use n an hour',
  }
  for name in FLAGS:
    flags.DEFINE_float(name, None, about[name], flag_values=values)
  text = 'a sweep that would go above its limit: refuse it, or trim it to what fits, whole seeds first'
  flags.DEFINE_enum('over_budget', 'refuse', ['refuse', 'trim'], text, flag_values=values)
  text = 'predict time from a few steps of each shape of arm, taken now on this machine; kept in WORKDIR/cache'
  flags.DEFINE_bool('measure', False, text, flag_values=values)
  text = 'predict time and cost for this chip of chips.toml (v5e, h100, ...), not for this machine'
  flags.DEFINE_string('device', '', text, flag_values=values)
  flags.DEFINE_integer('devices', 1, 'how many of them one arm runs on', 1, flag_values=values)


def check(options: flags.FlagValues) -> None:
  """ConfigError if these flags cannot be meant."""
  for name in FLAGS:
    value = options[name].value
    require(value is None or 0 < value < math.inf, f'--{name}={value}: must be a positive number')
  name, known = options.device, chips.table()
  require(name in ('', *known), f'--device={name}: not in {chips.TABLE.name}; there is: {", ".join(known)}')
  require(bool(name) or options.devices == 1, f'--devices={options.devices}: needs --device=NAME')
  require(not (name and options.measure), f'--measure: takes steps on this machine; --device={name} is another')


def check_price(plan: Plan, options: flags.FlagValues) -> None:
  """ConfigError if dollars are limited and nobody knows what they are paid for. Needs devices, if none are named."""
  if options.max_cost is not None:
    from slm_jax.ablate import cost  # with jax

    budget.require_price(plan.arms, cost.device(options.device, options.devices).kind)


def assume(options: flags.FlagValues, chip: str, count: int) -> None:
  """What an engine's flags say of the device, where the user has not said it."""
  chip = {'a100': 'a100-40gb'}.get(chip.lower(), chip.lower())
  if not options.device and chip in chips.table():
    options['device'].value, options['devices'].value = chip, count


def limits(options: flags.FlagValues) -> Limits:
  values = [options[name].value for name in FLAGS]
  return Limits(*(math.inf if value is None else float(value) for value in values))


def chosen(options: flags.FlagValues) -> list[str]:
  """The flags that a worker must have too."""
  return [f'--{name}={options[name].value:g}' for name in FLAGS if options[name].value is not None]


def predicting(plan: Plan, options: flags.FlagValues) -> 'tuple[Device, dict[str, Pace]]':
  """What costs are predicted for, and how fast arms are there: measured now if that is asked for."""
  from slm_jax.ablate import cost, measure  # with jax

  on = cost.device(options.device, options.devices)
  if on.here and options.launch == 'local':
    on = on._replace(part=_part(plan, options))
  if options.measure and on.measurable:
    missing = [arm for arm in plan.arms if not plan.is_done(arm.arm_id)]
    measure.measure_all(missing, plan.everyone, plan.workdir)
  return on, measure.known(plan.workdir)


def processes(plan: Plan, options: flags.FlagValues, on: 'Device') -> 'list[Programs]':
  """Returns what each process of the launch runs: programs one after another, each of one arm or of several."""
  from launch import local  # needs this module
  from slm_jax.ablate import cost  # with jax

  missing = {arm.arm_id: arm for arm in plan.arms if not plan.is_done(arm.arm_id)}
  workers = len(local.places_of(plan, options)) if options.launch == 'local' else None
  if workers == 1:  # this process runs all
    return [cost.programs(list(missing.values()), on)]
  its = [[missing[i] for i in unit.arms if i in missing] for unit in units(plan, options.arms_per_job, workers)]
  return [cost.programs(arms, on) for arms in its if arms]


def _part(plan: Plan, options: flags.FlagValues) -> float:
  """The part of this machine's chips that a worker of the local pool has."""
  from launch import local, places  # local needs this module

  its = local.places_of(plan, options)
  _, devices = places.accelerators()
  own = len(its[0].devices) / len(devices) if devices else 1.0
  return own * float(its[0].env.get(chips.SHARE, 1)) if len(its) > 1 else 1.0


def within(plan: Plan, options: flags.FlagValues) -> Plan:
  """The plan, or with --over_budget=trim the arms of it that stay within the limits; says what was dropped.

  ConfigError if the plan goes above a limit and is not to be trimmed, or nothing would be left to run. Limits on time
  or money measure what has not been measured yet, where this machine is the one that trains.
  """
  wanted = limits(options)
  if wanted == Limits():
    return plan
  if wanted._replace(flops=math.inf) != Limits() and options.launch == 'local' and not options.device:
    options['measure'].value = options.measure or not options.dry_run
  amounts, spent, done = _amounts(plan, options)
  own = {arm.arm_id for arm in plan.arms}
  besides = budget.total([used for arm_id, used in spent.items() if arm_id not in own])
  kept = budget.fit(plan.arms, amounts, done, wanted, besides)
  if len(kept) == len(plan.arms):
    return plan
  all_of_it, before = budget.total([besides, *amounts.values()]), budget.total(list(spent.values()))
  flag, missing, fits = budget.exceeded(all_of_it, wanted), len(own - done), len({a.arm_id for a in kept} - done)
  words = f'{flag}: the sweep would take {budget.shown(all_of_it, flag)}, {budget.shown(before, flag)} of it spent'
  if options.over_budget == 'refuse' or not kept:
    hint = ', and --over_budget=trim runs those' if fits else ''
    raise ConfigError(f'{words}; {fits} of its {missing} missing arms fit{hint}')
  print(f'{words}; dropped: {_names([arm for arm in plan.arms if arm not in kept])}')
  return plan._replace(arms=kept)


def _amounts(plan: Plan, options: flags.FlagValues) -> tuple[dict[str, Amount], dict[str, Amount], set[str]]:
  """`({id: what it takes in all}, {id: what it has used}, ids of what is done)`, the first of the plan's arms."""
  from slm_jax.ablate import cost  # with jax

  on, paces = predicting(plan, options)
  sweep = plan.everyone
  costs = cost.predict(sweep, on, paces, processes=processes(plan, options, on))
  spent = {arm_id: budget.spent(plan.workdir, arm, per_step(sweep)) for arm_id, arm in sweep.items()}
  done = {arm.arm_id for arm in plan.arms if plan.is_done(arm.arm_id)}
  amounts = {}
  for arm_id, arm in ((arm.arm_id, arm) for arm in plan.arms):
    c, used = costs[arm_id], spent[arm_id]
    again = 1 + budget.lost(plan.workdir, arm) / c.seconds if c.seconds else 1.0
    expected = Amount(c.flops, (c.dollars or 0.0) * again, c.seconds * again / 3600)
    amounts[arm_id] = used if arm_id in done else Amount(*map(max, used, expected))
  if on.here and on.kind != 'cpu':
    from jax.extend import backend

    backend.clear_backends()  # a process that has used a GPU keeps its memory, and the workers need that
  return amounts, spent, done


def admission(plan: Plan, options: flags.FlagValues) -> Callable[[Arm], str]:
  """What a worker asks before it starts an arm: why it may not, '' if it may."""
  sweep = plan.everyone
  return budget.admission(limits(options), plan.workdir, list(sweep.values()), per_step(sweep))


def per_step(sweep: dict[str, Arm]) -> Callable[[Arm], float]:
  """Returns the function from an arm of the sweep to the model FLOPs of one of its steps."""

  def of(arm: Arm) -> float:
    from slm_jax.ablate.cost import model_flops  # with jax, and needed only where a run was cut off

    return model_flops(arm, sweep) / arm.config.train.steps

  return of


def _names(arms: Sequence[Arm]) -> str:
  names = [f'{arm.name} (seed {arm.config.seed})' for arm in arms]
  return ', '.join(names[:FEW]) + (f' and {len(names) - FEW} more' if len(names) > FEW else '')
