"""What a launch says of arms that other code made, and --rerun, which makes them again."""

import importlib.util
import json
from pathlib import Path

import pytest
from fakes import FakeTrain

from launch import cli
from slm_jax.ablate import workdir as workdirs
from slm_jax.config import ConfigError
from slm_jax.revision import experiment_files, hash_files, source

FILE = '''"""Which?"""

import dataclasses
from typing import ClassVar

from helper import SCALE
from slm_jax.config import setting
from slm_jax.experiment import Config
from slm_jax.step import Transform, TransformConfig


@dataclasses.dataclass(frozen=True)
class Noise(TransformConfig):
  kind: ClassVar[str] = 'noise'
  teacher: str = setting('', arm=True)
  rate: float = 0.1

  def build(self, resources):
    return Transform('noise'), {}


def config():
  return Config()


def sweep():
  yield {'name': 'a'}
  yield {'name': 'b', 'optim.learning_rate': 0.5}
  yield {'name': 'c', 'transforms': (Noise('b'),)}


def report(rows):
  return 'the first answer'
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(str(tmp_path))
  (tmp_path / 'mine.py').write_text(FILE)
  (tmp_path / 'helper.py').write_text('SCALE = 1\n')
  return tmp_path


def load(project):
  spec = importlib.util.spec_from_file_location('mine', project / 'mine.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def launch(project, *words):
  module, fake = load(project), FakeTrain()
  code = hash_files(experiment_files(module))

  def train(config, workdir, arm_id):
    ended = fake(config, workdir, arm_id)
    path = workdir / 'arms' / arm_id / 'run.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'source': source(), 'experiment': code}))
    return ended

  assert cli.launch(module, [f'--workdir={project / "wd"}', *words], train) == 0
  return [name for name, _ in fake.called]


def edit(project, old, new, file='mine.py'):
  text = (project / file).read_text()
  assert old in text
  (project / file).write_text(text.replace(old, new))


def test_an_edit_of_the_experiments_own_files_is_told_and_nothing_is_trained(project, capsys):
  assert launch(project) == ['a', 'b', 'c']
  assert launch(project) == []
  assert 'warning' not in capsys.readouterr().out
  for old, new, file in (
    ("return Transform('noise')", "return Transform('noise', flops=1.0)", 'mine.py'),
    ("yield {'name': 'a'}", "yield {'name': 'a', 'run.keep': 3}", 'mine.py'),
    ('SCALE = 1', 'SCALE = 2', 'helper.py'),
  ):
    edit(project, old, new, file)
    assert launch(project) == []
    out = capsys.readouterr().out
    assert f'warning: 3 of 3 arms were made by other code (changed since then: {file}): a, seed 0 (' in out
    edit(project, new, old, file)


def test_an_edit_of_the_report_is_reported_anew(project, capsys):
  launch(project)
  capsys.readouterr()
  edit(project, 'the first answer', 'the second answer')
  assert launch(project) == []
  out = capsys.readouterr().out
  assert 'the second answer' in out
  assert 'the first answer' not in out
  assert workdirs.read_experiment(project / 'wd').latest.answer == 'the second answer'


def test_rerun_makes_again_what_other_code_made_and_keeps_what_was(project, capsys):
  launch(project)
  before = {path.parent.name: path.read_bytes() for path in (project / 'wd').glob('arms/*/run.json')}
  edit(project, 'SCALE = 1', 'SCALE = 2', 'helper.py')
  kept = {path: path.read_bytes() for path in (project / 'wd').rglob('*') if path.is_file()}
  assert launch(project, '--rerun', '--dry_run') == []
  assert {path: path.read_bytes() for path in (project / 'wd').rglob('*') if path.is_file()} == kept
  assert '3 arms, 3 to run' in capsys.readouterr().out
  assert launch(project, '--rerun') == ['a', 'b', 'c']
  assert '--rerun: 3 arms are made again' in capsys.readouterr().out
  replaced = {path.parent.name: path.read_bytes() for path in (project / 'wd' / 'replaced').glob('*/run.json')}
  assert replaced == before
  assert launch(project, '--rerun') == []
  assert '--rerun: 0 arms are made again' in capsys.readouterr().out


def test_rerun_takes_what_builds_on_an_outdated_arm_along(project):
  launch(project)
  arms = {json.loads(path.read_text())['name']: path.parent for path in (project / 'wd').glob('arms/*/config.json')}
  record = json.loads((arms['b'] / 'run.json').read_text())
  (arms['b'] / 'run.json').write_text(json.dumps({**record, 'source': {'step': '0'}}))
  assert launch(project, '--rerun') == ['b', 'c']


def test_a_default_that_was_edited_is_refused_by_name_until_rerun(project):
  launch(project)
  edit(project, 'rate: float = 0.1', 'rate: float = 0.2')
  with pytest.raises(ConfigError, match=r'c, seed 0 .*: was made with transforms.noise.rate=0.1, now 0.2, a default'):
    launch(project)
  assert launch(project, '--rerun') == ['a', 'b', 'c']
  assert launch(project) == []


def test_the_files_of_every_launch_are_kept(project):
  launch(project)
  edit(project, 'the first answer', 'the second answer')
  launch(project)
  copies = sorted((project / 'wd' / 'code').iterdir())
  assert len(copies) == 2
  assert {(copy / 'helper.py').read_text() for copy in copies} == {'SCALE = 1\n'}
  assert sorted('second' in (copy / 'mine.py').read_text() for copy in copies) == [False, True]
  assert (project / 'wd' / 'code' / workdirs.read_experiment(project / 'wd').latest.code).is_dir()


def test_a_worker_records_what_it_runs(tmp_path):
  import tiny

  from slm_jax.train import run

  code = {'tests/tiny.py': hash_files({'x': Path(tiny.__file__)})['x']}
  assert run(tiny.config(2), tmp_path, 'tiny', code) == 0
  assert json.loads((tmp_path / 'arms' / 'tiny' / 'run.json').read_text())['experiment'] == code
