"""Laws of distillation from within: hidden states through projections, relations between tokens."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from toy import toy_batch

from slm_jax import train
from slm_jax.checkpoint import load_model
from slm_jax.config import ConfigError, check, override, traced
from slm_jax.distill import features
from slm_jax.distill.features import Features, Relations, projected, related, relation_kl
from slm_jax.distill.logits import Distill
from slm_jax.ema import ema
from slm_jax.experiment import Config
from slm_jax.model import decoder
from slm_jax.model.api import Feature
from slm_jax.model.attention import attention, document_starts
from slm_jax.model.config import ModelConfig
from slm_jax.optim import OptimConfig, optimizer
from slm_jax.perf import matmul_flops
from slm_jax.prune.magnitude import prune
from slm_jax.sharding import make_mesh
from slm_jax.step import Context, Resources, chain, init_state, make_step

SMALL = ModelConfig(
  vocab_size=11, d_model=8, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=12, init_std=0.5, unroll=1
)
MODEL, TEACHER = decoder.build(SMALL), decoder.build(dataclasses.replace(SMALL, d_model=12, n_layers=4, n_kv_heads=4))
FROZEN = {'teacher': jax.jit(TEACHER.init)(jax.random.PRNGKey(7))}
OPTIM = optimizer(OptimConfig(learning_rate=1e-2, warmup=0), 100)
PAIRS = [(1, 1), (2, 4)]


def hidden_states(weight=1.0, rate=1.0, distance=features.mse, teacher=TEACHER, pairs=PAIRS):
  return projected(teacher, pairs, distance, {'features.weight': weight, 'features.rate': rate})


def relations(weight=1.0, teacher=TEACHER, layers=(2, 4), kinds=('qq', 'kk', 'vv'), heads=2):
  return related(teacher, SMALL, layers, kinds, heads, weight)


BOTH = [hidden_states, relations]


def batch_of(seed=0, b=8, t=6):
  """Two documents in some rows."""
  batch = toy_batch(seed, b, t)
  return {**batch, 'segments': jnp.ones((b, t), jnp.int32).at[: b // 2, t // 2 :].set(2)}


@functools.cache
def fresh(seed=0):
  return jax.jit(MODEL.init)(jax.random.PRNGKey(seed + 1))


def start(transform, seed=0, optim=OPTIM):
  made = jax.jit(lambda key, params: init_state(key, params, optim, transform))
  return made(jax.random.PRNGKey(seed), fresh(seed))


def run(transform, n=3, frozen=FROZEN, state=None, optim=OPTIM, **options):
  step = jax.jit(make_step(MODEL, optim, transform, **options))
  state = start(transform, optim=optim) if state is None else state
  for i in range(n):
    state, metrics = step(state, batch_of(i), frozen)
  return state, metrics


def measured_by(transform):
  """A compiled function (batch, frozen) -> (the term, its gradient with respect to all parameters) before any step."""
  params = {**fresh(), **extra_of(transform)}
  hparams = {k: jnp.float32(v) for k, v in transform.hparams.items()}

  def mean(params, batch, frozen):
    context = Context(jnp.int32(0), jax.random.PRNGKey(0), hparams, frozen)
    hidden, found = MODEL.features(params, batch, transform.wants)
    taught = transform.data((), params, batch, context)
    fn = transform.loss((), lambda *args: {})
    term = fn(params, hidden, taught, context._replace(features=found))[transform.name]
    return term.sum / term.count

  compiled = jax.jit(jax.value_and_grad(mean))
  return lambda batch, frozen=FROZEN: compiled(params, batch, frozen)


def extra_of(transform):
  its = transform.extra(jax.random.PRNGKey(3), fresh())
  return {transform.name: its} if its else {}


def own(params):
  return {k: v for k, v in params.items() if k != 'features'}


def close(a, b, tolerance=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


# ------------------------------------------------------------------------------------------- what a model hands out


@pytest.mark.parametrize('loop', [{'unroll': 0}, {'unroll': 1}, {'unroll': 1, 'remat': 'full'}])
def test_hidden_states_are_those_of_the_layers_one_after_another(loop):
  config = dataclasses.replace(SMALL, **loop)
  model, params = decoder.build(config), fresh()
  batch = batch_of()
  wanted = [Feature('hidden', i) for i in (3, 0, 1)]
  last, found = jax.jit(lambda p: model.features(p, batch, wanted))(params)
  close(last, MODEL.hidden(params, batch), 1e-5)
  assert set(found) == set(wanted)
  x = params['embed']['tokens'][batch['inputs']]
  close(found[Feature('hidden', 0)], x, 1e-6)
  places = decoder._places(config, jnp.arange(6)[None], document_starts(batch['segments']))
  for i in range(3):
    w = jax.tree.map(lambda a, i=i: a[i], params['layers'])
    x = decoder.layer(config, w, x, None, jnp.int32(i), places)[0]
    if i + 1 in (1, 3):
      close(found[Feature('hidden', i + 1)], x, 1e-5)


def test_what_attention_makes_of_q_k_and_v_is_the_layers_own():
  """Replay of layer 2 from its q, k, v gives the hidden state after it."""
  params, batch = fresh(), batch_of()
  wanted = [Feature(kind, 2) for kind in 'qkv'] + [Feature('hidden', 1), Feature('hidden', 2)]
  _, found = MODEL.features(params, batch, wanted)
  q, k, v, x, after = (found[feature] for feature in wanted)
  assert q.shape == (8, 6, 4, 4)
  assert k.shape == v.shape == (8, 6, 2, 4)
  low, high = document_starts(batch['segments']), jnp.broadcast_to(jnp.arange(6), (8, 6))
  w = jax.tree.map(lambda a: a[1], params['layers'])
  z = attention(q, k, v, low, high, SMALL.query_scale)
  x = x + jnp.einsum('bthk,hkd->btd', z, w['o'])
  h = decoder._norm(SMALL, w, 'mlp_norm', x)
  close(x + (jax.nn.silu(h @ w['gate']) * (h @ w['up'])) @ w['down'], after, 1e-5)


def test_wanting_nothing_is_the_program_of_hidden():
  params, batch = fresh(), batch_of()
  plain = jax.jit(lambda p, b: MODEL.hidden(p, b)).lower(params, batch).as_text()
  assert plain == jax.jit(lambda p, b: MODEL.features(p, b, ())[0]).lower(params, batch).as_text()


@pytest.mark.parametrize('feature', [Feature('hidden', 4), Feature('hidden', -1), Feature('q', 0), Feature('v', 4)])
def test_a_layer_that_a_model_does_not_have_is_an_error(feature):
  first = 0 if feature.kind == 'hidden' else 1
  with pytest.raises(ConfigError, match=f'{feature.kind} of layer {feature.layer}: .* 3 layers has {first}..3'):
    MODEL.features({}, batch_of(), [feature])


# ----------------------------------------------------------------------------------------------------- both kinds


@pytest.mark.parametrize('make', BOTH)
def test_weight_zero_is_plain_training(make):
  close(own(run(make(weight=0.0))[0].params), run(chain())[0].params, 1e-6)


@pytest.mark.parametrize('make', BOTH)
@pytest.mark.parametrize('parts', [2, 4])
def test_accumulation_does_not_depend_on_the_split(make, parts):
  whole, split = run(make()), run(make(), accumulate=parts)
  close(whole[0].params, split[0].params, 1e-4)
  close(whole[1], split[1], 1e-4)


@pytest.mark.parametrize('make', BOTH)
def test_the_teacher_matters_and_gets_no_gradient(make):
  transform = make()
  other = {'teacher': TEACHER.init(jax.random.PRNGKey(8))}
  assert abs(run(transform, 1)[1][transform.name] - run(transform, 1, other)[1][transform.name]) > 1e-3
  step = make_step(MODEL, OPTIM, transform)
  grads = jax.jit(jax.grad(lambda f: step(start(transform), batch_of(), f)[1]['total']))(FROZEN)
  assert all((g == 0).all() for g in jax.tree.leaves(grads))
  assert not {x.shape for x in jax.tree.leaves(FROZEN) if 12 in x.shape and x.ndim > 2} & {
    x.shape for x in jax.tree.leaves(start(transform).opt_state)
  }


@pytest.mark.parametrize('make', BOTH)
def test_padding_and_order_of_the_batch_change_nothing(make):
  """U9: rows and tokens of mask 0 do not count, and neither does what stands there."""
  value, batch = measured_by(make()), batch_of()
  reference = value(batch)
  padded = {k: jnp.pad(v, ((0, 3), (0, 2))) for k, v in batch.items()}
  for other in (padded, {k: v[::-1] for k, v in batch.items()}):
    close(value(other), reference, 1e-5)
  last = batch | {'mask': batch['mask'].at[:, -1].set(0)}
  changed = last | {'inputs': last['inputs'].at[:, -1].add(1) % 11}
  close(value(changed), value(last), 1e-6)


@pytest.mark.parametrize('make', BOTH)
def test_a_constant_does_not_change_with_the_mask(make):
  """One scale with and without a mask: of rows that are all alike, any subset has their mean."""
  value, row = measured_by(make()), {k: v[:1] for k, v in batch_of().items()}
  same = {k: jnp.repeat(v, 4, 0) for k, v in row.items()} | {'mask': jnp.ones((4, 6))}
  half = same | {'mask': same['mask'].at[:2].set(0)}
  close(value(same), value(half), 1e-5)


@pytest.mark.parametrize('make', BOTH)
def test_gradients_flow_only_into_the_layers_below(make):
  transform = make(pairs=[(2, 4)]) if make is hidden_states else make(layers=(2, 4))
  _, grads = measured_by(transform)(batch_of())
  flows = np.array([any(np.abs(g[i]).max() > 1e-7 for g in jax.tree.leaves(grads['layers'])) for i in range(3)])
  assert flows.tolist() == [True, True, False]
  assert np.abs(grads['embed']['tokens']).max() > 1e-7
  assert (grads['final_norm'] == 0).all()


@pytest.mark.parametrize('make', BOTH)
def test_a_vmapped_population_equals_its_arms_run_alone(make):
  transform = make()
  step, arms = make_step(MODEL, OPTIM, transform), []
  for i in range(2):
    state = start(transform, seed=i)
    numbers = {f'{transform.name}.weight': 0.5 * i, 'features.rate': 2.0 - i, 'optim.learning_rate': 0.01 * (i + 1)}
    known = {k: jnp.float32(v) for k, v in numbers.items() if k in state.hparams}
    arms.append(state._replace(hparams=state.hparams | known))
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *arms)._replace(step=jnp.int32(0))
  axes = jax.tree.map(lambda _: 0, stacked)._replace(step=None)
  alone, together = jax.jit(step), jax.jit(jax.vmap(step, in_axes=(axes, None, None), out_axes=(axes, 0)))
  for i in range(3):
    stacked, _ = together(stacked, batch_of(i), FROZEN)
  for i, arm in enumerate(arms):
    for batch in map(batch_of, range(3)):
      arm, _ = alone(arm, batch, FROZEN)
    close(jax.tree.map(lambda x, i=i: x[i], stacked.params), arm.params, 1e-4)


@pytest.mark.parametrize('make', BOTH)
def test_it_is_learnt(make):
  step, transform = jax.jit(make_step(MODEL, OPTIM, make(weight=3.0))), make(weight=3.0)
  state, losses = start(transform), []
  for _ in range(40):
    state, metrics = step(state, batch_of(), FROZEN)
    losses.append(float(metrics[transform.name]))
  assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize('make', BOTH)
def test_the_student_runs_once(make):
  """Matrix products of the step, in a scanned model, which the compiler could not merge with a second pass."""

  def flops(transform):
    return matmul_flops(jax.make_jaxpr(make_step(MODEL, OPTIM, transform))(start(transform), batch_of(), FROZEN))

  plain = flops(chain())
  passes = matmul_flops(jax.make_jaxpr(lambda f: TEACHER.hidden(f, batch_of()))(FROZEN['teacher']))
  student = matmul_flops(jax.make_jaxpr(lambda p: MODEL.hidden(p, batch_of()))(fresh()))
  own_products = 48 * sum(6 * 8 * 12 for _ in PAIRS) if make is hidden_states else 48 * 6 * (8 + 8 + 16) * 2 * 3
  assert flops(make()) - plain < passes + own_products + 0.5 * student


# --------------------------------------------------------------------------------------------------- hidden states


@pytest.mark.parametrize('distance', [features.mse, features.cosine])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(distance):
  transform = hidden_states(teacher=MODEL, pairs=[(1, 1), (3, 3)], distance=distance)
  loss, grads = measured_by(transform)(batch_of(), {'teacher': fresh()})
  assert loss == pytest.approx(0, abs=1e-6)
  assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(own(grads))) < 1e-5
  crossed = hidden_states(teacher=MODEL, pairs=[(1, 3)], distance=distance)
  assert measured_by(crossed)(batch_of(), {'teacher': fresh()})[0] > 0.1


def test_distances_by_hand():
  s, t = jnp.array([3.0, 1.0]), jnp.array([0.0, 10.0])
  assert features.mse(s, t) == pytest.approx(4)  # (1, -1) and (-1, 1)
  assert features.mse(5 * s + 2, s) == pytest.approx(0, abs=1e-5)
  assert features.cosine(s, t) == pytest.approx(1 - 1 / 10**0.5)
  x = jax.random.normal(jax.random.PRNGKey(0), (2, 4000))
  assert features.mse(*x) == pytest.approx(2, abs=0.1)


def test_a_pair_is_a_layer_of_each_and_pairs_are_summed():
  """The projection contracts the feature axis only: by hand, with loops over batch and time."""
  transform, batch = hidden_states(), batch_of()
  params = {**fresh(), **extra_of(transform)}
  wanted = [Feature('hidden', i) for i in range(5)]
  ours = jax.jit(lambda p: MODEL.features(p, batch, wanted[:4])[1])(fresh())
  theirs = jax.jit(lambda p: TEACHER.features(p, batch, wanted)[1])(FROZEN['teacher'])
  total, taken = 0.0, np.argwhere(np.asarray(batch['mask']))
  for b, t in taken:
    for i, j in PAIRS:
      guess = np.asarray(ours[wanted[i]][b, t]) @ np.asarray(params['features'][f'{i}_to_{j}'])
      total += features.mse(jnp.asarray(guess), theirs[wanted[j]][b, t])
  assert measured_by(transform)(batch)[0] == pytest.approx(float(total / batch['mask'].sum()), rel=1e-5)


def test_projections_are_dropped_and_are_not_pruned():
  transform = chain(hidden_states(), prune(0.5, 'global', 1, 2, 1), ema(0.5))
  state, _ = run(transform, 3)
  assert all(w.shape == (8, 12) and (w != 0).all() for w in state.params['features'].values())
  final = transform.final(state.slots, state.params)
  assert jax.tree.structure(final) == jax.tree.structure(fresh())


# ----------------------------------------------------------------------------------- their own group of the optimiser


@pytest.mark.parametrize('name', ['adamw', 'muon', 'adafactor'])
def test_projections_have_their_own_learning_rate_and_do_not_decay(name):
  optim = optimizer(OptimConfig(name, learning_rate=1e-2, warmup=0, weight_decay=0.5), 100)

  before = start(hidden_states(), optim=optim)
  step = jax.jit(make_step(MODEL, optim, hidden_states()))

  def moved(rate, weight=1.0):
    numbers = {'features.rate': jnp.float32(rate), 'features.weight': jnp.float32(weight)}
    after, _ = step(before._replace(hparams=before.hparams | numbers), batch_of(), FROZEN)
    return jax.tree.map(lambda a, b: np.asarray(a - b), after.params, before.params)

  still, slow, fast = moved(0.0), moved(0.5), moved(2.0)
  assert all((w == 0).all() for w in still['features'].values())
  assert all(np.abs(w).max() > 1e-3 for w in slow['features'].values())
  jax.tree.map(
    lambda s, f: np.testing.assert_allclose(4 * s, f, rtol=2e-3, atol=1e-6), slow['features'], fast['features']
  )
  close(own(still), own(fast), 1e-6)
  assert all(np.abs(w).max() < 1e-8 for w in moved(1.0, 0.0)['features'].values())


def test_what_clips_the_model_is_its_own_gradient():
  optim = optimizer(OptimConfig(warmup=0, clip=0.1, schedule='constant'), 9)
  transform = hidden_states()
  tx = optim.make({k: jnp.float32(v) for k, v in {**optim.hparams, **transform.hparams}.items()})
  plain = optim.make({k: jnp.float32(v) for k, v in optim.hparams.items()})
  params = start(transform).params
  grads = jax.tree.map(jnp.ones_like, own(params)) | {'features': jax.tree.map(lambda w: 9 * w, params['features'])}
  _, ours = tx.update(grads, tx.init(params), params)
  _, alone = plain.update(own(grads), plain.init(own(params)), own(params))
  mus = [
    next(s.mu for s in jax.tree.leaves(o, is_leaf=lambda s: hasattr(s, 'mu')) if hasattr(s, 'mu'))
    for o in (ours, alone)
  ]
  close(own(mus[0]), mus[1], 1e-6)
  norm = np.sqrt(sum((np.asarray(m) ** 2).sum() for m in mus[0]['features'].values()))
  assert norm == pytest.approx(0.1 * 0.1, rel=1e-4)


# ------------------------------------------------------------------------------------------------------- relations


def heads_of(seed, d, heads=3, b=2, t=10):
  return tuple(jax.random.normal(key, (b, t, heads, d)) for key in jax.random.split(jax.random.PRNGKey(seed), 2))


LOW = document_starts(jnp.array([[1] * 4 + [2] * 6, [1] * 10]))


def test_relation_kl_by_hand():
  ours, theirs = heads_of(0, 4), heads_of(1, 6)
  expected = np.zeros((2, 10))
  for b, t in np.ndindex(2, 10):
    keys = slice(int(LOW[b, t]), t + 1)
    for r in range(3):
      p, q = (jax.nn.softmax(y[b, keys, r] @ x[b, t, r]) for x, y in (theirs, ours))
      expected[b, t] += (p * jnp.log(p / q)).sum() / 3
  close(relation_kl(ours, theirs, LOW), expected, 1e-5)


@pytest.mark.parametrize('scores', [1, 60 * 3, 60 * 4, 60 * 7])
def test_relations_in_blocks_are_those_at_once(scores):
  """Also where the blocks do not divide the tokens; values and gradients."""
  ours, theirs = heads_of(0, 4), heads_of(1, 6)
  weights = jax.random.normal(jax.random.PRNGKey(2), (2, 10))

  def loss(ours, scores):
    return (weights * relation_kl(ours, theirs, LOW, scores)).sum()

  close(jax.value_and_grad(loss)(ours, scores), jax.value_and_grad(loss)(ours, 10**9), 1e-5)


def test_blocks_bound_the_memory():
  def bytes_for(scores):
    x = tuple(jax.ShapeDtypeStruct((2, 512, 4, 8), jnp.float32) for _ in range(2))
    low = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    grad = jax.grad(lambda ours, theirs, low: relation_kl(ours, theirs, low, scores).sum())
    return jax.jit(grad).lower(x, x, low).compile().memory_analysis().temp_size_in_bytes

  assert bytes_for(2**16) < bytes_for(2**30) / 8


def test_rotations_within_a_relation_head_change_nothing():
  """U17; a rotation that mixes the heads does."""
  params, batch = fresh(), batch_of()
  kinds = [Feature(kind, 2) for kind in 'qkv']
  found = {f.kind: x for f, x in MODEL.features(params, batch, kinds)[1].items()}
  its = {f.kind: x for f, x in TEACHER.features(FROZEN['teacher'], batch, kinds)[1].items()}
  low = document_starts(batch['segments'])

  def loss(found, heads):
    return sum(
      relation_kl(
        features.operands(kind, found, SMALL, heads), features.operands(kind, its, TEACHER.config, heads), low
      ).mean()
      for kind in ('qq', 'kk', 'vv')
    )

  def turned(x, heads, key=3):
    d = x[0, 0].size // heads
    rotation = jnp.stack(
      [jax.scipy.linalg.expm(a - a.T) for a in jax.random.normal(jax.random.PRNGKey(key), (heads, d, d))]
    )
    return jnp.einsum('btrd,rde->btre', x.reshape(8, 6, heads, d), rotation).reshape(x.shape)

  within = {kind: turned(x, 4) for kind, x in found.items()}
  assert loss(within, 4) == pytest.approx(float(loss(found, 4)), abs=1e-5)
  across = {kind: turned(x, 1) for kind, x in found.items()}
  assert abs(loss(across, 4) - loss(found, 4)) > 1e-3


def test_a_student_that_is_its_teacher_has_no_relation_loss():
  transform = relations(teacher=MODEL, layers=(2, 2), kinds=('qq', 'kk', 'vv', 'qk'), heads=4)
  loss, grads = measured_by(transform)(batch_of(), {'teacher': fresh()})
  assert loss == pytest.approx(0, abs=1e-6)
  assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) < 1e-5


def test_qk_with_attentions_heads_is_what_attention_does():
  """Also with another scale than K^-1/2, and with keys that query heads share: softmax V gives attention's output."""
  config = dataclasses.replace(SMALL, attn_scale=0.9)
  found = {'q': heads_of(0, 4, heads=4)[0], 'k': heads_of(1, 4, heads=2)[0], 'v': heads_of(2, 4, heads=2)[0]}
  a, b = features.operands('qk', found, config, heads=4)
  scores = jnp.einsum('btrk,bsrk->brts', a, b)
  slots = jnp.arange(10)
  seen = (LOW[..., None] <= slots[None, None]) & (slots[None, None] <= slots[None, :, None])
  weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf))
  z = jnp.einsum('brts,bsrk->btrk', weights, jnp.repeat(found['v'], 2, axis=2))
  high = jnp.broadcast_to(jnp.arange(10), (2, 10))
  close(z, attention(found['q'], found['k'], found['v'], LOW, high, config.query_scale), 1e-5)


@pytest.mark.parametrize('make', BOTH)
def test_a_later_token_and_another_document_change_no_earlier_token(make):
  """Gradients too would show it: the term of token 3 alone, as later tokens and the document before change."""
  value, batch = measured_by(make()), batch_of()
  only = batch | {'mask': jnp.zeros((8, 6)).at[:, 4].set(1)}
  later = only | {'inputs': only['inputs'].at[:, 5].add(1) % 11}
  close(value(later)[0], value(only)[0], 1e-6)
  rows = only | {'mask': only['mask'].at[4:].set(0)}  # of two documents: tokens 0..2, and 3..5
  before = rows | {'inputs': rows['inputs'].at[:, :3].add(1) % 11}
  close(value(before)[0], value(rows)[0], 1e-6)
  earlier = rows | {'inputs': rows['inputs'].at[:, 3].add(1) % 11}
  assert abs(value(earlier)[0] - value(rows)[0]) > 1e-4


# ---------------------------------------------------------------------------------------------------- configuration


def resources(tmp_path=None):
  return Resources(10, 6, 11, MODEL, lambda arm: (TEACHER, FROZEN['teacher']), tmp_path)


BASE = Config(
  model=dataclasses.replace(SMALL, vocab_size=384), data=dataclasses.replace(tiny.config().data, seq_len=64)
)
FINE = [Features(teacher='t', layers=('1:2', '3:4')), Relations(teacher='t', heads=4)]


@pytest.mark.parametrize(
  'spec, message',
  [
    (Features(layers=('1:1',)), "transforms.features.teacher='': name the arm"),
    (Relations(), "transforms.relations.teacher='': name the arm"),
    (Features(teacher='t'), "layers=.*: name pairs of layers, 'student:teacher'"),
    (Features(teacher='t', layers=('1-2',)), "layers='1-2': expected 'student:teacher'"),
    (Features(teacher='t', layers=('1:-2',)), "layers='1:-2': expected 'student:teacher'"),
    (Features(teacher='t', layers=('1:2', '1:3')), 'layers=1:2,1:3: layer 1 of the student is there twice'),
    (Features(teacher='t', layers=('1:2', '2:2')), 'layers=1:2,2:2: layer 2 of the teacher is there twice'),
    (Features(teacher='t', layers=('4:2',)), r'layer 4 of the student: allowed: 0\.\.3'),
    (Features(teacher='t', layers=('0:0',), weight=-1), 'weight=-1.0: must not be negative'),
    (Features(teacher='t', layers=('0:0',), rate=-1), 'rate=-1.0: must not be negative'),
    (Relations(teacher='t', layer=4), r'relations.layer: layer 4 of the student: allowed: 0\.\.3'),
    (Relations(teacher='t', layer=-1), r'relations.layer: layer -1 of the student: allowed: 0\.\.3'),
    (Relations(teacher='t', heads=3), 'heads=3: does not divide the width 16 of qq in the student'),
    (Relations(teacher='t', heads=16), 'heads=16: does not divide the width 8 of kk in the student'),
    (Relations(teacher='t', heads=0), 'heads=0: must be positive'),
    (Relations(teacher='t', relations=()), 'relations=: name some of qq, kk, vv, qk'),
    (Relations(teacher='t', relations=('qq', 'qq')), 'relations=qq,qq: name some of qq, kk, vv, qk, each once'),
    (Relations(teacher='t', relations=('qv',)), "relations='qv': allowed: qq, kk, vv, qk"),
  ],
)
def test_what_cannot_be_meant(spec, message):
  with pytest.raises(ConfigError, match=message):
    check(dataclasses.replace(BASE, transforms=(spec,)))


@pytest.mark.parametrize(
  'spec, message',
  [
    (Features(teacher='t', layers=('1:5',)), r'transforms.features.layers: layer 5 of the teacher t: allowed: 0\.\.4'),
    (Relations(teacher='t', teacher_layer=5), r'relations.teacher_layer: layer 5 of the teacher t: allowed: 0\.\.4'),
  ],
)
def test_what_the_teacher_does_not_have(spec, message):
  check(dataclasses.replace(BASE, transforms=(spec,)))
  with pytest.raises(ConfigError, match=message):
    spec.build(resources())


def test_relation_heads_must_divide_the_teacher_too():
  teacher = decoder.build(dataclasses.replace(SMALL, n_heads=3, n_kv_heads=3))
  with pytest.raises(ConfigError, match='heads=8: does not divide the width 12 of qq in the teacher t'):
    Relations(teacher='t', heads=8).build(resources()._replace(load=lambda arm: (teacher, {})))


def test_one_teacher_is_in_memory_once():
  spec = Features(teacher='t', layers=('1:2',))
  check(dataclasses.replace(BASE, transforms=(spec, Distill('t'), Relations(teacher='t'))))
  with pytest.raises(ConfigError, match='features.precision=own: transforms.distill has the same teacher'):
    check(dataclasses.replace(BASE, transforms=(spec, Distill('t', precision='int8'))))
  check(dataclasses.replace(BASE, transforms=(spec, Distill('u', precision='int8'))))
  assert {k for part in (spec, Distill('t')) for k in part.build(resources())[1]} == {'teacher_t'}


def test_pairs_can_be_swept_and_numbers_are_traced():
  config = check(override(dataclasses.replace(BASE, transforms=tuple(FINE)), {'transforms.features.layers': '1:1,2:4'}))
  assert config.transforms[0].pairs == ((1, 1), (2, 4))
  transform = chain(*(spec.build(resources())[0] for spec in config.transforms))
  assert traced(config) == {**OPTIM.hparams, **transform.hparams, 'optim.learning_rate': 1e-3}


@pytest.mark.parametrize(
  'spec, changes',
  [
    (FINE[0], {'layers': ('1:2', '2:4'), 'distance': 'cosine', 'weight': 0.3, 'precision': 'bfloat16'}),
    (FINE[1], {'layer': 1, 'teacher_layer': 2, 'heads': 2, 'relations': ('qk',), 'weight': 0.3, 'precision': 'int8'}),
  ],
)
def test_every_setting_changes_something(spec, changes):
  def loss(spec):
    transform, frozen = spec.build(resources())
    return transform.hparams[f'{spec.kind}.weight'] * measured_by(transform)(batch_of(), frozen)[0]

  base = loss(spec)
  for name, new in changes.items():
    assert loss(dataclasses.replace(spec, **{name: new})) != base, name


def test_the_books_hold_the_teacher_up_to_its_deepest_layer():
  shallow, deep, one = (
    Features(teacher='t', layers=layers).build(resources())[0].flops for layers in (('1:2',), ('1:4',), ('1:0',))
  )
  pair = 6 * 8 * 12
  assert one == pair
  assert deep - pair == pytest.approx(2 * (shallow - pair))
  measured = matmul_flops(
    jax.make_jaxpr(lambda f: TEACHER.hidden(f, {k: v[:1] for k, v in batch_of().items()}))(FROZEN['teacher'])
  )
  assert deep - pair == pytest.approx(measured / 6, rel=0.15)  # attention's square is charged by half


# --------------------------------------------------------------------------------------------------------- end to end


def test_an_arm_from_its_file_to_its_exported_model(tmp_path):
  """Teacher, then student with both kinds and Distill, stopped nowhere; what is exported is the plain model."""
  base = tiny.config(6)
  model = dataclasses.replace(base.model, d_model=24, n_layers=3)
  assert train.run(dataclasses.replace(base, model=model, transforms=()), tmp_path, 'teacher') == 0
  taught = (
    Features(teacher='teacher', layers=('1:1', '2:3'), rate=3.0),
    Relations(teacher='teacher', heads=2, relations=('qk', 'vv')),
    Distill('teacher'),
    *base.transforms,
  )
  config = check(dataclasses.replace(base, transforms=taught, optim=OptimConfig('muon', 1e-2, warmup=2)))
  assert train.run(config, tmp_path, 'student') == 0
  lines = [json.loads(line) for line in (tmp_path / 'arms' / 'student' / 'metrics.jsonl').read_text().splitlines()]
  assert any('features' in line and 'relations' in line for line in lines)
  exported, params, _ = load_model(tmp_path / 'arms' / 'student' / 'model', make_mesh())
  assert exported == base.model
  assert jax.tree.structure(params) == jax.tree.structure(decoder.shapes(base.model))


def test_a_run_that_goes_on_has_its_projections(tmp_path):
  base = tiny.config(4)
  assert train.run(dataclasses.replace(base, transforms=()), tmp_path, 'teacher') == 0
  config = dataclasses.replace(base, transforms=(Features(teacher='teacher', layers=('2:2',)),))
  job = train.prepare(config, tmp_path, tmp_path / 'arms' / 'student')
  state = job.fresh(config)
  assert list(state.params['features']) == ['2_to_2']
  assert state.params['features']['2_to_2'].sharding.is_fully_replicated
  assert 'features' not in job.final(state)
