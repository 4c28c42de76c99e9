"""What a workdir already holds of a launch: arms of an earlier version, and arms that other code made."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags

from launch.plan import Plan
from slm_jax.ablate import why
from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.adopt import adopt, find_adoptable
from slm_jax.ablate.arms import Arm
from slm_jax.config import ConfigError


def adopt_recorded(workdir: Path, arms: Sequence[Arm], options: flags.FlagValues) -> Mapping[str, str]:
  """Renames what an earlier version recorded of these arms. Returns what a dry run would rename: `find_adoptable`.

  Workers rename nothing: the launch that started them has done so, and several of them may start at once.
  """
  found = find_adoptable(workdir, arms) if not options.arm else {}
  if not found:
    return {}
  about = f'{len(found)} arms were recorded by an earlier version under other ids'
  if options.dry_run:
    print(f'{about}; a launch renames them, and does not train them again')
    return found
  with workdirs.lock(workdir):
    adopt(workdir, arms, found)
  print(f'{about}; they have their new ids now, and are not trained again')
  return {}


def rerun_outdated(plan: Plan, options: flags.FlagValues) -> Plan:
  """Warns of finished arms that this code would not make as they are. With --rerun, they are no longer done.

  What builds on such an arm is made again as well. The folders go to WORKDIR/replaced. ConfigError without --rerun if
  a setting of an arm was recorded with another value.
  """
  outdated = why.made_by_other_code(plan.arms, plan.workdir, plan.code)
  redefined = why.made_with_other_settings(plan.arms, plan.workdir)
  for arm in plan.arms:
    if arm.arm_id in redefined and not options.rerun:
      raise ConfigError(
        f'{arm.title}: was made with {"; ".join(redefined[arm.arm_id])}, a default that has changed;'
        ' --rerun makes it again, another --workdir keeps both'
      )
  if not options.rerun:
    if outdated:
      print(why.drift(plan.arms, outdated))
    return plan
  again: dict[str, None] = {}
  for arm in plan.arms:  # parents first
    unlike = arm.arm_id in outdated or arm.arm_id in redefined or any(p in again for p in arm.parents.values())
    if unlike and workdirs.folder(plan.workdir, arm.arm_id).exists():
      again[arm.arm_id] = None
  print(f'--rerun: {len(again)} arms are made again; their results so far go to {plan.workdir / "replaced"}')
  if options.dry_run:
    return plan._replace(again=frozenset(again))
  with workdirs.lock(plan.workdir):
    for arm_id in again:
      with workdirs.lock(workdirs.folder(plan.workdir, arm_id)), workdirs.writing(plan.workdir):
        workdirs.set_aside(plan.workdir, arm_id)
  return plan
