"""What a user may not expect of a launch, and is told: arms that are the same, settings without effect, damage."""

import ast
import difflib
import inspect
import operator
from collections.abc import Mapping, Sequence
from types import ModuleType

from launch.options import PREFIX
from launch.plan import Plan
from slm_jax.ablate import results
from slm_jax.ablate.arms import Arm
from slm_jax.ablate.unused import remarks as without_effect

FEW = 5  # remarks of a kind
PARTS = {'config', 'sweep', 'report', 'search'}  # functions of an experiment file


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
  lines += misspelt(plan.module)
  lines += without_effect(everyone)[:FEW]
  wanted = getattr(plan.module, 'BASELINE', None)
  if wanted and wanted != plan.baseline:
    lines.append(f'BASELINE {wanted!r} is not in this sweep; the others are compared with {plan.baseline!r}')
  return lines


def damaged(plan: Plan) -> list[str]:
  """A line for each arm of the plan of which a file is damaged, and what mends it."""
  faults = results.faults(row for row in results.read(plan.workdir) if row.arm_id in plan.everyone)
  return [*faults[:FEW], f'and {len(faults) - FEW} more damaged arms'] if len(faults) > FEW else faults


def misspelt(module: ModuleType) -> list[str]:
  """Warnings about functions that look like a part of an experiment, and that nothing calls: def sweepp()."""
  try:
    tree = ast.parse(inspect.getsource(module))
  except (OSError, TypeError, SyntaxError):
    return []  # it has no source
  used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
  lines = []
  for node in tree.body:
    if isinstance(node, ast.FunctionDef) and node.name not in used | PARTS and not node.name.startswith('sweep_'):
      for meant in difflib.get_close_matches(node.name, PARTS, 1, 0.8):
        lines.append(f'warning: {node.name}() is never called; did you mean {meant}()?')
  return lines


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
