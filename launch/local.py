"""The engine 'local': this machine; one arm after another in this process, or a pool of processes side by side."""

import sys
from collections.abc import Sequence

from absl import flags

from launch import budgets, places, pool, status, worker
from launch.places import Place
from launch.plan import Plan, Unit
from launch.plan import units as units_of
from slm_jax.config import require


def define(values: flags.FlagValues) -> None:
  text = 'processes that train side by side, each on its share of cores and GPUs, or on one TPU chip (default: one for'
  text += ' each chip, or for as many GPUs as an arm is split over; else 1, which is this process)'
  flags.DEFINE_integer('local_workers', None, text, 1, flag_values=values)
  text = 'how often a process is started again that was killed or preempted'
  flags.DEFINE_integer('local_restarts', 20, text, 0, flag_values=values)


def check(plan: Plan, options: flags.FlagValues) -> None:
  """All flags can be meant."""


def ready(plan: Plan, options: flags.FlagValues) -> None:
  its = places_of(plan, options)
  elsewhere = len(its) > 1 and bool(its[0].devices)
  if elsewhere:
    import jax

    # The workers' GPUs are not this process's: as many devices of its CPU stand for those of one worker.
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', len(its[0].devices))
  worker.preflight(plan.arms, plan.workdir, own_devices=not elsewhere)


def show(plan: Plan, units: Sequence[Unit], options: flags.FlagValues) -> str:
  its = places_of(plan, options)
  units = _shared_out(plan, units, its, options)
  lines = [f'# {len(its)} at a time, on {"; ".join(map(str, its))}'] if len(its) > 1 else []
  return '\n'.join(lines + [plan.command(*unit.arms) for unit in units])


def run(plan: Plan, units: Sequence[Unit], options: flags.FlagValues) -> int:
  admit = budgets.admission(plan, options)
  its = places_of(plan, options)
  if len(its) == 1:
    return worker.run_arms(plan.arms, plan.workdir, code=plan.code, admit=admit, fail_fast=options.fail_fast)
  units = _shared_out(plan, units, its, options)
  how = {'restarts': options.local_restarts, 'admit': admit, 'fail_fast': options.fail_fast}
  if not sys.stdout.isatty():
    lines = status.Lines(print, plan.workdir, [arm.arm_id for arm in plan.arms])
    return pool.run(plan, units, its, **how, look=lines.look)
  screen = status.Screen(sys.stdout)
  live = status.Live(screen, plan.workdir, [arm.arm_id for arm in plan.arms])
  return pool.run(plan, units, its, **how, say=screen.say, look=live.look)


def places_of(plan: Plan, options: flags.FlagValues) -> list[Place]:
  """Where the workers run; no more places than arms that are missing."""
  kind, devices = places.accelerators()
  runs = [arm.config.run for arm in plan.arms if not plan.is_finished(arm.arm_id)]
  an_arm = max((max(1, run.data_parallel) * run.fsdp * run.tensor for run in runs), default=1)
  split_tpu = kind == 'tpu' and an_arm > 1  # over chips of which a worker has one, and this process all
  require(
    not split_tpu or options.local_workers in (None, 1),
    f'--local_workers={options.local_workers}: each has one TPU chip, and an arm is split over {an_arm}; allowed: 1',
  )
  workers = options.local_workers or (1 if split_tpu else max(1, len(devices) // an_arm))
  return places.split(max(1, min(workers, len(runs))), kind, devices)


def _shared_out(plan: Plan, units: Sequence[Unit], its: Sequence[Place], options: flags.FlagValues) -> Sequence[Unit]:
  """The units as asked for, or else populations of equal size at all places."""
  return units if options.arms_per_job else units_of(plan, 0, len(its))
