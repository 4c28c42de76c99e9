"""Laws of distillation from within: hidden states through projections, relations between tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from within import (
  BOTH,
  FROZEN,
  MODEL,
  OPTIM,
  PAIRS,
  SMALL,
  TEACHER,
  batch_of,
  close,
  extra_of,
  fresh,
  hidden_states,
  measured_by,
  own,
  run,
  start,
)

from slm_jax.config import ConfigError, check, override, traced
from slm_jax.distill import features
from slm_jax.distill.features import Features, Relations
from slm_jax.distill.logits import Distill
from slm_jax.ema import ema
from slm_jax.experiment import Config
from slm_jax.model import decoder
from slm_jax.model.api import Feature
from slm_jax.model.attention import attention, document_starts
from slm_jax.perf import matmul_flops
from slm_jax.prune.transform import Rules, prune
from slm_jax.step import Resources, chain, make_step

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
  transform = chain(hidden_states(), prune(0.5, 1, 2, 1, Rules(allocation='global')), ema(0.5))
  state, _ = run(transform, 3)
  assert all(w.shape == (8, 12) and (w != 0).all() for w in state.params['features'].values())
  final = transform.final(state.slots, state.params)
  assert jax.tree.structure(final) == jax.tree.structure(fresh())


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
    (Relations(teacher='t', layer=-1), 'relations.layer=-1: must not be negative'),
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
    sum(Features(teacher='t', layers=layers).build(resources())[0].flops.values())
    for layers in (('1:2',), ('1:4',), ('1:0',))
  )
  pair = 6 * 8 * 12
  assert one == pair
  assert deep - pair == pytest.approx(2 * (shallow - pair))
  measured = matmul_flops(
    jax.make_jaxpr(lambda f: TEACHER.hidden(f, {k: v[:1] for k, v in batch_of().items()}))(FROZEN['teacher'])
  )
  assert deep - pair == pytest.approx(measured / 6, rel=0.15)  # attention's square is charged by half
