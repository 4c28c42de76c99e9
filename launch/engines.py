"""What every engine is: a module of `launch` that starts workers somewhere, and one line here.

A worker is `Plan.command(*unit.arms)`, the same everywhere. It ends with 0 (its arms are done), 1 (one failed for good:
start it no more), 42 (preempted with everything saved: start it again) or by a signal (likewise start it again). It
skips what is done, so starting one too often costs seconds and changes nothing.
"""

import importlib
from collections.abc import Sequence
from typing import Protocol, cast

from absl import flags

from launch.plan import Plan, Unit

ENGINES = ('local', 'slurm', 'tpu_vm', 'gke', 'skypilot')  # modules of this package


class Engine(Protocol):
  """The functions of an engine's module. Its import is light: it happens for every command line."""

  def define(self, values: flags.FlagValues) -> None:
    """Defines the engine's own flags, each named `<engine>_...`."""

  def check(self, plan: Plan, options: flags.FlagValues) -> None:
    """ConfigError if the flags cannot be meant: a topology that does not exist, say. Runs no command."""

  def show(self, plan: Plan, units: Sequence[Unit], options: flags.FlagValues) -> str:
    """For --dry_run: the exact commands and files of `run`, ready for a shell. Needs none of its tools."""
    ...

  def ready(self, plan: Plan, options: flags.FlagValues) -> None:
    """ConfigError if this cannot run here and now: a tool is not installed (which, and how to get it), bad data.

    Called before anything is written to the workdir, and not for --dry_run.
    """

  def run(self, plan: Plan, units: Sequence[Unit], options: flags.FlagValues) -> int:
    """Starts the units, those after others in their time. Returns 0, 1 or 42 once they ended, 0 if they are queued."""
    ...


def engine(name: str) -> Engine:
  return cast(Engine, importlib.import_module(f'launch.{name}'))
