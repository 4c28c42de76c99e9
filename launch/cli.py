"""The command line of every experiment file.

    python -m experiments.NAME [--config.a.b=v ...] [--sweep=name] [--only=arm,...] [--workdir=DIR] [--dry_run]

A wrong flag, key, value or combination is one line on stderr and exit code 1, before anything is compiled or written.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import NoReturn

from absl import flags

from launch import budgets, search, unused, worker
from launch.engines import Engine, engine
from launch.existing import adopt_recorded, rerun_outdated
from launch.options import PREFIX, help_text, parse, split_overrides
from launch.plan import Plan, experiment_name, units
from launch.remarks import damaged, remarks, warmups
from slm_jax import commands, distributed, notices, run_files
from slm_jax.ablate import claims, report, why
from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.arms import MANY, Arm, expand
from slm_jax.ablate.choose import choose
from slm_jax.ablate.results import Row
from slm_jax.ablate.search import outcome
from slm_jax.config import ConfigError, is_unicode, require
from slm_jax.files import expanded
from slm_jax.preempt import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED
from slm_jax.revision import experiment_files, hash_files


def main(
  module: ModuleType | None = None, argv: Sequence[str] | None = None, *, train: worker.Train | None = None
) -> NoReturn:
  """Runs the experiment `module` (the one that was started, unless given) as the command line says, and exits.

  train: what trains one arm, `slm_jax.train.run` unless given.
  """
  commands.show_any_text()
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
  notices.begin()
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
  adoptable = adopt_recorded(workdir, everyone, options)
  chosen = choose(
    everyone,
    only=options.only or (),
    exclude=options.exclude or (),
    limit=options.limit,
    is_done=lambda arm_id: workdirs.is_done(workdir, adoptable.get(arm_id, arm_id)),
  )
  words, first, files = which(options, overrides), baseline(module, chosen.arms), experiment_files(module)
  choice = [f'--{name}={options[name].value}' for name in ('only', 'exclude', 'limit') if options[name].value]
  plan = Plan(
    module,
    workdir,
    chosen.arms,
    words,
    first,
    everyone,
    adoptable,
    choice=choice,
    files=files,
    code=hash_files(files),
    own_train=train is not None,
  )
  for word in plan.argv():
    require(is_unicode(word), f'{word!r}: must be Unicode text; the name of a file must be UTF-8')
  chosen_engine.check(plan, options)
  budgets.check(options)
  unused.check(options)
  arms = [find(plan, arm_id) for arm_id in options.arm or ()]
  alone = options.distributed in ('auto', 'off')
  require(bool(arms) or alone, f'--distributed={options.distributed}: is for workers, which have --arm=ID')
  told = [*remarks(plan, everyone, chosen.along, overrides), *warmups(arms or plan.arms)]
  for line in [*told, *([] if arms else damaged(plan))]:
    print(line)
  if not arms:
    budgets.check_price(plan, options)
    plan = rerun_outdated(plan, options)

  # ---- do it
  if options.dry_run:
    from launch.dry_run import describe  # needs jax, to count and to measure

    asked = plan._replace(arms=arms or plan.arms)
    if options.launch == 'local' and not options.device:
      worker.check_memory(asked.arms, plan.workdir)
    on, paces = budgets.predicting(asked, options)
    print(describe(asked, on, paces, budgets.processes(asked, options, on)))
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
    workdir = expanded(options.workdir)
    return search.arms(module, options, overrides, adopt=lambda arms: adopt_recorded(workdir, arms, options))
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
    print(f'all {n} arms are done; nothing to do\n\n{report.summary(plan.workdir)}')
    print_best(plan, options)
    return EXIT_DONE
  about = f'a search for {options.search} trials, so far ' if options.search else ''
  again = sum(plan.is_done(arm.arm_id) for arm in missing)
  words = f'{n} arms in {plan.workdir}, {n - len(missing)} done, {len(missing) - again} to run'
  words += f', {again} to evaluate again, since settings of evaluation have changed' * (again > 0)
  print(f'{plan.name}: {about}{words}')
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
  return [arm for arm in plan.arms if not plan.is_finished(arm.arm_id)]


def run_some(plan: Plan, arms: Sequence[Arm], options: flags.FlagValues, train: worker.Train | None) -> int:
  """What a worker does: the given arms, each under its own lock, and no report."""
  distributed.check_shared(plan.workdir)
  distributed.on_main(note, plan, arms)
  return worker.run_arms(arms, plan.workdir, train=train, code=plan.code, admit=budgets.admission(plan, options))


def note(plan: Plan, arms: Sequence[Arm]) -> None:
  """Sees to it that what is about to run can be, and stands in experiment.json."""
  own = {arm.arm_id for arm in arms}
  for arm in arms:
    if plan.is_finished(arm.arm_id):
      print(f'{arm.name} ({arm.arm_id}) is done; nothing to do')
      continue
    for parent in arm.parents.values():
      done = parent in own or plan.is_done(parent)
      require(done, f'--arm={arm.arm_id}: builds on {parent}, which is not done in {plan.workdir}; run that one first')
  recorded = workdirs.read_experiment(plan.workdir)
  if recorded is None or not own.issubset(recorded.arms):
    plan.record()


def is_stale(plan: Plan) -> bool:
  """Whether the report does not show what is there: a launch was cut off before it, or asked for something else."""
  recorded = workdirs.read_experiment(plan.workdir)
  if recorded is None or recorded != plan.experiment():
    return True
  pages = report.pages_of(plan.workdir, recorded)
  if not all(page.exists() for page in pages):
    return True
  if own_report(plan) and not (recorded.latest.answer or recorded.latest.claims):
    return True
  if any(run_files.read_config(workdirs.folder(plan.workdir, arm.arm_id))[1] for arm in plan.arms):
    return True
  done = [arm.arm_id for arm in plan.arms if plan.is_done(arm.arm_id)]
  ends = [(workdirs.folder(plan.workdir, arm_id) / 'DONE').stat().st_mtime for arm_id in done]
  return max(ends, default=0) > min(page.stat().st_mtime for page in pages)


def own_report(plan: Plan) -> Callable[[Sequence[Row]], object] | None:
  """The experiment's report(rows), if it has one and this launch has all the arms that it is about."""
  whole = plan.is_whole and '--sweep=none' not in plan.options
  return getattr(plan.module, 'report', None) if whole else None


def conclude(plan: Plan) -> None:
  """Asks the experiment's own report, once all arms have ended, decides its claims, and writes the report."""
  rows = report.latest(plan.workdir)
  answer, ask = claims.Answer(), own_report(plan)
  if not ask and hasattr(plan.module, 'report'):
    print("the experiment's own report is of a whole sweep, and left out")
  try:
    if ask and all(row.ended for row in rows):
      answer = claims.answer_of(ask(rows))
  finally:  # also where that has a bug
    with workdirs.recording(plan.workdir):
      experiment, decided = plan.experiment(), tuple(claim._asdict() for claim in answer.claims)
      latest = experiment.latest._replace(answer=answer.text, claims=decided)
      workdirs.write_experiment(plan.workdir, experiment.with_launch(latest))
    print(f'\n{report.publish(plan.workdir)}')


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
