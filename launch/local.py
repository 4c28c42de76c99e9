"""The engine 'local': this machine."""

from collections.abc import Sequence

from absl import flags

from launch import worker
from launch.plan import Plan, Unit


def define(values: flags.FlagValues) -> None:
  """No flags of its own."""


def check(plan: Plan, options: flags.FlagValues) -> None:
  """All flags can be meant."""


def ready(plan: Plan, options: flags.FlagValues) -> None:
  worker.preflight(plan.arms, plan.workdir)


def show(plan: Plan, units: Sequence[Unit], options: flags.FlagValues) -> str:
  return '\n'.join(plan.command(*unit.arms) for unit in units)


def run(plan: Plan, units: Sequence[Unit], options: flags.FlagValues) -> int:
  return worker.run_arms(plan.arms, plan.workdir, fail_fast=options.fail_fast)
