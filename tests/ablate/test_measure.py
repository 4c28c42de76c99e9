"""Measured paces: who shares one, that the stand-in is the arm's own program, and that the books come out even."""

import dataclasses
import json

import jax
import pytest
import tiny
from fakes import arms_of, experiment

from slm_jax import train
from slm_jax.ablate import measure
from slm_jax.ablate.measure import Pace
from slm_jax.distill.logits import Distill
from slm_jax.experiment import EvalConfig, RunConfig
from slm_jax.files import read_json

TEACHER = {'name': 'teacher', 'transforms': (), 'model.d_ff': 48}
TAUGHT = {'name': 'taught', 'transforms': (Distill('teacher'),)}


def sweep(*changes, base=None):
  """`({name: Arm}, {id: Arm})` of tiny arms."""
  arms = arms_of(experiment(base=base or tiny.config(), sweep=list(changes)))
  return {arm.name: arm for arm in arms}, {arm.arm_id: arm for arm in arms}


@pytest.mark.parametrize(
  'change, shared',
  [
    ({'optim.learning_rate': 0.5}, True),
    ({'optim.clip': 0.0}, True),
    ({'transforms.distill.weight': 0.1}, True),
    ({'seed': 3, 'data.seed': 4}, True),
    ({'train.steps': 77}, True),
    ({'init.arm': 'teacher'}, True),
    ({'data.documents': 99}, True),
    ({'data.batch_size': 4}, False),
    ({'data.seq_len': 32}, False),
    ({'model.n_layers': 3}, False),
    ({'optim.name': 'muon'}, False),
    ({'train.accumulate': 2}, False),
    ({'transforms': ()}, False),
    ({'transforms.distill.teacher': 'larger'}, False),
  ],
)
def test_arms_share_a_pace_exactly_if_their_programs_are_alike(change, shared):
  named, arms = sweep(
    TEACHER, {**TEACHER, 'name': 'larger', 'model.n_layers': 3}, TAUGHT, {**TAUGHT, **change, 'name': 'other'}
  )
  keys = [measure.shape_key(named[name], arms) for name in ('taught', 'other')]
  assert (keys[0] == keys[1]) == shared


@pytest.mark.parametrize('name, shared', [('spread_teacher', False), ('spread_optimizer', False), ('wandb', True)])
def test_so_do_launches_if_arrays_lie_alike(name, shared):
  named, arms = sweep(TEACHER, TAUGHT)
  arm = named['taught']
  run = dataclasses.replace(arm.config.run, **{name: not getattr(arm.config.run, name)})
  other = arm._replace(config=dataclasses.replace(arm.config, run=run))
  assert (measure.shape_key(arm, arms) == measure.shape_key(other, arms)) == shared


def lowered(job):
  """The text of a job's step and of its evaluation."""
  data = job.config.data
  ids = jax.ShapeDtypeStruct((data.batch_size, data.seq_len), 'int32')
  batch = {**dict.fromkeys(('inputs', 'targets', 'segments'), ids), 'mask': ids.update(dtype='float32')}
  step = jax.jit(job.step).lower(job.abstract, batch, job.frozen).as_text()
  return step, jax.jit(job.measure).lower(job.abstract.params, batch).as_text()


def test_the_stand_in_is_the_arms_own_programs(tmp_path):
  config = tiny.config()
  real = train.prepare(config, tmp_path, tmp_path / 'arm')
  assert lowered(measure.stand_in(config, {}, tmp_path)) == lowered(real)


# ----------------------------------------------------------------------------------------------------- arithmetic


def clock(config, once, step, eval_batch, save, start=0):
  """Times of a made-up loop: `(seconds at the end of each step, at the end of each evaluation, of the last save)`."""
  now, ends, evaluated, done = once, [], [], start
  batches = -(-config.eval.bytes // (config.data.batch_size * config.data.seq_len))
  while True:
    due = done % config.eval.every == 0 or done == config.train.steps
    if due:
      now += batches * eval_batch
      evaluated.append(now)
    if due or done % config.run.checkpoint_every == 0:
      now += save
    if done == config.train.steps:
      return ends, evaluated, now
    now, done = now + step, done + 1
    ends.append(now)


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('steps, every, save_every', [(1, 1, 1), (40, 10, 500), (41, 10, 7), (200, 300, 30)])
def test_a_pace_adds_up_to_the_seconds_of_the_loop(compiled, steps, every, save_every):
  config = tiny.config(steps)
  config = dataclasses.replace(
    config, eval=EvalConfig(every=every, bytes=20 * 64), run=RunConfig(checkpoint_every=save_every)
  )
  pace = Pace(compiling=11.0, starting=2.0, step=0.5, eval_batch=0.1, save=0.3, steps=steps)
  *_, seconds = clock(config, 2.0 if compiled else 11.0, 0.5, 0.1, 0.3)
  assert pace.seconds(config, compiled) == pytest.approx(seconds)


def test_short_runs_are_taken_apart_into_what_they_were_made_of(tmp_path, monkeypatch):
  """The loop is made up, and a hiccup of the host does not count for the pace."""
  calls = []

  def fake(job, stop, arm_id):
    config = job.config
    once = 1.5 if calls else 9.0
    start = config.eval.every
    ends, evaluated, end = clock(config, once, 0.05, 0.2, 0.4, start)
    late = [3.0 if i >= 20 else 0.0 for i in range(len(ends))]
    job.folder.mkdir(parents=True)
    lines = [
      {'step': 1 + i, 'kind': 'train', 'seconds': t + s} for i, (t, s) in enumerate(zip(ends, late, strict=True))
    ]
    lines += [{'step': start, 'kind': 'eval', 'loss': 1.0, 'seconds': evaluated[0]}]
    lines += [{'step': config.train.steps, 'kind': 'eval', 'loss': 1.0, 'seconds': evaluated[1] + late[-1]}]
    (job.folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    calls.append(config.train.steps - start)
    return {'seconds': end + late[-1]}

  monkeypatch.setattr(train, 'train', fake)
  _, arms = sweep({})
  (arm,) = arms.values()
  pace = measure.measure(arm, arms, tmp_path)
  assert calls[0] == measure.LEAST
  assert calls[1] > 40  # steps are short, so there are more of them
  assert pace.step == pytest.approx(0.05)
  assert pace.eval_batch == pytest.approx(0.2)
  assert pace.save == pytest.approx(0.4)
  assert pace.compiling == pytest.approx(9.0, abs=0.1)
  assert pace.starting == pytest.approx(1.5 + 3.0, abs=0.2)  # the hiccup must go somewhere
  assert pace.steps == arm.config.train.steps


# ---------------------------------------------------------------------------------------------------- for real


def test_measuring_needs_no_data_and_no_teacher_and_is_done_once_a_shape(tmp_path, monkeypatch):
  named, arms = sweep(
    TEACHER,
    TAUGHT,
    {**TAUGHT, 'name': 'again', 'optim.learning_rate': 0.1, 'init.arm': 'teacher'},
    base=dataclasses.replace(tiny.config(), transforms=()),
  )
  monkeypatch.setattr(measure, 'SECONDS', 0.2)
  monkeypatch.setattr(train, 'inputs', None)
  paces = measure.measure_all([named['taught'], named['again']], arms, tmp_path)
  (pace,) = paces.values()
  assert all(value > 0 for value in pace)
  assert measure.known(tmp_path) == paces
  assert sorted(path.name for path in tmp_path.iterdir()) == ['cache']
  assert not list((tmp_path / 'cache').glob('measure-*'))
  monkeypatch.setattr(measure, 'measure', None)
  assert measure.measure_all([named['again']], arms, tmp_path) == paces


def test_what_another_machine_measured_is_kept_and_not_used(tmp_path, monkeypatch):
  pace = Pace(1.0, 1.0, 1.0, 1.0, 1.0, 10)
  named, arms = sweep({'name': 'one'})
  monkeypatch.setattr(measure, 'measure', lambda *args: pace)
  for name in ('here', 'there'):
    monkeypatch.setattr(measure, 'machine', lambda name=name: name)
    assert measure.known(tmp_path) == {}
    measure.measure_all([named['one']], arms, tmp_path)
  assert len(read_json(tmp_path / 'cache' / 'measured.json')[0]) == 2


@pytest.mark.parametrize('text', ['', '[]', '{"%s": {"a": {"step": 1}}}', '{"%s": []}'])
def test_a_damaged_or_older_record_is_measured_anew(tmp_path, text):
  (tmp_path / 'cache').mkdir()
  (tmp_path / 'cache' / 'measured.json').write_text(text.replace('%s', measure.machine()))
  assert measure.known(tmp_path) == {}
