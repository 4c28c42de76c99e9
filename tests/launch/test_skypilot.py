"""SkyPilot's tasks: a golden file, a fake sky that is a real process, hostile values in a real shell."""

import shlex
import subprocess
from pathlib import Path

import clouds
import pytest
import yaml
from clouds import CHILD, ONE, PARENT, TWO, UNITS, options_of, plan_on
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import cloud, skypilot
from launch.plan import units
from slm_jax.config import ConfigError

GOLDEN = Path(__file__).parent / 'golden'
HERE = ['--skypilot_accelerators=A100:8', '--skypilot_bucket=gs://slm-results']

SKY = """
if sys.argv[2] == 'queue':
  assert '--all' in sys.argv, 'without it, the 50 latest'
  if 'answer' in state:
    leave(*state['answer'])
  leave(out=json.dumps([{'job_name': name} for name in state['queued']]))
if state.get('error'):
  leave(err=state['error'], code=1)
import yaml
state['queued'].append(yaml.safe_load(Path(sys.argv[-1]).read_text())['name'])
leave()
"""


@pytest.fixture
def scene(tmp_path, monkeypatch):
  plan = plan_on(tmp_path)
  options = options_of(*HERE, f'--skypilot_mount={tmp_path}')
  return plan, options, clouds.Tool(tmp_path, 'sky', SKY, monkeypatch, queued=[], workdir='')


def test_golden_tasks(monkeypatch):
  monkeypatch.setattr(skypilot.platform, 'python_version_tuple', lambda: ('3', '12', '1'))
  plan = plan_on('/mnt/slm', ['--config.name=a b; rm -rf $HOME'])
  options = options_of(*HERE, '--skypilot_spot')
  skypilot.check(plan, options)
  shown = skypilot.show(plan, UNITS, options)
  assert shown + '\n' == (GOLDEN / 'skypilot.sh').read_text()
  assert subprocess.run(['bash', '-n'], input=shown, text=True).returncode == 0


def test_what_can_start_is_queued_once_and_the_rest_waits(scene, capsys):
  plan, options, tool = scene
  assert skypilot.run(plan, UNITS, options) == 0
  assert tool.state['queued'] == [cloud.job_name(plan, PARENT)]
  assert f'{CHILD.name}: waits for {PARENT.name}' in capsys.readouterr().out
  assert skypilot.run(plan, UNITS, options) == 0
  assert tool.state['queued'] == [cloud.job_name(plan, PARENT)]
  assert skypilot.run(plan, [CHILD._replace(after=())], options) == 0
  assert tool.state['queued'] == [cloud.job_name(plan, PARENT), cloud.job_name(plan, CHILD)]


def test_without_a_controller_nothing_is_queued(scene):
  plan, options, tool = scene
  tool.state = {**tool.state, 'answer': ['', 'sky.exceptions.ClusterNotUpError: No in-progress managed jobs.', 1]}
  assert skypilot.run(plan, UNITS, options) == 0
  assert tool.state['queued'] == [cloud.job_name(plan, PARENT)]


@pytest.mark.parametrize('answer', ['no JSON', '[{"name": "x"}]', '3'])
def test_a_list_of_jobs_that_cannot_be_read_is_one_line(scene, answer):
  plan, options, tool = scene
  tool.state = {**tool.state, 'answer': [answer, '', 0]}
  with pytest.raises(ConfigError, match='sky: its list of jobs cannot be read') as error:
    skypilot.run(plan, UNITS, options)
  assert '\n' not in str(error.value)
  assert tool.state['queued'] == []


def test_of_a_bundle_that_runs_nothing_is_started_again(tmp_path, monkeypatch):
  plan = plan_on(tmp_path, sweep=[{'seed': i, 'data.seed': i} for i in range(4)])
  options = options_of(*HERE, f'--skypilot_mount={tmp_path}')
  tool = clouds.Tool(tmp_path, 'sky', SKY, monkeypatch, queued=[], workdir='')
  assert skypilot.run(plan, units(plan, 2), options) == 0
  queued = tool.state['queued']
  assert len(queued) == 2
  clouds.finish(plan, plan.arms[0].arm_id)
  left = units(plan, 2)
  assert [len(unit.arms) for unit in left] == [1, 2]
  assert skypilot.run(plan, left, options) == 0
  assert tool.state['queued'] == queued
  clouds.finish(plan, plan.arms[1].arm_id)
  assert [unit.arms for unit in units(plan, 2)] == [left[1].arms]


def test_what_was_started_as_a_file_is_refused_while_it_costs_nothing():
  plan = plan_on('/mnt/slm')
  plan.module.__file__ = '/home/me/try.py'
  with pytest.raises(ConfigError, match='/home/me/try.py: .* start it with python -m experiments.try'):
    skypilot.check(plan, options_of(*HERE))


def test_a_refusal_is_told_in_one_line(scene):
  plan, options, tool = scene
  tool.state = {**tool.state, 'error': 'sky.exceptions.NoCloudAccessError:\nno cloud is enabled\n'}
  with pytest.raises(ConfigError, match='sky: .*no cloud is enabled'):
    skypilot.run(plan, UNITS, options)


@settings(max_examples=20, deadline=None)
@given(st.text(st.characters(exclude_characters='\x00', exclude_categories=['Cs']), max_size=30))
def test_no_value_of_a_config_is_read_by_a_shell(value):
  plan = plan_on('/mnt/slm', [f'--config.name={value}'])
  run = yaml.safe_load(cloud.to_yaml(skypilot.task(plan, PARENT, options_of(*HERE))))['run']
  line = run.replace('exec .venv/bin/python', 'printf "%s\\0"', 1)
  done = subprocess.run(['bash', '-c', line], capture_output=True, check=True)
  assert done.stdout.decode().split('\0')[:-1] == plan.argv(ONE)[1:]
  assert shlex.split(run)[-1] == f'--arm={ONE}'
  assert TWO not in run


@pytest.mark.parametrize(
  'argv, words',
  [
    (['--skypilot_accelerators='], 'expected NAME or NAME:NUMBER'),
    (['--skypilot_accelerators=A100:0'], 'expected NAME or NAME:NUMBER'),
    (['--skypilot_accelerators=tpu-v6e-3'], 'v6e-3: no such slice; there is: v6e-1'),
    (['--skypilot_accelerators=tpu-v6e-16'], 'needs 4 hosts, not one'),
    (['--skypilot_accelerators=A100:7'], 'data.batch_size=32: not divisible'),
    (['--skypilot_bucket=slm'], 'expected gs://NAME'),
    (['--skypilot_mount=/elsewhere'], 'share no folder with this machine but --skypilot_mount=/elsewhere'),
  ],
)
def test_what_cannot_be_meant_is_one_line(argv, words):
  with pytest.raises(ConfigError) as error:
    skypilot.check(plan_on('/mnt/slm'), options_of(*HERE, *argv))
  assert words in str(error.value)
  assert '\n' not in str(error.value)


def test_ready_says_what_is_missing(scene, monkeypatch, tmp_path):
  plan, options, _ = scene
  skypilot.ready(plan, options)
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(ConfigError, match='sky: no such command on this machine; to get it: pip install'):
    skypilot.ready(plan, options)
