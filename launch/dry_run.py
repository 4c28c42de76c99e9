"""What a launch would do, as text."""

from collections.abc import Mapping

from launch.plan import Plan
from slm_jax.ablate import cost, table
from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.arms import Arm, shown
from slm_jax.ablate.sweep import SEEDS


def describe(plan: Plan, everyone: Mapping[str, Arm]) -> str:
  """The table of the plan's arms and their commands. everyone: all arms of the sweep, `{arm id: Arm}`."""
  costs = cost.predict(everyone)
  rows = [
    ('state', 'arm', 'name', 'seed', 'builds on', 'params', 'tokens', 'FLOPs', '~seconds', 'differs from the base in')
  ]
  for arm in plan.arms:
    parameters, tokens, flops, seconds = costs[arm.arm_id]
    differs = [f'{key}={shown(here)}' for key, (_, here) in arm.diff.items() if key not in SEEDS]
    rows.append(
      (
        'done' if workdirs.is_done(plan.workdir, arm.arm_id) else 'missing',
        arm.arm_id,
        arm.name,
        str(arm.config.seed),
        ', '.join(dict.fromkeys(everyone[p].name for p in arm.parents.values())) or '–',
        table.short(parameters),
        table.short(tokens),
        table.short(flops),
        f'{seconds:.0f}',
        ', '.join(differs) or '–',
      )
    )
  missing = [costs[arm.arm_id] for arm in plan.arms if not workdirs.is_done(plan.workdir, arm.arm_id)]
  flops, seconds = sum(c.flops for c in missing), sum(c.seconds for c in missing)
  return '\n'.join(
    [
      table.columns(rows, right=(3, 5, 6, 7, 8)),
      '',
      f'{len(plan.arms)} arms, {len(missing)} to run: {table.short(flops)} FLOPs, about {seconds / 60:.1f} minutes'
      f' (an estimate, without evaluation and compilation: at {cost.basis()})',
    ]
  )
