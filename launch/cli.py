"""The command line of every experiment file.

    python -m experiments.NAME [--config.a.b=v ...] [--sweep=name] [--workdir=DIR] [--launch=local] [--dry_run]

A wrong flag, key, value or combination is one line on stderr and exit code 1, before anything is compiled or written.
"""

import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from absl import flags

from launch import worker
from launch.engines import ENGINES, Engine, engine
from launch.plan import Plan, experiment_name, units
from slm_jax.ablate import report
from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.arms import Arm, base_config, expand, shown, sweeps_of
from slm_jax.config import ConfigError, flatten, require
from slm_jax.preempt import EXIT_DONE, EXIT_FAILED

PREFIX = '--config.'


def main(
  module: ModuleType | None = None, argv: Sequence[str] | None = None, *, train: worker.Train | None = None
) -> NoReturn:
  """Runs the experiment `module` (the one that was started, unless given) as the command line says, and exits.

  train: what trains one arm, `slm_jax.train.run` unless given.
  """
  try:
    code = launch(module or sys.modules['__main__'], sys.argv[1:] if argv is None else argv, train)
  except (ConfigError, flags.Error) as error:
    print('error:', ' '.join(str(error).split()), file=sys.stderr)
    code = EXIT_FAILED
  sys.exit(code)


def launch(module: ModuleType, argv: Sequence[str], train: worker.Train | None = None) -> int:
  """The exit code: 0 if all arms are done (or there was only something to show), 1, or 42 to be started again."""
  # ---- what is asked for
  overrides, rest = split_overrides(argv)
  options = parse(rest, experiment_name(module))
  if options.help:
    print(help_text(module, options))
    return EXIT_DONE

  # ---- is it possible?
  workdir = Path(options.workdir)
  workdirs.check_workdir(workdir, experiment_name(module))
  everyone = expand(module, options.sweep, overrides)
  chosen = [f'--sweep={options.sweep}'] if options.sweep else []
  chosen += [f'{PREFIX}{key}={value}' for key, value in overrides.items()]
  plan = Plan(module, workdir, everyone, chosen, baseline(module, everyone))
  chosen_engine = engine(options.launch)
  chosen_engine.check(plan, options)
  arms = [find(plan, arm_id) for arm_id in options.arm or ()]
  for line in remarks(plan, overrides):
    print(line)

  # ---- do it
  if options.dry_run:
    from launch.dry_run import describe  # needs jax, to count and to measure

    asked = plan._replace(arms=arms or everyone)
    print(describe(asked, {arm.arm_id: arm for arm in everyone}))
    print(f'\n{chosen_engine.show(asked, units(asked, options.arms_per_job), options)}')
    return EXIT_DONE
  if arms:
    return run_some(plan, arms, train)
  return run_all(plan, chosen_engine, options, train)


def run_all(plan: Plan, engine: Engine, options: flags.FlagValues, train: worker.Train | None) -> int:
  """Runs what is missing, then the report. Where nothing is, says so and writes nothing."""
  n, missing = len(plan.arms), [arm for arm in plan.arms if not workdirs.is_done(plan.workdir, arm.arm_id)]
  if not missing and not is_stale(plan):
    print(f'all {n} arms are done; nothing to do\n\n{report.summary(plan.workdir, report.latest(plan.workdir))}')
    print(f'\n{plan.workdir / "report.html"}')
    return EXIT_DONE
  print(f'{plan.name}: {n} arms in {plan.workdir}, {n - len(missing)} done, {len(missing)} to run')
  if train is None:
    engine.ready(plan, options)
  with workdirs.lock(plan.workdir):
    plan.record()
    if train:
      code = worker.run_arms(plan.arms, plan.workdir, train=train, fail_fast=options.fail_fast)
    else:
      code = engine.run(plan, units(plan, options.arms_per_job), options)
    if code in (EXIT_DONE, EXIT_FAILED):
      conclude(plan)
  return code


def run_some(plan: Plan, arms: Sequence[Arm], train: worker.Train | None) -> int:
  """What a worker does: the given arms, each under its own lock, and no report."""
  own = {arm.arm_id for arm in arms}
  for arm in arms:
    if workdirs.is_done(plan.workdir, arm.arm_id):
      print(f'{arm.name} ({arm.arm_id}) is done; nothing to do')
      continue
    for parent in arm.parents.values():
      done = parent in own or workdirs.is_done(plan.workdir, parent)
      require(done, f'--arm={arm.arm_id}: builds on {parent}, which is not done in {plan.workdir}; run that one first')
  recorded = workdirs.read_experiment(plan.workdir)
  if recorded is None or not own.issubset(recorded.arms):
    with workdirs.lock(plan.workdir):
      plan.record()
  return worker.run_arms(arms, plan.workdir, train=train)


def is_stale(plan: Plan) -> bool:
  """Whether the report does not show what is there: a launch was cut off before it, or asked for something else."""
  page = plan.workdir / 'report.html'
  recorded = workdirs.read_experiment(plan.workdir)
  if not page.exists() or recorded is None or recorded != plan.experiment():
    return True
  if callable(getattr(plan.module, 'report', None)) and not recorded.answer:
    return True
  ends = [(workdirs.folder(plan.workdir, arm.arm_id) / 'DONE').stat().st_mtime for arm in plan.arms]
  return max(ends) > page.stat().st_mtime


def conclude(plan: Plan) -> None:
  """The experiment's own report(rows), if it has one and all arms are done, and the report around it."""
  rows = report.latest(plan.workdir)
  answer = ''
  try:
    if callable(getattr(plan.module, 'report', None)) and all(row.status == 'done' for row in rows):
      answer = str(plan.module.report(rows))
  finally:  # also where that has a bug
    with workdirs.writing(plan.workdir):
      workdirs.write_experiment(plan.workdir, plan.experiment()._replace(answer=answer))
    print(f'\n{report.publish(plan.workdir)}')


# ------------------------------------------------------------------------------------------------------- the flags


def split_overrides(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
  """`({'a.b': 'v'}, the other arguments)` of `--config.a.b=v` and `--config.a.b v`."""
  overrides, rest, arguments = {}, [], iter(argv)
  for argument in arguments:
    if not argument.startswith((PREFIX, PREFIX[1:])):
      rest.append(argument)
      continue
    key, equals, value = argument.lstrip('-').removeprefix('config.').partition('=')
    if not equals:
      value = next(arguments, '--')
      require(not value.startswith('--'), f'{PREFIX}{key}: needs a value, as in {PREFIX}{key}=VALUE')
    overrides[key] = value
  return overrides, rest


def parse(argv: Sequence[str], name: str) -> flags.FlagValues:
  """The flags of a launch. Raises flags.Error or ConfigError for anything else."""
  values = flags.FlagValues()
  text = 'which sweep to run: NAME of a sweep_NAME(), several as A,B for their product, none for the base alone'
  flags.DEFINE_string('sweep', None, text, flag_values=values)
  flags.DEFINE_string('workdir', f'runs/{name}', 'folder of the results', flag_values=values)
  flags.DEFINE_enum('launch', 'local', list(ENGINES), 'engine', flag_values=values)
  flags.DEFINE_bool(
    'dry_run', False, 'show the arms, what they take and their commands; write nothing', flag_values=values
  )
  flags.DEFINE_list(
    'arm', None, 'run only the arms with these ids, here and now: what a worker does', flag_values=values
  )
  flags.DEFINE_integer('arms_per_job', 1, 'arms that one worker runs back to back', 1, flag_values=values)
  flags.DEFINE_bool('fail_fast', False, 'stop at the first arm that fails', flag_values=values)
  flags.DEFINE_bool('help', False, 'show this', short_name='h', flag_values=values)
  for name in ENGINES:
    engine(name).define(values)
  values.set_gnu_getopt(True)
  stray = values([name, *argv])[1:]
  require(not stray, f'{" ".join(stray)!r}: not a flag; settings are given as {PREFIX}KEY=VALUE')
  return values


def help_text(module: ModuleType, options: flags.FlagValues) -> str:
  lines = [(module.__doc__ or experiment_name(module)).strip(), '', 'Flags:']
  for flag in (options[name] for name in dict.fromkeys(options[key].name for key in options) if name != 'help'):
    default = '' if flag.default in (None, False) else f' (default: {flag.default})'
    lines.append(f'  --{flag.name}: {flag.help}{default}')
  lines += ['', 'Sweeps:']
  for name, function in sweeps_of(module).items():
    about = (inspect.getdoc(function) or '').partition('\n')[0]
    lines.append(f'  {name}: {about}' if about else f'  {name}')
  lines += ['', 'Settings:']
  lines += [f'  {PREFIX}{key}={shown(value)}' for key, value in flatten(base_config(module)).items()]
  return '\n'.join(lines)


# ------------------------------------------------------------------------------------------------ about the arms


def baseline(module: ModuleType, arms: Sequence[Arm]) -> str:
  """The module's BASELINE if this sweep has such an arm, else the first arm that no other builds on."""
  wanted = getattr(module, 'BASELINE', '')
  if any(arm.name == wanted for arm in arms):
    return wanted
  parents = {parent for arm in arms for parent in arm.parents.values()}
  return next(arm.name for arm in arms if arm.arm_id not in parents)


def find(plan: Plan, arm_id: str) -> Arm:
  """The arm of that id; ConfigError if there is none."""
  for arm in plan.arms:
    if arm.arm_id == arm_id:
      return arm
  raise ConfigError(f'--arm={arm_id}: not among the {len(plan.arms)} arms of this sweep; --dry_run shows their ids')


def remarks(plan: Plan, overrides: Mapping[str, str]) -> list[str]:
  """What a user may not expect, and is told."""
  lines = [
    f'{arm.name!r} and {", ".join(map(repr, arm.aliases))} are the same arm, run once'
    for arm in plan.arms
    if arm.aliases
  ]
  for key in overrides:
    if all(any(k == key or k.startswith(f'{key}.') for k in arm.diff) for arm in plan.arms):
      lines.append(f'{PREFIX}{key} has no effect: every arm of the sweep sets it')
  wanted = getattr(plan.module, 'BASELINE', None)
  if wanted and wanted != plan.baseline:
    lines.append(f'BASELINE {wanted!r} is not in this sweep; the others are compared with {plan.baseline!r}')
  return lines
