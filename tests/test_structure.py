"""The house: arrows point down, light imports, every setting is read."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the ground up. A module imports from its own floor and from lower ones.
FLOORS = [
  [
    'slm_jax.config',
    'slm_jax.conditions',
    'slm_jax.ranges',
    'slm_jax.schema',
    'slm_jax.commands',
    'slm_jax.files',
    'slm_jax.preempt',
    'slm_jax.distributed',
    'slm_jax.notices',
    'slm_jax.perf',
    'slm_jax.checksum',
    'slm_jax.chips',
    'slm_jax.energy',
    'slm_jax.progress',
    'slm_jax.revision',
    'slm_jax.vocabulary',
  ],
  ['slm_jax.model', 'slm_jax.interop'],
  ['slm_jax.data'],
  ['slm_jax.losses', 'slm_jax.optim', 'slm_jax.sharding'],
  ['slm_jax.step'],
  ['slm_jax.ema', 'slm_jax.distill', 'slm_jax.prune'],
  [
    'slm_jax.experiment',
    'slm_jax.memory',
    'slm_jax.metrics',
    'slm_jax.checkpoint',
    'slm_jax.ledger',
    'slm_jax.observe',
    'slm_jax.evaluate',
    'slm_jax.record',
    'slm_jax.pipeline',
    'slm_jax.run_files',
  ],
  ['slm_jax.train', 'slm_jax.reevaluate'],
  ['slm_jax.ablate'],
  ['launch'],
  ['experiments'],
]


def floor(module: str) -> int | None:
  for number, names in enumerate(FLOORS):
    if any(module == name or module.startswith(name + '.') for name in names):
      return number
  return None


def sources():
  for folder in ('slm_jax', 'launch', 'experiments'):
    yield from sorted((ROOT / folder).rglob('*.py'))


def module_name(path: Path) -> str:
  return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


def imports(path: Path):
  """(module, is it at the top level) of everything that is imported, outside of TYPE_CHECKING."""
  tree = ast.parse(path.read_text())
  top = {id(node) for node in tree.body}
  typing_only = {
    id(node)
    for block in ast.walk(tree)
    if isinstance(block, ast.If) and 'TYPE_CHECKING' in ast.dump(block.test)
    for node in ast.walk(block)
  }
  for node in ast.walk(tree):
    if id(node) in typing_only:
      continue
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, id(node) in top
    elif isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        yield f'{node.module}.{alias.name}', id(node) in top


def test_arrows_point_down():
  wrong = []
  for path in sources():
    here = floor(module_name(path))
    for name, at_top in imports(path):
      there = floor(name)
      if at_top and here is not None and there is not None and there > here:
        wrong.append(f'{module_name(path)} imports {name}')
  assert not wrong


def test_every_module_has_a_floor():
  assert [m for m in map(module_name, sources()) if m != 'slm_jax' and floor(m) is None] == []


@pytest.mark.parametrize('module', ['slm_jax', 'slm_jax.train', 'slm_jax.ablate.arms', 'launch'])
def test_imports_stay_light(module):
  heavy = ('transformers', 'torch', 'matplotlib', 'pandas', 'tensorflow', 'datasets', 'wandb', 'scipy.special')
  code = f'import sys, {module}; print([m for m in {heavy} if m in sys.modules])'
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == '[]'


def test_files_and_functions_hold_one_idea():
  too_long = []
  for path in sources():
    text = path.read_text()
    if text.count('\n') > 400:
      too_long.append(f'{path.name}: {text.count(chr(10))} lines')
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno > 80:
        too_long.append(f'{path.name}: {node.name}')
  assert not too_long


def test_train_and_step_know_no_transform_by_name():
  kinds = ('distill', 'prune', 'ema', 'teacher', 'mask')
  for name in ('train.py', 'step.py'):
    tree = ast.parse((ROOT / 'slm_jax' / name).read_text())
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {
      n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)
    }
    assert not [k for k in kinds if k in names]


def test_no_pickle():
  for path in sources():
    assert not [name for name, _ in imports(path) if name.split('.')[0] in ('pickle', 'dill', 'cloudpickle')]


def test_no_two_test_files_have_one_name():
  """pytest could not import both."""
  names = [path.name for path in (ROOT / 'tests').rglob('test_*.py')]
  assert len(names) == len(set(names))
