"""The hash of the code: what changes it, and what does not."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from slm_jax.revision import digest, experiment_files, hash_files, source

PACKAGE = Path(__file__).parent.parent / 'slm_jax'


def test_each_part_has_its_own_hash(tmp_path):
  copy = tmp_path / 'elsewhere'
  shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns('__pycache__'))
  before = source(copy)
  assert before == source()
  assert {'step', 'train', 'model', 'data'} <= before.keys()

  def changed():
    after = source(copy)
    return {name for name in {**before, **after} if before.get(name) != after.get(name)}

  with open(copy / 'model' / 'decoder.py', 'a') as file:
    file.write('# another word\n')
  assert changed() == {'model'}
  (copy / 'model' / 'rope.py').rename(copy / 'model' / 'rope2.py')
  assert changed() == {'model'}
  (copy / 'step.py').unlink()
  (copy / 'new.py').write_text('')
  (copy / 'notes.txt').write_text('no code')
  assert changed() == {'model', 'step', 'new'}


# ------------------------------------------------------------------------------------------------- experiment files

FILES = {
  'lab/__init__.py': '',
  'lab/question.py': 'from lab import parts\nimport lab.deep.more\nimport json\nfrom . import near\n',
  'lab/parts.py': 'import slm_jax.step\nimport launch\n\ndef late():\n  from lab.late import x\n',
  'lab/near.py': 'from .deep import inner\n',
  'lab/late.py': 'x = 1\n',
  'lab/deep/__init__.py': '',
  'lab/deep/more.py': '',
  'lab/deep/inner.py': 'import lab.question\n',  # a circle
  'lab/unused.py': '',
  'helper.py': '',
}


@pytest.fixture
def project(tmp_path):
  for name, text in FILES.items():
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  return tmp_path


def loaded(path, name):
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  module.__file__ = str(path)
  return module


def test_all_that_an_experiment_imports_from_its_project_is_found(project):
  found = experiment_files(loaded(project / 'lab' / 'question.py', 'lab.question'))
  assert found.keys() == FILES.keys() - {'lab/unused.py', 'helper.py'}
  assert all(path == (project / name).resolve() for name, path in found.items())


def test_a_file_that_is_run_as_a_script_imports_from_its_own_folder(project):
  script = project / 'script.py'
  script.write_text('import helper\nfrom lab.late import x\nfrom experiments import common\n')
  module = loaded(script, 'script')
  module.__spec__ = None
  found = experiment_files(module)
  assert found.keys() >= {'script.py', 'helper.py', 'lab/__init__.py', 'lab/late.py', 'experiments/common.py'}
  assert not any(name.startswith(('slm_jax/', 'launch/')) for name in found)


def test_every_change_of_a_file_changes_the_digest(project):
  module = loaded(project / 'lab' / 'question.py', 'lab.question')
  before = hash_files(experiment_files(module))
  for name in before:
    text = (project / name).read_text()
    (project / name).write_text(text + '# a word\n')
    after = hash_files(experiment_files(module))
    assert {key for key in before if before[key] != after[key]} == {name}
    assert digest(after) != digest(before)
    (project / name).write_text(text)
  assert hash_files(experiment_files(module)) == before


def test_the_experiments_of_this_project_bring_what_they_share():
  from experiments import kd_or_ce

  assert experiment_files(kd_or_ce).keys() == {
    'experiments/__init__.py',
    'experiments/common.py',
    'experiments/kd_or_ce.py',
  }


def test_a_module_without_a_file_has_no_files():
  module = type(sys)('notebook')
  assert experiment_files(module) == {}
  assert digest({}) == digest(hash_files({}))
