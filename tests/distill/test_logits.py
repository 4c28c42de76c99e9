"""Laws of distillation by the next token: chunks, schedules, teachers, populations, impossible settings."""

import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import toy_batch, toy_model

from slm_jax import losses, vocabulary
from slm_jax.config import ConfigError, check
from slm_jax.distill import signals, teachers
from slm_jax.distill.divergences import DIVERGENCES, kl
from slm_jax.distill.logits import Distill, SelfDistill, distill, taught_by
from slm_jax.experiment import Config
from slm_jax.model import decoder
from slm_jax.model.config import ModelConfig
from slm_jax.optim import OptimConfig, optimizer
from slm_jax.step import Resources, chain, init_state, make_step

MODEL, TEACHER = toy_model(), toy_model(width=16)
FROZEN = {'teacher': TEACHER.init(jax.random.PRNGKey(7)), 'second': MODEL.init(jax.random.PRNGKey(8))}
OPTIM = optimizer(OptimConfig(learning_rate=1e-2, warmup=0), 100)
ONLINE = teachers.online(TEACHER)


def with_(divergence='kl', weight=1.0, temperature=1.0, teacher=ONLINE, **more):
  numbers = {'distill.weight': weight, 'distill.temperature': temperature}
  numbers |= {f'distill.{k}': more.pop(k) for k in ('mix', 'weight_end', 'temperature_end') if k in more}
  loss = signals.dense_loss(DIVERGENCES[divergence])
  return taught_by(teachers.dense(teacher), loss, numbers, **more)


def start(transform, seed=0):
  return init_state(jax.random.PRNGKey(seed), MODEL.init(jax.random.PRNGKey(seed + 1)), OPTIM, chain(transform))


def run(transform, n=5, frozen=FROZEN, state=None, **options):
  step = jax.jit(make_step(MODEL, OPTIM, transform, **options))
  state, seen = start(transform) if state is None else state, []
  for i in range(n):
    state, metrics = step(state, toy_batch(i), frozen)
    seen.append(metrics)
  return state, seen


def close(a, b, tolerance=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


# ------------------------------------------------------------------------------------------------------------- chunks

SOURCES = {
  **{name: lambda name=name: with_(name, teacher=ONLINE, mix=0.3, temperature=2.0) for name in DIVERGENCES},
  'top_k': lambda: taught_by(teachers.largest(ONLINE, 3), signals.top_k_loss(), NUMBERS),
  'sampled': lambda: taught_by(teachers.drawn(ONLINE, 5, 'distill'), signals.sampled_loss(), NUMBERS),
  'taid': lambda: with_('kl', teacher=ONLINE, moving=True, steps=10, mix=0.4),
}
NUMBERS = {'distill.weight': 0.7, 'distill.temperature': 1.0}


@pytest.mark.parametrize('name', ['kl', 'normalized_jsd', 'mse', 'top_k', 'sampled', 'taid'])
def test_chunks_and_accumulation_change_nothing(name):
  """Masks are ragged, and neither the chunk nor the part divides the tokens evenly."""
  whole = run(SOURCES[name](), 3)
  close(run(SOURCES[name](), 3, chunk=16)[0].params, whole[0].params, 1e-5)
  if name != 'sampled':  # whose random numbers belong to a place in the batch
    close(run(SOURCES[name](), 3, accumulate=2)[0].params, whole[0].params, 1e-5)


@pytest.mark.parametrize('name', SOURCES)
def test_blocks_of_the_vocabulary_change_nothing(name, monkeypatch):
  """Both models' logits in blocks of 4 of 11 tokens, and the text in chunks; logs and all."""
  whole = run(SOURCES[name](), 3)

  def in_blocks(model):
    return model._replace(head=lambda params, x: vocabulary.blocks(lambda rows: x @ rows.T, params['head'].T, 4))

  monkeypatch.setattr(sys.modules[__name__], 'ONLINE', teachers.online(in_blocks(TEACHER)))
  monkeypatch.setattr(sys.modules[__name__], 'MODEL', in_blocks(MODEL))
  state, seen = run(SOURCES[name](), 3, chunk=16)
  close(state.params, whole[0].params, 1e-5)
  close(seen, whole[1], 1e-4)


def test_memory_of_a_step_with_a_teacher_is_an_eighth_of_dense():
  """N = 8192, V = 32768; value and gradients equal those of whole logits, on a smaller problem."""

  def problem(b, t, d, v):
    keys = jax.random.split(jax.random.PRNGKey(0), 6)
    scale = d**-0.5
    return {
      'student': (jax.random.normal(keys[0], (d, v)) * scale, jax.random.normal(keys[1], (b, t, d))),
      'teacher': (jax.random.normal(keys[2], (2 * d, v)) * scale),
      'batch': {
        'targets': jax.random.randint(keys[3], (b, t), 0, v),
        'mask': (jax.random.uniform(keys[4], (b, t)) < 0.7).astype(jnp.float32),
        'hidden': jax.random.normal(keys[5], (b, t, 2 * d)),
      },
    }

  def objective(student, teacher, batch, chunk):
    def token_loss(logits, tokens, context):
      terms = losses.cross_entropy()(logits, tokens, context)
      nats = 4 * kl(jax.lax.stop_gradient(tokens['hidden'] @ teacher) / 2, logits / 2)
      mask = tokens['mask']
      return {**terms, 'kd': losses.Term((nats * mask).sum(), mask.sum(), 0.5)}

    head, hidden = student
    terms = losses.over_chunks(token_loss, lambda w, x: x @ w, head, hidden, batch, None, chunk)
    return losses.objective(terms)

  def temporary(chunk):
    shapes = jax.eval_shape(lambda: problem(8, 1024, 64, 32768))
    step = jax.jit(jax.value_and_grad(lambda s, t, b: objective(s, t, b, chunk)))
    return step.lower(shapes['student'], shapes['teacher'], shapes['batch']).compile().memory_analysis()

  assert temporary(512).temp_size_in_bytes <= temporary(8192).temp_size_in_bytes / 8
  small = problem(3, 13, 8, 50)
  whole, chunked = (
    jax.value_and_grad(lambda s, chunk=chunk: objective(s, small['teacher'], small['batch'], chunk))(small['student'])
    for chunk in (10_000, 9)
  )
  close(whole, chunked, 1e-5)


# ---------------------------------------------------------------------------------------------------------- schedules


def test_schedules_are_linear_and_end_at_the_last_step():
  """Weights 0.2 -> 0.8 over 5 steps, seen in the objective."""
  _, seen = run(with_('kl', weight=0.2, weight_end=0.8, steps=5))
  for i, metrics in enumerate(seen):
    w = 0.2 + 0.6 * i / 4
    expected = (1 - w) * float(metrics['loss']) + w * float(metrics['distill'])
    assert float(metrics['total']) == pytest.approx(expected, rel=1e-5)


def test_a_temperature_that_stays_is_one_that_ends_where_it_starts():
  close(run(with_(temperature=2.0))[0].params, run(with_(temperature=2.0, temperature_end=2.0))[0].params)
  other = run(with_(temperature=2.0, temperature_end=4.0, steps=5))[1][-1]['distill']
  assert other != pytest.approx(float(run(with_(temperature=2.0))[1][-1]['distill']), rel=1e-3)


def test_numbers_of_schedules_are_traced():
  transform = with_('jsd', steps=50)
  step = jax.jit(make_step(MODEL, OPTIM, transform))
  state = start(transform)
  for scale in (1.0, 0.5):
    hparams = {k: v * scale if v > 0 else v for k, v in state.hparams.items()}
    state, _ = step(state._replace(hparams=hparams), toy_batch(0), FROZEN)
  assert step._cache_size() == 1


def test_taid_moves_from_its_start_to_the_teacher_which_the_last_step_has():
  transform = with_('kl', moving=True, steps=20, mix=0.4)
  state, t = start(transform), []
  step = jax.jit(make_step(MODEL, OPTIM, transform))
  for i in range(20):
    t.append(float(state.slots['distill']['moving'].t))  # in this step
    state, metrics = step(state, toy_batch(i % 3), FROZEN)
    if i == 0:  # the target begins near the student, so its divergence is less than the teacher's
      assert metrics['distill'] < metrics['distill_kl']
  assert (np.diff(t) > 0).all()
  assert t[1] >= 0.4 + 0.6 / 19
  assert t[18] < t[19] == 1.0
  assert metrics['distill'] == pytest.approx(float(metrics['distill_kl']), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- teachers


def both(average, shares):
  pair = [ONLINE, teachers.online(MODEL, 'second')]
  return with_(teacher=teachers.average_of(pair, shares, average))


@pytest.mark.parametrize('average', ['probabilities', 'logits'])
def test_an_ensemble_is_the_mean_it_says(average):
  batch = toy_batch()
  z = [TEACHER.head(FROZEN['teacher'], TEACHER.hidden(FROZEN['teacher'], batch))]
  z.append(MODEL.head(FROZEN['second'], MODEL.hidden(FROZEN['second'], batch)))
  p = [jax.nn.softmax(each) for each in z]
  mean = jnp.log(0.75 * p[0] + 0.25 * p[1]) if average == 'probabilities' else 0.75 * z[0] + 0.25 * z[1]
  transform = both(average, (3.0, 1.0))
  state = start(transform)
  student = MODEL.head(state.params, MODEL.hidden(state.params, batch))
  expected = (kl(mean, student) * batch['mask']).sum() / batch['mask'].sum()
  _, metrics = jax.jit(make_step(MODEL, OPTIM, transform))(state, batch, FROZEN)
  assert metrics['distill'] == pytest.approx(float(expected), rel=1e-5)


def test_an_ensemble_of_one_teacher_twice_is_that_teacher():
  twice = with_(teacher=teachers.average_of([ONLINE, ONLINE], (1.0, 2.0), 'probabilities'))
  close(run(twice)[0].params, run(with_())[0].params, 1e-5)


def test_ones_own_average_teaches_nothing_at_first_and_follows():
  source = teachers.dense(teachers.own_average(MODEL, 'self_distill'))
  numbers = {'self_distill.weight': 0.5, 'self_distill.temperature': 1.0, 'self_distill.decay': 0.9}
  transform = taught_by(source, signals.dense_loss(kl), numbers, name='self_distill')
  state, seen = run(transform, 8, frozen={})
  assert seen[0]['self_distill'] == pytest.approx(0, abs=1e-6)
  assert seen[-1]['self_distill'] > 1e-6
  average, first = state.slots['self_distill']['source'], start(transform).params
  moved = jax.tree.map(
    lambda a, p, f: float(jnp.abs(a - p).mean() < jnp.abs(f - p).mean()), average, state.params, first
  )
  assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize('precision, tolerance', [('bfloat16', 0.02), ('int8', 0.05)])
def test_a_teacher_in_fewer_bits_says_nearly_the_same(precision, tolerance):
  model = decoder.build(
    ModelConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=64, init_std=0.2)
  )
  params = jax.jit(model.init)(jax.random.PRNGKey(0))
  fewer = teachers.stored(params, precision)
  batch = {'inputs': jnp.arange(48).reshape(3, 16)}
  own, its = (model.head(p, model.hidden(p, batch)) for p in (params, teachers.restored(fewer)))
  assert kl(own, its).mean() < tolerance
  assert kl(own, its).mean() > 0
  sizes = [sum(x.nbytes for x in jax.tree.leaves(tree['layers'])) for tree in (params, fewer)]
  assert sizes[1] < sizes[0] * (0.51 if precision == 'bfloat16' else 0.36)


def test_a_bias_is_not_among_the_matrices_of_8_bits():
  model = decoder.build(ModelConfig(norm='layer', mlp='gelu', bias=True, positions='learned'))
  params = jax.eval_shape(model.init, jax.random.PRNGKey(0))
  layers = teachers.stored(params, 'int8')['layers']
  narrow = {name for name, w in layers.items() if isinstance(w, teachers.Int8)}
  assert narrow == {'q', 'k', 'v', 'o', 'up', 'down'}


def test_padding_of_the_vocabulary_is_no_part_of_it():
  """Student and teacher with 64 rows beyond the tokenizer's tokens, as without them."""

  def padded(model):
    def head(params, x):
      return jnp.pad(model.head(params, x), [(0, 0)] * (x.ndim - 1) + [(0, 64)], constant_values=-1.0)

    return model._replace(head=head)

  def distilled(teacher, student):
    numbers = {'distill.weight': 1.0, 'distill.temperature': 2.0}
    source = teachers.dense(teachers.online(teacher, vocab=11))
    transform = taught_by(source, signals.dense_loss(kl), numbers, vocab=11)
    return jax.jit(make_step(student, OPTIM, transform))(start(transform), toy_batch(), FROZEN)

  (plain, a), (more, b) = distilled(TEACHER, MODEL), distilled(padded(TEACHER), padded(MODEL))
  assert a['distill'] == pytest.approx(float(b['distill']), rel=1e-6)
  close(plain.params, more.params, 1e-6)


# --------------------------------------------------------------------------------------------------------- populations


@pytest.mark.parametrize('name', ['kl', 'jsd', 'taid', 'top_k', 'sampled'])
def test_a_population_equals_its_arms_and_asks_the_teacher_once(name):
  """In the program of four students, the teacher's layers are multiplied once, by unbatched operands."""
  transform = chain(SOURCES[name]())
  step = make_step(MODEL, OPTIM, transform)
  arms = [start(transform, seed) for seed in range(4)]
  arms = [
    arm._replace(hparams=arm.hparams | {'distill.weight': jnp.float32(0.2 * (i + 1))}) for i, arm in enumerate(arms)
  ]
  arms = [arm._replace(key=arms[0].key) for arm in arms]  # draws are the arm's own otherwise
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *arms)._replace(step=jnp.int32(0))
  axes = jax.tree.map(lambda _: 0, stacked)._replace(step=None)
  together = jax.jit(jax.vmap(step, in_axes=(axes, None, None), out_axes=(axes, 0)))
  text = together.lower(stacked, toy_batch(), FROZEN).as_text()
  wide = [line for line in text.splitlines() if 'dot_general' in line and re.search(r'tensor<16x16xf32>', line)]
  assert len(wide) == 2, wide  # the teacher's two layers, of its width of 16, which no student has
  assert not any('batching_dims' in line and '= [0]' in line for line in wide)
  for i in range(3):
    stacked, _ = together(stacked, toy_batch(i), FROZEN)
  for i, arm in enumerate(arms):
    close(jax.tree.map(lambda x, i=i: x[i], stacked.params), run(transform, 3, state=arm)[0].params, 1e-5)


# ------------------------------------------------------------------------------------------------- impossible settings


@pytest.mark.parametrize(
  'spec, message',
  [
    (Distill(''), "transforms.distill.teacher='': name the arm to learn from"),
    (Distill('t', weight=1.5), 'distill.weight=1.5: must lie in [0, 1]'),
    (Distill('t', weight_end=-0.5), 'distill.weight_end=-0.5: must lie in [0, 1], or be -1'),
    (Distill('t', temperature=0.0), 'distill.temperature=0.0: must be positive'),
    (Distill('t', temperature_end=0.0), 'distill.temperature_end=0.0: must be positive, or -1'),
    (Distill('t', mix=2.0), 'distill.mix=2.0: must lie in [0, 1]'),
    (Distill('t', signal='top_k', k=513), 'distill.k=513: larger than model.vocab_size=512'),
    (Distill('t', signal='top_k', k=0), 'distill.k=0: must be positive'),
    (Distill('t', signal='sampled', draws=256), 'distill.draws=256: must lie in [1, 255]'),
    (Distill('t', signal='top_k', divergence='jsd'), 'distill.divergence=jsd: needs the whole distribution'),
    (Distill('t', signal='sampled', temperature=2.0), 'sampled is at temperature 1 only'),
    (Distill('t', signal='top_k', tail='none', temperature=2.0), 'tail=none is at temperature 1 only'),
    (Distill('t', divergence='policy_gradient', temperature=2.0), 'policy_gradient is at temperature 1 only'),
    (Distill('t', divergence='policy_gradient', temperature_end=2.0), 'policy_gradient is at temperature 1 only'),
    (Distill('t', co_teachers=('u',), shares=(1.0,)), 'distill.shares=(1.0,): expected 2, one for each teacher'),
    (Distill('t', co_teachers=('u',), shares=(1.0, 0.0)), 'must be positive'),
    (SelfDistill(decay=1.0), 'self_distill.decay=1.0: must lie in [0, 1)'),
  ],
)
def test_what_cannot_be_is_one_line(spec, message):
  with pytest.raises(ConfigError, match=re.escape(message)) as error:
    check(Config(transforms=(spec,)))
  assert '\n' not in str(error.value)


def test_a_top_k_beyond_the_tokenizer_is_refused_where_the_models_vocabulary_is_padded():
  resources = Resources(steps=1, seq_len=6, vocab=8, model=TEACHER, load=lambda arm: (TEACHER, {}), folder=None)
  with pytest.raises(ConfigError, match='transforms.distill.k=9: the tokenizer has 8 tokens'):
    Distill('t', signal='top_k', k=9).build(resources)


def test_the_plain_case_is_hintons():
  plain, general = distill(TEACHER, 0.5, 2.0), with_(weight=0.5, temperature=2.0)
  close(run(plain)[0].params, run(general)[0].params)
  assert {f.name for f in dataclasses.fields(Distill) if f.metadata.get('traced')} == {
    name.removeprefix('distill.') for name in plain.hparams
  }
