"""The engine 'slurm' without Slurm: golden scripts, scripts that run among fake commands, laws of the arrays."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from clouds import ONE, PARENT, TWO, UNITS, Tool, options_of, plan_on
from fakes import arms_of, experiment
from hypothesis import example, given, settings
from hypothesis import strategies as st

import launch.cli
from launch import slurm
from launch.cloud import Result
from launch.plan import Plan, Unit, units
from slm_jax.config import ConfigError
from slm_jax.distill.logits import Distill

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


def queue(**tasks):
  """A `call`: sbatch gives the ids 101, 102, ...; squeue shows `{'101_0': name}`. It notes commands in `calls`."""
  calls = []

  def call(argv, stdin=''):
    calls.append(list(argv))
    if argv[0] == 'squeue':
      return Result(0, ''.join(f'{task} {name}\n' for task, name in tasks.items()))
    return Result(0, f'{100 + sum(words[0] == "sbatch" for words in calls)}\n')

  call.calls = calls
  return call


def submitted(call):
  return [words for words in call.calls if words[0] == 'sbatch']


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


# --------------------------------------------------------------------------------------------- what waits for what


def test_a_student_waits_for_its_own_teacher_only():
  """Two seeds of teacher -> two students, and a model from scratch: an array of those, and one for each teacher."""
  sweep = [
    {'seed': seed, **arm}
    for seed in (0, 1)
    for arm in (
      {'name': 'teacher', 'model.n_layers': 3},
      {'name': 'scratch'},
      *({'name': f'student {w}', 'transforms': (Distill('teacher', weight=w),)} for w in (0.5, 0.9)),
    )
  ]
  plan = Plan(experiment(sweep=sweep), Path('/mnt/tiny'), arms_of(experiment(sweep=sweep)), [], 'scratch')
  first, *others, report = slurm.jobs(plan, units(plan, 1), options_of(), {})
  names = {arm.arm_id: (arm.name, arm.config.seed) for arm in plan.arms}
  tasks = {f'{{{first.name}}}_{i}': names[ids[0]] for i, ids in enumerate(first.arms)}
  assert sorted(tasks.values()) == [('scratch', 0), ('scratch', 1), ('teacher', 0), ('teacher', 1)]
  assert len(others) == 2
  for job in others:
    name, seed = tasks[job.after.removeprefix('afterok:')]
    assert name == 'teacher'
    assert {names[ids[0]] for ids in job.arms} == {('student 0.5', seed), ('student 0.9', seed)}
  assert report.after == 'afterany:' + ':'.join(f'{{{job.name}}}' for job in (first, *others))


@st.composite
def sweeps(draw):
  """Units that wait for earlier ones, and the tasks that run some of their arms since an earlier launch."""
  count, most = draw(st.integers(1, 8)), draw(st.sampled_from([1, 3]))
  names = [f'u{i}' for i in range(count)]
  found = []
  for i, name in enumerate(names):
    arms = tuple(f'{name}-{j}' for j in range(draw(st.integers(1, most))))
    found.append(Unit(name, arms, tuple(draw(st.lists(st.sampled_from(names[:i]), unique=True))) if i else ()))
  arms = [arm_id for unit in found for arm_id in unit.arms]
  old = draw(st.lists(st.sampled_from(arms), unique=True))
  size = draw(st.integers(1, 2))  # arms of an old task
  return found, {arm_id: f'7_{i // size}' for i, arm_id in enumerate(old)}


@settings(deadline=None, max_examples=200)
@given(sweeps(), st.integers(1, 3))
def test_every_arm_has_one_task_that_waits_for_exactly_its_parents(sweep, largest):
  found, there = sweep
  plan = SimpleNamespace(workdir=Path('/mnt/w'), name='x', command=lambda *ids: shlex.join(ids))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(slurm, 'LARGEST', largest)
    jobs = slurm.jobs(plan, found, options_of(), there)
  where = dict(there)
  bundles = max(Counter(there.values()).values(), default=1) > 1 or max(len(unit.arms) for unit in found) > 1
  for number, job in enumerate(jobs):
    ids = {earlier.name: f'{100 + i}' for i, earlier in enumerate(jobs[:number])}
    kind, *after = job.after.format(**ids).split(':')  # a KeyError here: it waits for what is not submitted yet
    assert len(job.arms) <= largest
    for arms in job.arms:
      (unit,) = (unit for unit in found if set(arms) <= set(unit.arms))
      parents = {where[arm_id] for name in unit.after for arm_id in dict((u.name, u.arms) for u in found)[name]}
      assert set(after) == parents
      assert kind == (('afterany' if bundles else 'afterok') if parents else '')
      assert not set(arms) & where.keys()
    where |= {arm_id: f'{100 + number}_{task}' for task, arms in enumerate(job.arms) for arm_id in arms}
  assert where.keys() == {arm_id for unit in found for arm_id in unit.arms}
  assert len({job.name for job in jobs}) == len(jobs)
  if jobs:
    assert jobs[-1].arms == ()
    assert set(jobs[-1].after.format(**ids).split(':')[1:]) == {task.partition('_')[0] for task in where.values()}


# ------------------------------------------------------------------------------------------------------ launch again


def test_a_second_launch_submits_only_what_is_not_there(tmp_path, capsys):
  plan, options = plan_on(tmp_path), options_of()
  call = queue()
  assert slurm.run(plan, UNITS, options, call) == 0
  first, second, _ = (Path(words[-1]).stem for words in submitted(call))
  assert [record['job'] for record in records(plan, first, second)] == ['101', '102']
  assert 'job 102: ' in capsys.readouterr().out

  everything = queue(**{'101_0': first, '102_0': second, '55_0': 'of-another-workdir', '56': 'an interactive job'})
  assert slurm.run(plan, UNITS, options, everything) == 0
  assert submitted(everything) == []
  assert '2 arms are queued or running' in capsys.readouterr().out

  child_gone = queue(**{'101_0': first})
  assert slurm.run(plan, UNITS, options, child_gone) == 0
  child, report = submitted(child_gone)
  assert child[2] == '--dependency=afterok:101_0'
  assert report[2] == '--dependency=afterany:101:101'  # the new job, and the old one, of the same id in this queue

  all_gone = queue()
  assert slurm.run(plan, UNITS, options, all_gone) == 0
  assert len(submitted(all_gone)) == 3


def test_a_copied_workdir_has_the_records_and_not_the_jobs(tmp_path):
  plan, options, call = plan_on(tmp_path), options_of(), queue()
  slurm.run(plan, [PARENT], options, call)
  script = Path(submitted(call)[0][-1])
  shown = queue(**{'101_0': script.stem})
  copied = plan._replace(workdir=tmp_path / 'copy')
  shutil.copytree(plan.workdir, copied.workdir)
  assert slurm.queued(plan, shown) == {ONE: '101_0'}
  assert slurm.queued(copied, shown) == {}
  script.with_suffix('.json').write_text('')
  assert slurm.queued(plan, shown) == {}


def records(plan, *names):
  return [json.loads((plan.workdir / 'slurm' / f'{name}.json').read_text()) for name in names]


def test_a_bundle_of_which_a_part_is_queued_is_the_rest(tmp_path):
  plan, options = plan_on(tmp_path), options_of()
  call = queue()
  slurm.run(plan, [PARENT], options, call)
  name = Path(submitted(call)[0][-1]).stem
  again = queue(**{'101_0': name})
  slurm.run(plan, [Unit('tiny-both', (ONE, TWO))], options, again)
  (rest, _) = (json.loads(Path(words[-1]).with_suffix('.json').read_text())['arms'] for words in submitted(again))
  assert rest == [[TWO]]


def test_a_launch_that_was_killed_between_submitting_and_noting_it_submits_nothing_twice(tmp_path):
  plan, options = plan_on(tmp_path), options_of()

  class Killed(BaseException):
    pass

  def call(argv):
    if argv[0] == 'sbatch':
      raise Killed
    return Result(0)

  with pytest.raises(Killed):
    slurm.run(plan, UNITS, options, call)
  (record,) = (plan.workdir / 'slurm').glob('*.json')
  again = queue(**{'101_0': record.stem})
  slurm.run(plan, UNITS, options, again)
  assert submitted(again)[0][2] == '--dependency=afterok:101_0'
  assert len(submitted(again)) == 2


def test_what_sbatch_refuses_is_one_line(tmp_path):
  def call(argv):
    return Result(1, err='sbatch: error: invalid partition specified: nowhere\n') if argv[0] == 'sbatch' else Result(0)

  with pytest.raises(ConfigError, match='invalid partition specified: nowhere; .*launch again') as error:
    slurm.run(plan_on(tmp_path), UNITS, options_of(), call)
  assert '\n' not in str(error.value)


def test_nothing_to_run_submits_nothing(tmp_path):
  call = queue()
  assert slurm.run(plan_on(tmp_path), [], options_of(), call) == 0
  assert submitted(call) == []


def test_jobs_of_two_workdirs_have_other_names(tmp_path, monkeypatch):
  """Also of two that are called the same from where they are launched."""
  names = set()
  for where in ('a', 'b'):
    (tmp_path / where).mkdir()
    monkeypatch.chdir(tmp_path / where)
    names |= {job.name for job in slurm.jobs(plan_on('runs'), UNITS, options_of(), {})}
  assert len(names) == 6
  assert all(re.fullmatch('[a-z][a-z0-9-]{,27}', name) for name in names)


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
