"""Distillation across vocabularies: against the definitions, term by term, and as an arm."""

import dataclasses
import json
import shutil
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from toy import toy_batch, toy_model

from slm_jax import metrics, train, vocabulary
from slm_jax.ablate import measure, population
from slm_jax.config import ConfigError, check, override
from slm_jax.data.config import DataConfig
from slm_jax.data.dataset import open_data
from slm_jax.distill.crossed import CrossDistill, Crossed, binary_kl, by_chunk, matched, ranked_alike, sorted_distance
from slm_jax.distill.logits import Distill
from slm_jax.losses import Term
from slm_jax.optim import OptimConfig, optimizer
from slm_jax.preempt import EXIT_DONE, EXIT_FAILED
from slm_jax.step import Context, init_state, make_step

V, B, T, M = 11, 4, 6, 9
MODEL, OTHER = toy_model(V), toy_model(17, 12)
PARAMS, ITS = MODEL.init(jax.random.PRNGKey(1)), OTHER.init(jax.random.PRNGKey(2))
NUMBERS = {'x.weight': 0.7, 'x.temperature': 3.0}
OPTIM = optimizer(OptimConfig(learning_rate=1e-2, warmup=0), 10)
TEACHER = Crossed(OTHER, 'teacher', 15, 'x')  # two of its tokens are padding


def batch_of(seed=0):
  """Chunks of one to three tokens on either side; some tokens are in none."""
  rng = np.random.default_rng(seed)
  batch = toy_batch(seed, B, T, V)
  chunk = np.array([[1, 1, 2, 3, 3, 0], [0, 1, 2, 2, 2, 0], [1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0]], np.int32)
  its = np.array([[1, 2, 2, 2, 3, 0, 0, 0, 0], [0, 0, 1, 1, 2, 0, 0, 0, 0], [1, 2, 3, 4, 5, 5, 6, 0, 0], [0] * 9])
  place = np.array([[1, 0, 2, 5, 0, 0], [0, 3, 5, 0, 0, 0], [1, 2, 3, 4, 5, 7], [0] * 6], np.int32)
  return {
    **batch,
    'mask': jnp.ones((B, T)).at[3, 2:].set(0),
    'x_chunk': jnp.asarray(chunk),
    'x_place': jnp.asarray(place),
    'x_its_chunk': jnp.asarray(its, jnp.int32),
    'x_its_inputs': jnp.asarray(rng.integers(0, 15, (B, M)), jnp.int32),
    'x_its_targets': jnp.asarray(rng.integers(0, 15, (B, M)), jnp.int32),
    'x_its_segments': jnp.ones((B, M), jnp.int32),
  }


def step_of(transform, frozen=ITS, batch=None, **options):
  """(gradient as the change of an SGD-like step would see it, metrics) of the first step."""
  step = jax.jit(make_step(MODEL, OPTIM, transform, **options))
  state = init_state(jax.random.PRNGKey(0), PARAMS, OPTIM, transform)
  new, measured = step(state, batch_of() if batch is None else batch, {'teacher': frozen})
  return new.params, measured


def log_probs(model, params, inputs, targets, vocab):
  z = model.head(params, model.hidden(params, {'inputs': inputs}))[..., :vocab]
  return np.asarray(jnp.take_along_axis(jax.nn.log_softmax(z), targets[..., None], -1)[..., 0], np.float64)


ALM, ULD = matched(TEACHER, NUMBERS, V, T), ranked_alike(TEACHER, NUMBERS, V)


def test_alm_is_the_divergence_of_what_both_give_each_chunk():
  batch, tau, total, n = batch_of(), 3.0, 0.0, 0
  own = log_probs(MODEL, PARAMS, batch['inputs'], batch['targets'], V)
  its = log_probs(OTHER, ITS, batch['x_its_inputs'], batch['x_its_targets'], 15)
  for row in range(B):
    for c in range(1, T + 1):
      ours, theirs = np.asarray(batch['x_chunk'])[row] == c, np.asarray(batch['x_its_chunk'])[row] == c
      assert ours.any() == theirs.any()
      if ours.any():
        p, q = np.exp(its[row, theirs].sum() / tau), np.exp(own[row, ours].sum() / tau)
        total += tau * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
        n += 1
  measured = step_of(ALM)[1]
  assert float(measured['x']) == pytest.approx(total / n, rel=1e-5)
  assert float(measured['x_covered']) == pytest.approx(15 / 20)
  assert float(measured['total']) == pytest.approx(0.3 * float(measured['loss']) + 0.7 * total / n, rel=1e-5)


def test_uld_compares_sorted_probabilities_where_both_have_read_the_same():
  batch, total, n = batch_of(), 0.0, 0
  own = np.asarray(jax.nn.softmax(MODEL.head(PARAMS, MODEL.hidden(PARAMS, batch))), np.float64)
  its = OTHER.head(ITS, OTHER.hidden(ITS, {'inputs': batch['x_its_inputs']}))[..., :15]
  its = np.asarray(jax.nn.softmax(its), np.float64)
  for row, i in zip(*np.nonzero(batch['x_place']), strict=True):
    p, q = np.sort(its[row, batch['x_place'][row, i] - 1])[::-1], np.sort(own[row, i])[::-1]
    total, n = total + np.abs(p - np.pad(q, (0, 4))).sum(), n + 1
  measured = step_of(ULD)[1]
  assert float(measured['x']) == pytest.approx(total / n, rel=1e-5)
  assert float(measured['total']) == pytest.approx(0.3 * float(measured['loss']) + 0.7 * total / n, rel=1e-5)


@pytest.mark.parametrize('transform', [ALM, ULD], ids=['alm', 'uld'])
def test_cutting_into_chunks_or_slices_changes_nothing(transform):
  """A chunk of text may lie in two chunks of tokens."""
  whole, measured = step_of(transform)
  for options in ({'chunk': B}, {'chunk': 3 * B}, {'accumulate': 2}, {'accumulate': 4, 'chunk': 2}):
    params, again = step_of(transform, **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, params)
    assert {k: float(v) for k, v in again.items()} == pytest.approx(
      {k: float(v) for k, v in measured.items()}, rel=1e-5
    )


def test_blocks_of_the_vocabulary_change_nothing(monkeypatch):
  whole, measured = step_of(ALM)

  def in_blocks(model):
    return model._replace(head=lambda params, x: vocabulary.blocks(lambda rows: x @ rows.T, params['head'].T, 4))

  monkeypatch.setattr(sys.modules[__name__], 'MODEL', in_blocks(MODEL))
  params, again = step_of(matched(dataclasses.replace(TEACHER, model=in_blocks(OTHER)), NUMBERS, V, T), chunk=B)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, params)
  assert {k: float(v) for k, v in again.items()} == pytest.approx({k: float(v) for k, v in measured.items()}, rel=1e-5)
  sorts = override(pieces(transforms=(CrossDistill('teacher', divergence='uld'),)), {'train.vocab_chunk': 4})
  with pytest.raises(ConfigError, match=r'divergence=uld: sorts all of the vocabulary, but train\.vocab_chunk=4'):
    check(sorts)


@pytest.mark.parametrize('transform', [ALM, ULD], ids=['alm', 'uld'])
def test_the_teacher_matters_and_does_not_learn(transform):
  other = jax.tree.map(lambda x: 2 * x, ITS)
  assert float(step_of(transform)[1]['x']) != pytest.approx(float(step_of(transform, other)[1]['x']), rel=1e-3)
  batch, numbers = batch_of(), {k: jnp.float32(v) for k, v in NUMBERS.items()}

  def term(its):
    context = Context(jnp.int32(0), jax.random.PRNGKey(0), numbers, {'teacher': its})
    told = transform.data((), PARAMS, batch, context)
    fn = transform.token_loss((), lambda *args: {'loss': Term(jnp.float32(0), jnp.float32(1), 1.0)})
    loss = transform.loss((), lambda p, h, b, c: fn(MODEL.head(p, h), b, c))
    return loss(PARAMS, MODEL.hidden(PARAMS, batch), told, context)['x'].sum

  assert all(not np.asarray(g).any() for g in jax.tree.leaves(jax.grad(term)(ITS)))


def same_tokens():
  """The student's own tokens as the teacher's: every token is a chunk."""
  batch = batch_of()
  each = jnp.where(batch['mask'] > 0, jnp.arange(1, T + 1)[None], 0)
  its = {f'x_its_{k}': batch[k] for k in ('inputs', 'targets', 'segments')}
  return {**batch, **its, 'x_chunk': each, 'x_its_chunk': each, 'x_place': each}


def test_with_one_tokenizer_at_tau_1_alm_is_about_the_targets_probability():
  batch, teacher = same_tokens(), toy_model(V, 12)
  its = teacher.init(jax.random.PRNGKey(5))
  transform = matched(Crossed(teacher, 'teacher', V, 'x'), {'x.weight': 1.0, 'x.temperature': 1.0}, V, T)
  p = np.exp(log_probs(teacher, its, batch['inputs'], batch['targets'], V))
  q = np.exp(log_probs(MODEL, PARAMS, batch['inputs'], batch['targets'], V))
  kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
  mask = np.asarray(batch['mask'])
  measured = step_of(transform, its, batch)[1]
  assert float(measured['x']) == pytest.approx((kl * mask).sum() / mask.sum(), rel=1e-5)
  assert float(measured['x_covered']) == 1


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
  teacher = Crossed(MODEL, 'teacher', V, 'x')
  measured = step_of(matched(teacher, WHOLE, V, T), PARAMS, same_tokens())[1]
  assert float(measured['grad_norm']) < 1e-3
  assert float(measured['x']) == pytest.approx(0, abs=1e-6)
  measured = step_of(ranked_alike(teacher, WHOLE, V), PARAMS, same_tokens())[1]  # |p - q| has a kink there
  assert float(measured['x']) == pytest.approx(0, abs=1e-6)


WHOLE = {'x.weight': 1.0, 'x.temperature': 10.0}


def test_alm_is_0_only_at_equality_and_keeps_its_size_for_large_tau():
  p, q = (-jnp.asarray(np.random.default_rng(i).gamma(1.0, 3.0, 1000), jnp.float32) for i in (0, 1))
  for tau in (1.0, 10.0, 100.0):
    assert float(jnp.abs(binary_kl(p, p, tau)).max()) < 1e-6
    assert float(binary_kl(p, q, tau).min()) > -1e-6  # a difference of float32 numbers of about 1
  u, v = -np.asarray(p, np.float64), -np.asarray(q, np.float64)
  expected = u * np.log(u / v) - u + v
  np.testing.assert_allclose(binary_kl(p, q, 1e4), expected, rtol=2e-2, atol=1e-3)
  certain = jnp.zeros(3)
  assert np.isfinite(jax.grad(lambda x: binary_kl(certain, x, 1.0).sum())(certain)).all()
  assert np.isfinite(jax.grad(lambda x: binary_kl(certain, x, 100.0).sum())(jnp.full(3, -200.0))).all()


@pytest.mark.parametrize('tau', [1.0, 100.0])
def test_a_student_that_is_too_sure_of_a_chunk_is_made_less_sure(tau):
  """Its log-probability is beyond what float32 tells from 0; the teacher gives the chunk a half."""
  half = jnp.log(jnp.float32(0.5))

  def slope(log_q):
    return float(jax.grad(lambda x: binary_kl(half, x, tau))(jnp.float32(log_q)))

  assert slope(-1e-8) == slope(0.0) == slope(-1e-6) > 1e5
  assert float(jax.grad(lambda x: binary_kl(jnp.float32(0), x, tau))(jnp.float32(0))) == 0  # both are sure


def test_uld_does_not_know_which_token_is_which():
  rng = np.random.default_rng(0)
  a, b = (jnp.asarray(rng.normal(size=(5, n)), jnp.float32) for n in (8, 12))
  mixed = jnp.asarray(rng.permuted(np.asarray(b), axis=1))
  np.testing.assert_allclose(sorted_distance(a, b), sorted_distance(a, mixed), atol=1e-6)
  np.testing.assert_allclose(sorted_distance(b, mixed), 0, atol=1e-6)
  np.testing.assert_allclose(sorted_distance(a, b), sorted_distance(b, a), atol=1e-6)
  padded = jnp.pad(a, ((0, 0), (0, 3)), constant_values=-jnp.inf)
  np.testing.assert_allclose(sorted_distance(padded, b), sorted_distance(a, b), atol=1e-6)


def test_sums_by_chunk_add_up():
  batch, z = batch_of(), jnp.asarray(np.random.default_rng(0).normal(size=(B, T, V)), jnp.float32)
  both = by_chunk(z, batch['targets'], batch['x_chunk'], T)
  parts = [by_chunk(z[:, s], batch['targets'][:, s], batch['x_chunk'][:, s], T) for s in (slice(0, 4), slice(4, None))]
  np.testing.assert_allclose(parts[0].sum + parts[1].sum, both.sum, rtol=1e-6)
  np.testing.assert_array_equal(parts[0].count + parts[1].count, both.count)


# ------------------------------------------------------------------------------------------------------------ as an arm


def pieces(**changes):
  data = DataConfig(documents=200, tokenizer='sentencepiece', vocab_size=340, seq_len=40, batch_size=8)
  return dataclasses.replace(tiny.config(20), **{'data': data, 'transforms': (), **changes})


@pytest.fixture(scope='module')
def family(tmp_path_factory):
  """A teacher of bytes, and students of pieces."""
  workdir = tmp_path_factory.mktemp('crossed')
  teacher = override(tiny.config(20), {'name': 'teacher', 'transforms': (), 'data.seq_len': 96})
  arms = {'teacher': teacher, 'plain': pieces(name='plain')}
  for name in ('alm', 'uld'):
    spec = CrossDistill('teacher', divergence=name, weight=0.9, length=96)
    blocks = {'train.vocab_chunk': 100 if name == 'alm' else 0}  # the vocabulary of bytes has 384, that of pieces 340
    arms[name] = override(pieces(name=name, transforms=(spec,)), blocks)
  for name, config in arms.items():
    assert train.run(config, workdir, name) == EXIT_DONE
  return workdir, arms


def summary_of(workdir, arm):
  return json.loads((workdir / 'arms' / arm / 'run.json').read_text())['summary']


@pytest.mark.parametrize('name', ['alm', 'uld'])
def test_a_student_of_pieces_learns_from_a_teacher_of_bytes(family, name):
  workdir, _ = family
  lines = [line for line in metrics.read(workdir / 'arms' / name / 'metrics.jsonl') if 'cross_distill' in line]
  assert lines[-1]['cross_distill'] < 0.7 * lines[0]['cross_distill']
  assert min(line['cross_distill_covered'] for line in lines) > 0.9
  plain, taught, teacher = (summary_of(workdir, arm) for arm in ('plain', name, 'teacher'))
  assert taught['flops'] > plain['flops']
  assert taught['parent_flops'] == teacher['flops']
  # All of the valid text, cut into other sequences: the teacher finds it as likely as its own run said.
  assert taught['teacher_bits_per_byte'] == pytest.approx(teacher['bits_per_byte'], rel=0.1)
  assert 0 < taught['chunk_kl'] < 1


def test_a_stand_in_has_the_shapes_of_the_arm(family, tmp_path):
  workdir, arms = family
  config = arms['alm']
  real = train.prepare(config, workdir, workdir / 'arms' / 'alm').dataset
  job = measure.stand_in(config, {'teacher': SimpleNamespace(config=arms['teacher'])}, tmp_path)

  def shapes(batch):
    return {name: (x.shape, x.dtype) for name, x in batch.items()}

  assert shapes(job.dataset.batch(0)) == shapes(real.batch(0))
  assert shapes(next(iter(job.dataset.valid_batches(8, 500)))) == shapes(next(iter(real.valid_batches(8, 500))))


def refused(config, workdir):
  assert train.run(config, workdir, 'refused') == EXIT_FAILED
  error = json.loads((workdir / 'arms' / 'refused' / 'run.json').read_text())['error']
  assert '\n' not in error
  return error


def test_what_does_not_fit_is_said(family):
  workdir, _ = family
  short = pieces(transforms=(CrossDistill('teacher', length=20),))
  assert 'cross_distill.length=20: only' in refused(short, workdir)
  long = pieces(transforms=(CrossDistill('teacher', length=97),))
  assert 'length=97: longer than max_len=96 of the teacher teacher' in refused(long, workdir)


def test_a_vocabulary_of_the_same_size_is_another_one(family):
  """Found on a text, before weights are loaded. (A start from another arm's weights goes by spelling.)"""
  workdir, arms = family
  config = pieces(name='same', data=dataclasses.replace(pieces().data, documents=150))
  own, other = (open_data(c.data, workdir / 'data', print).tokenizer for c in (config, arms['plain']))
  assert own.vocab_size == other.vocab_size
  assert own.fingerprint != other.fingerprint
  error = refused(dataclasses.replace(config, transforms=(Distill('plain'),)), workdir)
  assert 'arm plain was trained with another tokenizer' in error
  assert 'cross_distill' in error
  assert " of '" in error or 'spelling' in error


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'teacher': ''}, "teacher='': name the arm"),
    ({'weight': 1.5}, 'weight=1.5: must lie in'),
    ({'temperature': 0.0}, 'temperature=0.0: must be positive'),
    ({'length': -1}, 'length=-1: must be positive, or 0'),
  ],
)
def test_bad_settings(settings, message):
  with pytest.raises(ConfigError, match=message):
    check(CrossDistill(**{'teacher': 't', **settings}), 'x')


@pytest.mark.usefixtures('one_fake_device')  # a population does not span devices
@pytest.mark.parametrize('divergence', ['alm', 'uld'])
def test_students_share_the_teacher_in_a_population(family, tmp_path, divergence):
  workdir, _ = family
  shutil.copytree(workdir / 'arms' / 'teacher', tmp_path / 'arms' / 'teacher')
  base = override(pieces(), {'train.steps': 6, 'eval.every': 6, 'eval.samples': 0})
  arms = {
    f'{weight}': dataclasses.replace(
      base, transforms=(CrossDistill('teacher', divergence=divergence, weight=weight, length=96),)
    )
    for weight in (0.2, 0.9)
  }
  assert population.run(arms, tmp_path) == dict.fromkeys(arms, 0)
  assert train.run(arms['0.9'], tmp_path, 'alone') == EXIT_DONE
  together, alone = summary_of(tmp_path, '0.9'), summary_of(tmp_path, 'alone')
  assert together['loss'] == pytest.approx(alone['loss'], abs=1e-5)
  assert together['chunk_kl'] == pytest.approx(alone['chunk_kl'], abs=1e-5)
  assert summary_of(tmp_path, '0.2')['loss'] != together['loss']
