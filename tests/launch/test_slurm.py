"""The engine 'slurm' without Slurm: golden scripts, scripts that run among fake commands, bad input."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from clouds import ONE, TWO, UNITS, Tool, options_of, plan_on
from fakes import experiment
from hypothesis import example, given, settings
from hypothesis import strategies as st

import launch.cli
from launch import slurm

GOLDEN = Path(__file__).parent / 'golden'
MANY = [
  *('--slurm_nodes=2', '--slurm_tasks_per_node=4', '--slurm_gpus=a100:4', '--slurm_cpus=8', '--slurm_memory=64G'),
  *('--slurm_partition=gpu', '--slurm_account=lab', '--slurm_time=1-12', '--slurm_restarts=3'),
  *(
    '--slurm_extra=--qos=high',
    "--slurm_extra=--comment=it's a test",
    '--slurm_setup=module load cuda/13; ulimit -n 4096',
  ),
]
HOSTILE = st.text(st.characters(exclude_characters='\x00', exclude_categories=['Cs']), max_size=40)


# ------------------------------------------------------------------------------------------------------ the scripts


@pytest.mark.parametrize('name, argv', [('slurm', []), ('slurm_nodes', MANY)])
def test_what_is_shown_is_the_golden_file(name, argv, monkeypatch):
  monkeypatch.setattr(sys, 'executable', '/opt/slm jax/bin/python')
  options, plan = options_of(*argv), plan_on('/mnt/it is 50%', ['--config.name=a b'])
  slurm.check(plan, options)
  assert slurm.show(plan, UNITS, options) + '\n' == (GOLDEN / f'{name}.sh').read_text()


def test_what_is_shown_does_what_a_launch_does(tmp_path, monkeypatch):
  """A shell runs the lines of --dry_run; then a launch is made. sbatch sees the same, twice."""
  body = 'leave(out=f\'{100 + len((here / "calls.jsonl").read_text().splitlines())}\\n\')'
  plan, options = plan_on(tmp_path / "it's $HOME"), options_of()
  seen = []
  for way in ('shell', 'launch'):
    (tmp_path / way).mkdir()
    tool = Tool(tmp_path / way, 'sbatch', body, monkeypatch)
    if way == 'shell':
      subprocess.run(['bash', '-euc', slurm.show(plan, UNITS, options)], check=True, stdin=subprocess.DEVNULL)
    else:
      Tool(tmp_path, 'squeue', 'leave()', monkeypatch)
      assert slurm.run(plan, UNITS, options) == 0
    seen.append(([words for words, _ in tool.calls], {p.name: p.read_text() for p in plan.workdir.rglob('*.sh')}))
  assert seen[0] == seen[1]
  calls, scripts = seen[0]
  assert [len(words) for words in calls] == [2, 3, 3]
  assert calls[1][1] == '--dependency=afterok:101_0'
  assert calls[2][1] == '--dependency=afterany:101:102'
  assert len(scripts) == 3


@settings(deadline=None, max_examples=25)
@example(values=["a b; rm -rf $HOME 'x' `id` \\", '\n#SBATCH --uid=0\nesac\nend-of-tiny'], task=1)
@example(values=['~', '*'], task=0)
@given(values=st.lists(HOSTILE, min_size=1, max_size=3), task=st.integers(0, 1))
def test_whatever_a_configuration_holds_reaches_the_worker_as_it_is(values, task):
  options = options_of()
  plan = plan_on('/mnt/a b', [f'--config.name={value}' for value in values])
  script = slurm.array_script(plan, 'name', [(ONE,), (TWO, ONE)], options)
  until = script.index('trap : TERM')
  assert '#SBATCH' not in re.sub('(?s)^#!.*?\n\n', '', script[:until]).partition('case')[0]
  show = f'{script[:until]}\nprintf "%s\\0" "${{locks[@]}}" -- "${{worker[@]}}"'
  environment = {**os.environ, 'SLURM_ARRAY_TASK_ID': str(task)}
  done = subprocess.run(['bash', '-c', show], env=environment, capture_output=True, check=True)
  arms = [(ONE,), (TWO, ONE)][task]
  locks = [f'/mnt/a b/tiny/arms/{arm_id}/lock' for arm_id in arms]
  assert done.stdout.decode().split('\0')[:-1] == [*locks, '--', *plan.argv(*arms)]


# ------------------------------------------------------------------------------------------------- the end of a task


@pytest.fixture
def end_of_task(tmp_path, monkeypatch):
  """Runs a task's script with fake srun, squeue and scontrol: `(exit code, was it queued again?, output)`."""
  plan = plan_on(tmp_path)
  (plan.workdir / 'arms' / ONE).mkdir(parents=True)
  script = slurm.array_script(plan, 'name', [(ONE,)], options_of('--slurm_restarts=3'))

  def run(code, state='RUNNING None', restart='', down=0):
    (tmp_path / 'bin').mkdir()
    Tool(
      tmp_path / 'bin',
      'srun',
      f'leave(code={code})' if code < 128 else f'os.kill(os.getpid(), {code - 128})',
      monkeypatch,
    )
    looks = "state['down'] -= 1\nif state['down'] >= 0: leave(code=1)\nleave(out=state['of'] + '\\n')"
    Tool(tmp_path / 'bin', 'squeue', looks, monkeypatch, down=down, of=state)
    Tool(tmp_path / 'bin', 'sleep', 'leave()', monkeypatch)
    tool = Tool(tmp_path / 'bin', 'scontrol', 'leave()', monkeypatch)
    variables = {'SLURM_ARRAY_TASK_ID': '0', 'SLURM_ARRAY_JOB_ID': '101', 'SLURM_JOB_ID': '105'}
    environment = {**os.environ, **variables, **({'SLURM_RESTART_COUNT': restart} if restart else {})}
    done = subprocess.run(['bash', '-c', script], env=environment, capture_output=True, text=True, timeout=60)
    assert [words for words, _ in tool.calls] in ([], [['requeue', '101_0']])
    return done.returncode, bool(tool.calls), done.stdout + done.stderr

  return run


@pytest.mark.parametrize(
  'code, queued_again', [(0, False), (1, False), (2, False), (42, True), (126, False), (134, True), (137, True)]
)
def test_what_was_preempted_or_killed_is_queued_again(end_of_task, code, queued_again):
  assert end_of_task(code)[:2] == (code, queued_again)


@pytest.mark.parametrize(
  'state, queued_again',
  [
    ('RUNNING None', True),
    ('COMPLETING TimeLimit', True),
    ('COMPLETING None', False),  # cancelled, or Slurm itself queues it again
    ('CANCELLED None', False),
    ('PENDING BeginTime', False),
  ],
)
def test_what_was_cancelled_does_not_come_back(end_of_task, state, queued_again):
  assert end_of_task(42, state)[:2] == (42, queued_again)


@pytest.mark.parametrize('restart, queued_again', [('2', True), ('3', False), ('11', False)])
def test_a_task_is_not_queued_again_for_ever(end_of_task, restart, queued_again):
  code, again, output = end_of_task(137, restart=restart)
  assert (code, again) == (137, queued_again)
  assert ('--slurm_restarts=3' in output) == (not queued_again)


def test_a_controller_that_is_down_for_a_while_costs_nothing(end_of_task):
  assert end_of_task(42, down=3)[:2] == (42, True)


def test_a_task_waits_for_a_process_that_still_holds_its_arm(tmp_path, end_of_task):
  """As it does after a requeue elsewhere; here the other one ends after two seconds."""
  holder = [sys.executable, '-c', HOLD, str(tmp_path / 'tiny' / 'arms' / ONE / 'lock')]
  with subprocess.Popen(holder, stdout=subprocess.PIPE, text=True) as other:
    assert other.stdout.readline() == 'held\n'
    assert end_of_task(0)[0] == 0
    assert other.poll() == 0


HOLD = """
import fcntl, sys, time
with open(sys.argv[1], 'w') as file:
  fcntl.flock(file, fcntl.LOCK_EX)
  print('held', flush=True)
  time.sleep(2)
"""


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
  'argv, words',
  [
    (['--slurm_nodes=0'], ['slurm_nodes', '0']),
    (['--slurm_time=soon'], ['--slurm_time=soon', '4:00:00']),
    (['--slurm_memory=lots'], ['--slurm_memory=lots', '32G']),
    (['--slurm_gpus=a100'], ['--slurm_gpus=a100', 'a100:4']),
    (['--slurm_gpus=0'], ['--slurm_gpus=0', 'a100:4']),
    (['--slurm_gpus=4', '--slurm_tasks_per_node=2'], ['--slurm_tasks_per_node=2', '1 or 4']),
    (['--slurm_gpus=5'], ['batch_size=', '5 data-parallel devices']),
    (['--slurm_extra=qos=high'], ['--slurm_extra=qos=high', '--qos=high']),
    (['--slurm_extra=--time=1'], ['--slurm_extra=--time=1', '--slurm_time']),
    (['--slurm_extra=--array=0-3'], ['--slurm_extra=--array=0-3', 'set already']),
    (['--slurm_partition=a\n#SBATCH --uid=0'], ['--slurm_partition', 'one line']),
    (['--slurm_setup=a\nb'], ['--slurm_setup', 'one line']),
    (['--workdir=a\nb'], ['--workdir', 'line breaks']),
    (['--workdir=a\\b'], ['--workdir', '\\']),
    (['--fail_fast'], ['--fail_fast', 'slurm']),
    ([], ['sbatch: no such command', 'slurm-client']),
  ],
)
def test_bad_input_is_one_line_and_writes_nothing(argv, words, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(SystemExit) as end:
    launch.cli.main(experiment(sweep=[{'seed': 1}]), ['--launch=slurm', *argv])
  assert end.value.code == 1
  error = capsys.readouterr().err
  assert error.startswith('error: ')
  assert error.count('\n') == 1
  assert all(word in error for word in words), error
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('time', ['30', '30:00', '4:00:00', '1-12', '2-00:30', 'UNLIMITED'])
def test_times_as_slurm_knows_them(time):
  slurm.check(plan_on('/mnt'), options_of(f'--slurm_time={time}'))


def test_a_cluster_that_does_not_answer_and_data_that_cannot_be_read_are_one_line(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  tools = tmp_path / 'tools'
  tools.mkdir()
  Tool(tools, 'sbatch', 'leave(code=1)', monkeypatch)
  squeue = Tool(
    tools,
    'squeue',
    "leave(err='slurm_load_jobs error: Unable to contact slurm controller\\n', code=state['code'])",
    monkeypatch,
  )
  (tmp_path / 'empty.txt').write_text('')
  before = sorted(tmp_path.iterdir())
  module = experiment(sweep=[{'seed': 1}])
  for code, argv, word in ((1, [], 'Unable to contact'), (0, ['--config.data.sources=empty.txt'], 'empty.txt')):
    squeue.state = {'code': code}
    with pytest.raises(SystemExit) as end:
      launch.cli.main(module, ['--launch=slurm', '--workdir=out', *argv])
    error = capsys.readouterr().err
    assert end.value.code == 1
    assert word in error
    assert error.count('\n') == 1
    assert sorted(tmp_path.iterdir()) == before
