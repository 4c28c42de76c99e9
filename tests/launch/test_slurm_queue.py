"""What the engine 'slurm' submits: arrays, what waits for what, and what an earlier launch has there already."""

import json
import re
import shlex
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from clouds import ONE, PARENT, TWO, UNITS, options_of, plan_on
from fakes import arms_of, experiment
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import slurm
from launch.cloud import Result
from launch.plan import Plan, Unit, units
from slm_jax.config import ConfigError
from slm_jax.distill.logits import Distill


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
