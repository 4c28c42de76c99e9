"""The command line of every experiment file.

    python -m experiments.NAME [--config.a.b=v ...] [--sweep=name] [--only=arm,...] [--workdir=DIR] [--dry_run]

A wrong flag, key, value or combination is one line on stderr and exit code 1, before anything is compiled or written.
"""

import inspect
import math
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

from absl import flags

from launch import budgets, search, worker
from launch.engines import ENGINES, Engine, engine
from launch.plan import Plan, experiment_name, units
from slm_jax import distributed
from slm_jax.ablate import report, why
from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.arms import MANY, Arm, base_config, expand, shown, sweeps_of
from slm_jax.ablate.choose import choose
from slm_jax.ablate.results import Row
from slm_jax.ablate.search import outcome
from slm_jax.config import ConfigError, flatten, require
from slm_jax.files import expanded
from slm_jax.preempt import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED

PREFIX = '--config.'
FEW = 5  # remarks of a kind


def main(
  module: ModuleType | None = None, argv: Sequence[str] | None = None, *, train: worker.Train | None = None
) -> NoReturn:
  """Runs the experiment `module` (the one that was started, unless given) as the command line says, and exits.

  train: what trains one arm, `slm_jax.train.run` unless given.
  """
  code = EXIT_FAILED
  try:
    code = launch(module or sys.modules['__main__'], sys.argv[1:] if argv is None else argv, train)
  except (ConfigError, flags.Error) as error:
    print('error:', ' '.join(str(error).split()), file=sys.stderr)
  finally:
    distributed.leave(code)
  sys.exit(code)


def launch(module: ModuleType, argv: Sequence[str], train: worker.Train | None = None) -> int:
  """The exit code: 0 if all arms are done (or there was only something to show), 1, or 42 to be started again."""
  # ---- what is asked for
  overrides, rest = split_overrides(argv)
  options = parse(rest, experiment_name(module))
  if options.profile:
    overrides['run.profile'] = options.profile
  if options.help:
    print(help_text(module, options))
    return EXIT_DONE

  # ---- is it possible?
  workdir = expanded(options.workdir)
  workdirs.check_workdir(workdir, experiment_name(module))
  chosen_engine = engine(options.launch)
  everyone = arms_of(module, options, overrides)
  if options.why:
    print(why.explain(options.why, everyone, workdir))
    return EXIT_DONE
  chosen = choose(
    everyone,
    only=options.only or (),
    exclude=options.exclude or (),
    limit=options.limit,
    is_done=lambda arm_id: workdirs.is_done(workdir, arm_id),
  )
  plan = Plan(module, workdir, chosen.arms, which(options, overrides), baseline(module, chosen.arms), everyone)
  chosen_engine.check(plan, options)
  budgets.check(options)
  arms = [find(plan, arm_id) for arm_id in options.arm or ()]
  alone = options.distributed in ('auto', 'off')
  require(bool(arms) or alone, f'--distributed={options.distributed}: is for workers, which have --arm=ID')
  for line in [*remarks(plan, everyone, chosen.along, overrides), *warmups(arms or plan.arms)]:
    print(line)

  # ---- do it
  if options.dry_run:
    from launch.dry_run import describe  # needs jax, to count and to measure

    asked = plan._replace(arms=arms or plan.arms)
    print(describe(asked, *budgets.predicting(asked, options)))
    asked = budgets.within(asked, options)
    print(f'\n{chosen_engine.show(asked, units(asked, options.arms_per_job), options)}')
    return EXIT_DONE
  if arms:
    distributed.start(options.distributed)
    return run_some(plan, arms, options, train)
  return run_all(plan, chosen_engine, options, overrides, train)


def arms_of(module: ModuleType, options: flags.FlagValues, overrides: Mapping[str, str]) -> list[Arm]:
  """All arms of the sweep; of a search, those that the results so far ask for."""
  if options.search:
    return search.arms(module, options, overrides)
  limit = math.inf if options.yes else MANY
  return expand(module, options.sweep, overrides, seeds=options.seeds or 0, limit=limit)


def which(options: flags.FlagValues, overrides: Mapping[str, str]) -> list[str]:
  """The part of the command line that decides what the arms are: for the workers' command lines."""
  names = ['sweep', 'seeds', *(['search', 'search_round'] if options.search else [])]
  words = [f'--{name}={options[name].value}' for name in names if options[name].value]
  words += ['--yes'] * options.yes + budgets.chosen(options)
  return words + [f'{PREFIX}{key}={value}' for key, value in overrides.items()]


def run_all(
  plan: Plan, engine: Engine, options: flags.FlagValues, overrides: Mapping[str, str], train: worker.Train | None
) -> int:
  """Runs what is missing, then the report. Where nothing is, says so and writes nothing."""
  n, missing = len(plan.arms), unfinished(plan, options)
  if not missing and not is_stale(plan):
    print(f'all {n} arms are done; nothing to do\n\n{report.summary(plan.workdir, report.latest(plan.workdir))}')
    print(f'\n{plan.workdir / "report.html"}')
    print_best(plan, options)
    return EXIT_DONE
  about = f'a search for {options.search} trials, so far ' if options.search else ''
  print(f'{plan.name}: {about}{n} arms in {plan.workdir}, {n - len(missing)} done, {len(missing)} to run')
  plan = budgets.within(plan, options)
  plan = plan._replace(baseline=baseline(plan.module, plan.arms))
  if train is None:
    engine.ready(plan, options)
  with workdirs.lock(plan.workdir):
    plan.record()
    if options.search:
      plan, code = run_search(plan, engine, options, overrides, train)
    else:
      code = run_plan(plan, engine, options, train)
    if code in (EXIT_DONE, EXIT_FAILED):
      conclude(plan)
  print_best(plan, options)
  return code


def print_best(plan: Plan, options: flags.FlagValues) -> None:
  if options.search and (best := search.best(plan.arms, plan.workdir)):
    print(best)


def run_plan(plan: Plan, engine: Engine, options: flags.FlagValues, train: worker.Train | None) -> int:
  if train:
    admit = budgets.admission(plan, options)
    return worker.run_arms(plan.arms, plan.workdir, train=train, admit=admit, fail_fast=options.fail_fast)
  return engine.run(plan, units(plan, options.arms_per_job), options)


def run_search(
  plan: Plan, engine: Engine, options: flags.FlagValues, overrides: Mapping[str, str], train: worker.Train | None
) -> tuple[Plan, int]:
  """Runs a search to its end, or until a trial fails: the plan with all of its arms, and the exit code."""
  codes = []
  told = {arm.arm_id for arm in plan.arms}  # at the start of the launch

  def run(found: list[Arm], missing: list[Arm]) -> None:
    for line in warmups([arm for arm in missing if arm.arm_id not in told]):
      print(line)
    plan._replace(arms=found).record()
    codes.append(run_plan(plan._replace(arms=missing, sweep=found), engine, options, train))

  found = search.arms(plan.module, options, overrides, run)
  plan = plan._replace(arms=found, sweep=found)
  if not unfinished(plan, options):
    return plan, EXIT_DONE
  return plan, EXIT_PREEMPTED if EXIT_PREEMPTED in codes else EXIT_FAILED


def unfinished(plan: Plan, options: flags.FlagValues) -> list[Arm]:
  """The arms to run. To a search, that a run diverged is a result like another: it is not tried again."""
  if options.search:
    return [arm for arm in plan.arms if outcome(plan.workdir, arm.arm_id) is None]
  return [arm for arm in plan.arms if not workdirs.is_done(plan.workdir, arm.arm_id)]


def run_some(plan: Plan, arms: Sequence[Arm], options: flags.FlagValues, train: worker.Train | None) -> int:
  """What a worker does: the given arms, each under its own lock, and no report."""
  distributed.check_shared(plan.workdir)
  distributed.on_main(note, plan, arms)
  return worker.run_arms(arms, plan.workdir, train=train, admit=budgets.admission(plan, options))


def note(plan: Plan, arms: Sequence[Arm]) -> None:
  """Sees to it that what is about to run can be, and stands in experiment.json."""
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


def is_stale(plan: Plan) -> bool:
  """Whether the report does not show what is there: a launch was cut off before it, or asked for something else."""
  page = plan.workdir / 'report.html'
  recorded = workdirs.read_experiment(plan.workdir)
  if not page.exists() or recorded is None or recorded != plan.experiment():
    return True
  if own_report(plan) and not recorded.answer:
    return True
  done = [arm.arm_id for arm in plan.arms if workdirs.is_done(plan.workdir, arm.arm_id)]
  ends = [(workdirs.folder(plan.workdir, arm_id) / 'DONE').stat().st_mtime for arm_id in done]
  return max(ends, default=0) > page.stat().st_mtime


def own_report(plan: Plan) -> Callable[[Sequence[Row]], object] | None:
  """The experiment's report(rows), if it has one and this launch has all the arms that it is about."""
  whole = plan.everyone.keys() == {arm.arm_id for arm in plan.arms} and '--sweep=none' not in plan.options
  return getattr(plan.module, 'report', None) if whole else None


def conclude(plan: Plan) -> None:
  """The experiment's own report of the rows, once all arms are done, and the report around it."""
  rows = report.latest(plan.workdir)
  answer, ask = '', own_report(plan)
  if not ask and hasattr(plan.module, 'report'):
    print("the experiment's own report is of a whole sweep, and left out")
  try:
    if ask and all(row.status == 'done' for row in rows):
      answer = str(ask(rows))
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
  flags.DEFINE_integer('seeds', None, 'repeat a sweep that sets no seeds with so many', 1, flag_values=values)
  text = 'only these arms: names, beginnings of ids or key=value, with * and ?; what they build on comes along'
  flags.DEFINE_list('only', None, text, flag_values=values)
  flags.DEFINE_list('exclude', None, 'all arms but these, given as for --only', flag_values=values)
  flags.DEFINE_integer('limit', None, 'the first so many arms, and what they build on', 1, flag_values=values)
  flags.DEFINE_bool('yes', False, f'more than {MANY:,} arms are meant', flag_values=values)
  text = 'let search(trial) ask for so many arms, each in view of the losses before it; needs Optuna'
  flags.DEFINE_integer('search', None, text, 1, flag_values=values)
  flags.DEFINE_integer('search_round', 1, 'trials that a search asks for at a time', 1, flag_values=values)
  text = 'ID1,ID2: show the settings in which the ids of two arms differ, of this sweep or in the workdir'
  flags.DEFINE_list('why', None, text, flag_values=values)
  flags.DEFINE_string('workdir', f'runs/{name}', 'folder of the results', flag_values=values)
  flags.DEFINE_enum('launch', 'local', list(ENGINES), 'engine', flag_values=values)
  flags.DEFINE_bool(
    'dry_run', False, 'show the arms, what they take and their commands; write nothing', flag_values=values
  )
  flags.DEFINE_list(
    'arm', None, 'run only the arms with these ids, here and now: what a worker does', flag_values=values
  )
  text = 'whether this worker is one of several processes that train an arm together: as JAX detects it (auto; on: or'
  text += ' end), off, or ADDRESS:PORT,COUNT,INDEX'
  flags.DEFINE_string('distributed', 'auto', text, flag_values=values)
  flags.DEFINE_integer(
    'arms_per_job',
    0,
    'arms that one worker runs (default: one, or its share of those that can train in one program)',
    0,
    flag_values=values,
  )
  text = 'FIRST,LAST: take an XProf trace of these steps of each arm (--config.run.profile)'
  flags.DEFINE_string('profile', '', text, flag_values=values)
  flags.DEFINE_bool('fail_fast', False, 'stop at the first arm that fails', flag_values=values)
  budgets.define(values)
  flags.DEFINE_bool('help', False, 'show this', short_name='h', flag_values=values)
  for name in ENGINES:
    engine(name).define(values)
  values.set_gnu_getopt(True)
  stray = values([name, *argv])[1:]
  require(not stray, f'{" ".join(stray)!r}: not a flag; settings are given as {PREFIX}KEY=VALUE')
  for name in ('sweep', 'only', 'exclude', 'why', 'workdir', 'arm'):  # an unset variable of a shell means nothing
    require(bool(values[name].value) or not values[name].present, f'--{name}: needs a value')
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
  lines += [f'  {PREFIX}{key}={_as_given(value)}' for key, value in flatten(base_config(module)).items()]
  return '\n'.join(lines)


def _as_given(value: Any) -> str:
  """A value as the command line takes it, if it can be given there."""
  if value is None:
    return ''
  return ','.join(map(shown, value)) if isinstance(value, list) else shown(value)


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


def remarks(plan: Plan, everyone: Sequence[Arm], along: Sequence[Arm], overrides: Mapping[str, str]) -> list[str]:
  """What a user may not expect, and is told."""
  merged = dict.fromkeys((arm.name, arm.aliases) for arm in everyone if arm.aliases)
  lines = [f'{name!r} and {", ".join(map(repr, aliases))} are the same arm, run once' for name, aliases in merged]
  if len(lines) > FEW:
    lines = [*lines[: FEW - 1], f'and {len(lines) - FEW + 1} more arms are the same as others, and run once']
  if along:
    names = ', '.join(dict.fromkeys(repr(arm.name) for arm in along))
    lines.append(f'{names}: not done, and the chosen arms build on it; {len(along)} more to run')
  for key in overrides:
    if all(any(k == key or k.startswith(f'{key}.') for k in arm.diff) for arm in everyone):
      lines.append(f'{PREFIX}{key} has no effect: every arm of the sweep sets it')
  wanted = getattr(plan.module, 'BASELINE', None)
  if wanted and wanted != plan.baseline:
    lines.append(f'BASELINE {wanted!r} is not in this sweep; the others are compared with {plan.baseline!r}')
  changed = why.drift(plan.arms, plan.workdir)
  return [*lines, changed] if changed else lines


def warmups(arms: Sequence[Arm]) -> list[str]:
  """Returns warnings about warm-ups that leave no step, or no step but one, at the peak learning rate."""
  lines = []
  for effect, test in (
    ('it never reaches its peak learning rate', operator.lt),
    ('only its last step reaches its peak learning rate', operator.eq),
  ):
    found = [arm for arm in arms if arm.config.train.steps and test(arm.config.train.steps, arm.config.optim.warmup)]
    if found:
      name, steps, warmup = found[0].name, found[0].config.train.steps, found[0].config.optim.warmup
      also = f' ({len(found) - 1} more {"run does" if len(found) == 2 else "runs do"} the same)' * (len(found) > 1)
      length = f'{steps} step{"s" * (steps > 1)}'
      lines.append(f'warning: run {name!r} trains for {length} but warms up for {warmup}, so {effect}{also}')
  return lines
