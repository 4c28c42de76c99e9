"""A whole run: what it leaves behind, and what the numbers in it mean."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from slm_jax import metrics, train
from slm_jax.checkpoint import load_model
from slm_jax.config import ConfigError
from slm_jax.data.config import DataConfig
from slm_jax.data.dataset import open_data
from slm_jax.distill.logits import Distill, SelfDistill
from slm_jax.ema import Ema
from slm_jax.evaluate import evaluate, make_measure
from slm_jax.experiment import InitConfig, TrainConfig
from slm_jax.ledger import Diverged
from slm_jax.model import decoder
from slm_jax.model.flops import flops_per_token, parameter_count
from slm_jax.preempt import EXIT_DONE, EXIT_FAILED
from slm_jax.prune.sparse import OneShot
from slm_jax.prune.transform import Prune

SHAKESPEARE = Path(__file__).parents[1] / '../shared/data/tinyshakespeare.txt'


def small(**changes):
  return dataclasses.replace(tiny.config(20), **changes)


def run_json(workdir, arm):
  return json.loads((workdir / 'arms' / arm / 'run.json').read_text())


@pytest.fixture(scope='module')
def family(tmp_path_factory):
  """A teacher and the students that build on it."""
  workdir = tmp_path_factory.mktemp('family')
  teacher = small(name='teacher', transforms=())
  smaller = dataclasses.replace(teacher.model, n_layers=1, d_ff=16)
  arms = {
    'teacher': teacher,
    'distilled': small(name='distilled', model=smaller, transforms=(Distill('teacher', weight=0.5, temperature=2.0),)),
    'cut': small(name='cut', model=smaller, transforms=(), init=InitConfig('teacher')),
    'both': small(
      name='both',
      transforms=(Distill('distilled', weight=0.5), Prune(0.5, allocation='global', every=2), Ema(0.5)),
    ),
  }
  for name, config in arms.items():
    assert train.run(config, workdir, name) == EXIT_DONE
  return workdir, arms


def test_what_a_run_leaves(family):
  workdir, _ = family
  folder = workdir / 'arms' / 'teacher'
  left = {path.name for path in folder.iterdir()}
  assert {'config.json', 'run.json', 'metrics.jsonl', 'checkpoints', 'model', 'samples.json', 'DONE'} <= left
  record = run_json(workdir, 'teacher')
  assert record['status'] == 'done'
  assert record['git'].keys() == {'commit', 'dirty'}
  assert record['packages']['jax'] == jax.__version__
  lines = list(metrics.read(folder / 'metrics.jsonl'))
  assert [line['step'] for line in lines if line['kind'] == 'eval'] == [0, 10, 20]
  losses = [line['loss'] for line in lines if line['kind'] == 'eval']
  assert losses[-1] < losses[0] - 1


def test_the_saved_model_alone_gives_the_reported_loss(family):
  """Also where what is evaluated is a masked average of the parameters."""
  workdir, arms = family
  for name in ('teacher', 'both'):
    config, params, record = load_model(workdir / 'arms' / name / 'model')
    dataset = open_data(arms[name].data, workdir / 'data', print)
    assert record['tokenizer'] == dataset.tokenizer.fingerprint
    step = make_measure(decoder.build(config), dataset.tokenizer, 2048)
    batches = dataset.valid_batches(8, arms[name].eval.bytes)
    again = evaluate(step, params, batches, lambda: None)
    assert again['loss'] == pytest.approx(run_json(workdir, name)['summary']['loss'], rel=1e-5)


def test_flops_charge_the_teacher(family):
  workdir, arms = family
  t = arms['teacher'].data.seq_len
  teacher = flops_per_token(arms['teacher'].model, t, backward=False)
  summary = run_json(workdir, 'distilled')['summary']
  slots = 20 * 8 * t  # of which the first token of each document is predicted by nobody
  assert summary['tokens'] < slots
  assert summary['flops'] == slots * (flops_per_token(arms['distilled'].model, t) + teacher)
  assert summary['parent_flops'] == run_json(workdir, 'teacher')['summary']['flops']
  assert summary['parameters'] == parameter_count(arms['distilled'].model)
  assert run_json(workdir, 'cut')['summary']['parent_flops'] == summary['parent_flops']
  grandchild = run_json(workdir, 'both')['summary']
  assert grandchild['parent_flops'] == summary['flops'] + summary['parent_flops']


def test_an_ancestor_that_is_reached_by_two_ways_counts_once(family, tmp_path):
  """A model that is cut out of a sparse version of its teacher."""
  workdir, arms = family
  for name in ('data', 'arms/teacher'):
    shutil.copytree(workdir / name, tmp_path / name)
  init = InitConfig('teacher', sparse=OneShot('magnitude', 0.5))
  sparse = small(name='sparse', transforms=(), init=init, train=TrainConfig(steps=2))
  child = dataclasses.replace(arms['distilled'], name='child', init=InitConfig('sparse'), train=TrainConfig(steps=2))
  for config in (sparse, child):
    assert train.run(config, tmp_path, config.name) == EXIT_DONE
  teacher, parent, own = (run_json(tmp_path, name) for name in ('teacher', 'sparse', 'child'))
  each = {'teacher': teacher['summary']['flops'], 'sparse': parent['summary']['flops']}
  assert (teacher['pipeline'], parent['pipeline'], own['pipeline']) == ({}, {'teacher': each['teacher']}, each)
  assert own['summary']['parent_flops'] == sum(each.values())


def test_a_damaged_record_of_a_parent_shows_before_the_training(family, tmp_path, caplog):
  workdir, arms = family
  for name in ('data', 'arms/teacher'):
    shutil.copytree(workdir / name, tmp_path / name)
  record = tmp_path / 'arms/teacher/run.json'
  record.write_text(record.read_text()[:300])
  assert train.run(arms['distilled'], tmp_path, 'distilled') == EXIT_FAILED
  assert f'{record}: damaged (not JSON' in caplog.text
  assert f'; remove {record.parent}/DONE and launch again' in caplog.text
  assert not (tmp_path / 'arms/distilled/metrics.jsonl').exists()


def test_a_cut_model_starts_where_its_parent_is_strong(family):
  workdir, _ = family

  def first(arm):
    return next(metrics.read(workdir / 'arms' / arm / 'metrics.jsonl'))['loss']

  assert first('cut') < first('distilled')


def test_a_pruned_average_is_sparse(family):
  workdir, _ = family
  _, params, _ = load_model(workdir / 'arms' / 'both' / 'model')
  names = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')
  zero = sum(int((np.asarray(params['layers'][n]) == 0).sum()) for n in names)
  assert zero == pytest.approx(0.5 * sum(params['layers'][n].size for n in names), rel=1e-3)
  state_density = [
    line['density'] for line in metrics.read(workdir / 'arms' / 'both' / 'metrics.jsonl') if 'density' in line
  ]
  assert state_density[0] == 1
  assert state_density[-1] == pytest.approx(0.5, abs=1e-3)


def test_a_fresh_state_has_the_types_of_a_restored_one_and_keeps_them(tmp_path):
  """Weak types included, or a resumed run's program would be another one."""
  narrow = dataclasses.replace(tiny.config().model, dtype='bfloat16', param_dtype='bfloat16')
  config = small(name='narrow', model=narrow, transforms=(Ema(0.5), Prune(0.5), SelfDistill()))
  job = train.prepare(config, tmp_path, tmp_path / 'arm')

  def types(state):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)

  assert types(job.fresh(config)) == types(job.abstract)
  after, _ = jax.eval_shape(job.step, job.abstract, train.abstract_batch(job), job.frozen)
  assert types(after) == types(job.abstract)
  calls = []

  def counted(*given):
    calls.append(given)
    return job.step(*given)

  counting = job._replace(step=counted)
  train.jitted(counting).trace(job.fresh(config), train.abstract_batch(job), job.frozen)
  assert train.hardware_flops(counting) > 0
  assert len(calls) == 1, 'FLOPs are counted on the trace that there is'


def test_a_teacher_that_speaks_another_language_is_refused(family, capsys):
  workdir, arms = family
  data = dataclasses.replace(arms['distilled'].data, tokenizer='sentencepiece', vocab_size=340)
  other = dataclasses.replace(arms['distilled'], data=data)
  assert train.run(other, workdir, 'other') == EXIT_FAILED
  error = run_json(workdir, 'other')['error']
  assert 'arm teacher' in error
  assert '\n' not in error


def test_a_missing_parent_is_named(tmp_path):
  assert train.run(small(transforms=(Distill('nobody'),)), tmp_path, 'orphan') == EXIT_FAILED
  assert 'nobody' in run_json(tmp_path, 'orphan')['error']


def test_a_damaged_model_is_refused(family, tmp_path):
  import shutil

  workdir, _ = family
  shutil.copytree(workdir / 'arms' / 'teacher' / 'model', tmp_path / 'model')
  for path in (tmp_path / 'model' / 'params').rglob('*'):
    if path.is_file() and path.parent.name == 'd':
      data = bytearray(path.read_bytes())
      data[len(data) // 2] ^= 1
      path.write_bytes(data)
  with pytest.raises(ConfigError, match='damaged model'):
    load_model(tmp_path / 'model')


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason='needs ../shared/data/tinyshakespeare.txt')
def test_a_run_on_shakespeare(tmp_path):
  config = tiny.config(150)
  data = DataConfig(sources=(str(SHAKESPEARE),), seq_len=64, batch_size=16)
  assert train.run(dataclasses.replace(config, data=data), tmp_path, 'tiny') == EXIT_DONE
  summary = run_json(tmp_path, 'tiny')['summary']
  assert summary['loss'] < 3.2  # a unigram of its characters has 3.3
  assert summary['floor'] is None


# ------------------------------------------------------------------------------------------------------- divergence


def test_an_arm_that_ends_above_the_uniform_distribution_has_diverged(tmp_path):
  """A learning rate of 10: its loss is a number, 1247 say, and was called done."""
  config = tiny.config(20)
  config = dataclasses.replace(
    config, optim=dataclasses.replace(config.optim, learning_rate=10.0, schedule='constant', clip=0.0)
  )
  assert train.run(config, tmp_path, 'tiny') == 1
  record = json.loads((tiny.arm(tmp_path) / 'run.json').read_text())
  assert record['status'] == 'diverged'
  assert not (tiny.arm(tmp_path) / 'DONE').exists()
  if 'not finite' not in record['error']:
    assert 'above the 5.951 nats a token of the uniform distribution' in record['error']


def test_uniform_is_the_limit_of_what_was_trained_only():
  config = tiny.config(20)
  uniform = math.log(config.model.vocab_size)
  train.check_converged(config, {'loss': uniform - 1e-6})
  with pytest.raises(Diverged, match=r'ends at a loss of 6\.951, above the 5\.951 nats'):
    train.check_converged(config, {'loss': uniform + 1})
  train.check_converged(tiny.config(0), {'loss': 18.0})
