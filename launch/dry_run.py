"""What a launch would do, as text."""

from collections.abc import Mapping, Sequence

from launch.plan import Plan
from slm_jax import chips
from slm_jax.ablate import cost, table
from slm_jax.ablate.arms import show_apart
from slm_jax.ablate.cost import Cost, Device, Programs
from slm_jax.ablate.measure import Pace
from slm_jax.ablate.sweep import SEEDS

# {(is it done, is it finished): word}; done and not finished is evaluated again
STATES = {(False, False): 'missing', (True, False): 'evaluate', (True, True): 'done'}


def describe(plan: Plan, on: Device, paces: Mapping[str, Pace], processes: Sequence[Programs]) -> str:
  """The table of the plan's arms, and what those that are missing take. on, paces, processes: see `cost.predict`."""
  everyone = plan.everyone
  costs = cost.predict(everyone, on, paces, hardware=True, processes=processes)
  head = ('state', 'arm', 'name', 'seed', 'builds on', 'params', 'slots', 'FLOPs', 'executed', '~seconds', '~$')
  rows = [(*head, 'differs from the base in')]
  for arm in plan.arms:
    c = costs[arm.arm_id]
    differs = [f'{key}={show_apart(pair)[1]}' for key, pair in arm.diff.items() if key not in SEEDS]
    rows.append(
      (
        STATES[plan.is_done(arm.arm_id), plan.is_finished(arm.arm_id)],
        arm.arm_id,
        arm.name,
        str(arm.config.seed),
        ', '.join(dict.fromkeys(everyone[p].name for p in arm.parents.values())) or '–',
        table.short(c.parameters),
        table.short(c.slots),
        table.short(c.flops),
        table.short(c.hardware_flops),
        f'{c.seconds:.0f}',
        table.number(c.dollars, '.2f'),
        ', '.join(differs) or '–',
      )
    )
  return '\n'.join([table.columns(rows, right=(3, 5, 6, 7, 8, 9, 10)), '', *_together(plan, costs, on, processes)])


def _together(plan: Plan, costs: Mapping[str, Cost], on: Device, processes: Sequence[Programs]) -> list[str]:
  """What the missing arms take, and where the figures are from."""
  missing = [costs[arm.arm_id] for arm in plan.arms if not plan.is_done(arm.arm_id)]
  several = sum(len(program) > 1 for programs in processes for program in programs)
  prices = {chips.price(on.kind, arm.config.run.price)[1] for arm in plan.arms}

  def add(field: str) -> float:
    return sum(getattr(each, field) or 0.0 for each in missing)

  return [
    f'{len(plan.arms)} arms, {len(missing)} to run: {table.short(add("flops"))} FLOPs,'
    f' about {add("seconds") / 60:.1f} minutes one after another, {add("chip_hours"):.3g} chip-hours,'
    f' ${add("dollars"):.2f}, {add("joules") / 3.6e6:.2g} kWh',
    '  slots: for tokens, those of prompts and padding included; FLOPs: of the models, teachers included;'
    ' executed: with what is recomputed, masked or pruned as well',
    f'  seconds: {cost.basis(on, {arm.arm_id: costs[arm.arm_id] for arm in plan.arms}, plan.everyone)}',
    *([f'  programs that train several arms at once, which share their seconds: {several}'] if several else []),
    f'  dollars: {"; ".join(sorted(prices))}; energy: estimate, {chips.watts(on.kind)[1]}',
  ]
