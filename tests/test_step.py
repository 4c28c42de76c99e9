"""Laws of the transform algebra, of the step, and of the first transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import toy_batch, toy_model

from slm_jax import vocabulary
from slm_jax.distill.divergences import kl
from slm_jax.distill.logits import distill
from slm_jax.ema import ema
from slm_jax.losses import Term
from slm_jax.optim import OptimConfig, optimizer
from slm_jax.prune.schedules import sparsity_at
from slm_jax.prune.transform import Rules, apply, prune
from slm_jax.step import Transform, chain, init_state, make_step

MODEL, TEACHER = toy_model(), toy_model(width=16)
OPTIM = optimizer(OptimConfig(learning_rate=1e-2, warmup=0), 100)
FROZEN = {'teacher': TEACHER.init(jax.random.PRNGKey(7))}


def start(transform=chain(), seed=0):
  return init_state(jax.random.PRNGKey(seed), MODEL.init(jax.random.PRNGKey(seed + 1)), OPTIM, transform)


def run(transform, n=5, frozen=FROZEN, state=None, **options):
  step = jax.jit(make_step(MODEL, OPTIM, transform, **options))
  state = start(transform) if state is None else state
  for i in range(n):
    state, metrics = step(state, toy_batch(i), frozen)
  return state, metrics


def close(a, b, tolerance=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def lowered(transform):
  state = start(transform)
  text = jax.jit(make_step(MODEL, OPTIM, transform)).lower(state, toy_batch(), FROZEN).as_text()
  return text


# ------------------------------------------------------------------------------------------------------ the algebra


def test_the_empty_chain_and_the_identity_compile_to_a_plain_step():
  """The step written out by hand, and the step by make_step with nothing, are one program."""

  def by_hand(state, batch, frozen):
    def objective(params):
      logits = MODEL.head(params, MODEL.hidden(params, batch))
      mask = batch['mask']
      log_z, _ = vocabulary.log_z_and_most_likely(logits)
      nats = log_z - vocabulary.at(logits, batch['targets'][..., None])[..., 0]
      return (nats * mask).sum() / jnp.maximum(mask.sum(), 1)

    loss, grads = jax.value_and_grad(objective)(state.params)
    updates, opt_state = OPTIM.make(state.hparams).update(grads, state.opt_state, state.params)
    return state._replace(
      step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state
    ), loss

  state = start()
  plain = jax.jit(by_hand).lower(state, toy_batch(), {}).compile()
  # Without the metrics that by_hand does not compute, the optimised programs have the same operations.
  step = make_step(MODEL, OPTIM)

  def same_outputs(state, batch, frozen):
    state, metrics = step(state, batch, frozen)
    return state, metrics['loss']

  ours = jax.jit(same_outputs).lower(state, toy_batch(), {}).compile()
  assert plain.cost_analysis()['flops'] == ours.cost_analysis()['flops']
  equal(plain(state, toy_batch(), {})[0].params, ours(state, toy_batch(), {})[0].params)


def test_identity_transforms_leave_the_program_alone():
  assert lowered(chain()) == lowered(chain(chain(), chain(chain())))
  assert lowered(chain()) == lowered(chain(Transform('noop')))


def test_chain_is_associative():
  a, b, c = ema(0.9), distill(TEACHER, 0.5, 2.0), prune(0.5, 1, 4, 1)
  left, right, flat = chain(chain(a, b), c), chain(a, chain(b, c)), chain(a, b, c)
  assert [p.name for p in left.parts] == [p.name for p in right.parts] == ['ema', 'distill', 'prune']
  assert lowered(left) == lowered(right) == lowered(flat)
  equal(run(left)[0], run(right)[0])


def test_names_must_differ():
  with pytest.raises(ValueError, match='names must differ'):
    chain(ema(0.9), ema(0.99))


def test_a_transform_does_not_change_the_randomness_of_another():
  noisy = Transform('noisy', init=lambda key, params: jax.random.normal(key))
  alone, among = start(chain(noisy)).slots['noisy'], start(chain(ema(0.9), noisy)).slots['noisy']
  assert alone == among


def test_hooks_run_in_order_and_see_what_they_should():
  seen = []

  def spy(name):
    return Transform(
      name,
      {f'{name}.x': 3.0},
      init=lambda key, params: jnp.float32(0),
      data=lambda slot, params, batch, context: seen.append(('data', name)) or {**batch, name: batch['mask']},
      view=lambda slot, params, context: seen.append(('view', name)) or params,
      loss=lambda slot, fn: lambda *args: {**fn(*args), name: Term(args[3].hparams[f'{name}.x'], jnp.float32(1), 0.0)},
      after=lambda slot, state, update: (slot + update.terms['loss'].count, state),
    )

  state, metrics = run(chain(spy('a'), spy('b')), n=2)
  views, data = [('view', 'a'), ('view', 'b')], [('data', 'a'), ('data', 'b')]
  assert seen[:6] == [*views, *data, *views]  # data hooks are given what the forward pass sees
  assert metrics['a'] == metrics['b'] == 3.0
  assert state.slots['a'] == toy_batch(0)['mask'].sum() + toy_batch(1)['mask'].sum()


def test_data_hooks_are_given_the_parameters_that_the_forward_pass_sees():
  def data(slot, params, batch, context):
    return {**batch, 'mask': batch['mask'] * (params['head'] == 0).all()}

  zeroed = Transform('zeroed', view=lambda slot, params, context: {**params, 'head': 0 * params['head']})
  _, viewed = run(chain(Transform('reads', data=data), zeroed), n=1)
  _, plain = run(Transform('reads', data=data), n=1)
  assert viewed['loss'] > 0
  assert plain['loss'] == plain['grad_norm'] == 0  # no token was left
  assert plain['tokens'] == viewed['tokens'] > 0  # of the batch as it came


def test_frozen_is_not_in_the_state_and_slots_are():
  state = start(chain(ema(0.9), distill(TEACHER, 0.5, 1.0)))
  teacher_shapes = {x.shape for x in jax.tree.leaves(FROZEN)} - {
    x.shape for x in jax.tree.leaves(MODEL.init(state.key))
  }
  assert teacher_shapes
  assert not teacher_shapes & {x.shape for x in jax.tree.leaves(state)}
  assert set(state.slots) == {'ema', 'distill'}


# ------------------------------------------------------------------------------------------- traced numbers, vmap


def test_changing_a_traced_number_does_not_recompile():
  transform = chain(distill(TEACHER, 0.5, 1.0), prune(0.5, 1, 4, 1, Rules(allocation='global')), ema(0.9))
  step = jax.jit(make_step(MODEL, OPTIM, transform))
  state = start(transform)
  for scale in (1.0, 0.5):
    other = state._replace(hparams={k: v * scale for k, v in state.hparams.items()})
    for i in range(3):
      other, _ = step(other, toy_batch(i), FROZEN)
  assert step._cache_size() == 1


def test_a_vmapped_population_equals_its_arms_run_alone():
  """Learning rate, KD weight and sparsity differ; the step counter is not mapped, the teacher and the batch shared."""
  transform = chain(distill(TEACHER, 0.5, 1.0), prune(0.5, 2, 8, 2))
  step = make_step(MODEL, OPTIM, transform)
  changes = [
    {'optim.learning_rate': 0.01 * (i + 1), 'distill.weight': 0.2 * i, 'prune.sparsity': 0.1 + 0.2 * i}
    for i in range(4)
  ]
  arms = []
  for i, change in enumerate(changes):
    state = start(transform, seed=i)
    arms.append(state._replace(hparams=state.hparams | {k: jnp.float32(v) for k, v in change.items()}))
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *arms)._replace(step=jnp.int32(0))
  axes = jax.tree.map(lambda _: 0, stacked)._replace(step=None)
  together = jax.jit(jax.vmap(step, in_axes=(axes, None, None), out_axes=(axes, 0)))
  assert together.lower(stacked, toy_batch(), FROZEN).as_text().count('stablehlo.case') == 1  # refresh is a branch
  for i in range(20):
    stacked, _ = together(stacked, toy_batch(i), FROZEN)
  for i, arm in enumerate(arms):
    alone, _ = run(transform, 20, state=arm)
    close(jax.tree.map(lambda x, i=i: x[i], stacked.params), alone.params, 1e-5)
    equal(jax.tree.map(lambda x, i=i: x[i], stacked.slots['prune']), alone.slots['prune'])


# ---------------------------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize('parts', [2, 4, 8])
def test_accumulation_does_not_depend_on_the_split(parts):
  """Ragged masks: the parts hold different numbers of tokens."""
  transform = chain(distill(TEACHER, 0.3, 2.0))
  whole, split = run(transform, 5, z_loss=1e-3), run(transform, 5, z_loss=1e-3, accumulate=parts)
  close(whole[0].params, split[0].params, 1e-5)
  close(whole[1], split[1], 1e-5)


def test_accumulation_costs_no_second_forward_pass():
  """The pass that counts tokens first is dead code but for the masks."""

  def flops(parts):
    lowered = jax.jit(make_step(MODEL, OPTIM, accumulate=parts)).lower(start(), toy_batch(b=64, t=32), {})
    return lowered.compile().as_text()

  dots = lambda text: text.count(' dot(')  # noqa: E731
  assert dots(flops(4)) <= dots(flops(1)) + 1


def test_padding_and_order_of_the_batch_change_nothing():
  step = jax.jit(make_step(MODEL, OPTIM))
  batch = toy_batch()
  reference, metrics = step(start(), batch, {})
  padded = {k: jnp.pad(v, ((0, 3), (0, 2))) for k, v in batch.items()}
  close(step(start(), padded, {})[0].params, reference.params, 1e-5)
  shuffled = {k: v[::-1] for k, v in batch.items()}
  close(step(start(), shuffled, {})[0].params, reference.params, 1e-5)


# --------------------------------------------------------------------------------------------- the first transforms


@pytest.mark.parametrize('decay', [0.5, 0.9])
def test_ema_follows_its_recurrence(decay):
  """The ramp is below both decays at first, and passes one of them after 8 steps."""
  transform = chain(ema(decay))
  state, step = start(transform), jax.jit(make_step(MODEL, OPTIM, transform))
  average = jax.tree.map(np.asarray, state.params)
  for t in range(30):
    state, _ = step(state, toy_batch(t), {})
    d = min(decay, (1 + t) / (10 + t))
    average = jax.tree.map(lambda a, p, d=d: d * a + (1 - d) * np.asarray(p), average, state.params)
  close(state.slots['ema'], average, 1e-5)
  assert optax.tree.norm(optax.tree.sub(average, state.params)) > 1e-3, 'it lags behind'
  equal(transform.final(state.slots, state.params), state.slots['ema'])


def test_the_average_of_a_masked_model_is_masked_in_either_order():
  average, mask = ema(0.9), prune(0.5, 1, 4, 1)
  finals = []
  for transform in (chain(average, mask), chain(mask, average)):
    state, _ = run(transform, 6)
    finals.append(transform.final(state.slots, state.params)['layers'])
    equal(finals[-1], apply(state.slots['prune'].masks, state.slots['ema'])['layers'])
    assert float((finals[-1]['up'] == 0).mean()) == 0.5
  close(*finals, 1e-6)


def test_distillation_with_weight_zero_is_plain_training():
  close(run(chain(distill(TEACHER, 0.0, 3.0)))[0].params, run(chain())[0].params, 1e-6)


def test_distillation_from_oneself_has_no_gradient():
  state = start(chain(distill(MODEL, 1.0, 2.0)))
  _, metrics = jax.jit(make_step(MODEL, OPTIM, distill(MODEL, 1.0, 2.0)))(state, toy_batch(), {'teacher': state.params})
  assert metrics['distill'] == pytest.approx(0, abs=1e-6)
  assert metrics['grad_norm'] == pytest.approx(0, abs=1e-6)


def test_another_teacher_gives_another_loss():
  other = {'teacher': TEACHER.init(jax.random.PRNGKey(8))}
  transform = chain(distill(TEACHER, 0.5, 1.0))
  assert run(transform)[1]['distill'] != run(transform, frozen=other)[1]['distill']


def test_the_teacher_gets_no_gradient():
  step = make_step(MODEL, OPTIM, distill(TEACHER, 0.5, 1.0))
  state = start(chain(distill(TEACHER, 0.5, 1.0)))
  grads = jax.grad(lambda frozen: step(state, toy_batch(), frozen)[1]['total'])(FROZEN)
  assert all((g == 0).all() for g in jax.tree.leaves(grads))


def gradient_by_logits(z, p, temperature):
  """What a student whose parameters are its logits z [V] is given by `distill` towards p."""
  rows = {'inputs': jnp.zeros((1, 1), jnp.int32), 'targets': jnp.zeros((1, 1), jnp.int32), 'mask': jnp.ones((1, 1))}

  def features(params, batch, wanted):
    return params['z'][None, None], {}

  model = MODEL._replace(
    hidden=lambda params, batch: params['z'][None, None], head=lambda params, x: x, features=features
  )
  keep = Transform('kept', init=lambda key, params: params, after=lambda slot, state, update: (update.grads, state))
  transform = chain(distill(model, 1.0, temperature), keep)
  state = init_state(jax.random.PRNGKey(0), {'z': z}, OPTIM, transform)
  state, metrics = jax.jit(make_step(model, OPTIM, transform))(state, rows, {'teacher': {'z': p}})
  return state.slots['kept']['z'], metrics['distill']


def test_kl_gradient_is_t_times_the_difference_of_softmaxes():
  """d/dz T^2 KL(p_T || q_T) = T (q_T - p_T)."""
  z, p = jax.random.normal(jax.random.PRNGKey(0), (2, 9))
  t = 3.0
  grad, value = gradient_by_logits(z, p, t)
  close(grad, t * (jax.nn.softmax(z / t) - jax.nn.softmax(p / t)), 1e-6)
  close(value, t**2 * kl(p / t, z / t), 1e-6)
  assert kl(p, p) == pytest.approx(0, abs=1e-6)


def test_t_squared_keeps_the_gradient_at_high_temperature():
  z, p = jax.random.normal(jax.random.PRNGKey(0), (2, 50))
  high, low = (jnp.linalg.norm(gradient_by_logits(z, p, t)[0]) for t in (8.0, 4.0))
  assert high / low == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize('allocation', ['global', 'uniform'])
def test_pruning_hits_the_target_exactly_and_weights_stay_zero(allocation):
  transform = chain(prune(0.7, 5, 30, 5, Rules(allocation=allocation)))
  state, metrics = run(transform, 60)
  masks, params = state.slots['prune'].masks, state.params
  assert all(m.all() for name in ('embed', 'head') for m in jax.tree.leaves(masks[name]))
  up = params['layers']['up']
  pruned = np.asarray(up == 0)
  assert pruned.sum() == round(0.7 * up.size)
  if allocation == 'uniform':
    assert [layer.sum() for layer in pruned] == [round(0.7 * up[0].size)] * 2
  np.testing.assert_array_equal(pruned, ~np.asarray(masks['layers']['up']))
  assert metrics['density'] == pytest.approx(1 - pruned.mean())


def test_masks_are_nested_and_follow_the_cubic():
  transform = chain(prune(0.8, 4, 24, 4, Rules(allocation='global')))
  step = jax.jit(make_step(MODEL, OPTIM, transform))
  state, before = start(transform), None
  for i in range(30):
    state, _ = step(state, toy_batch(i), {})
    mask = np.asarray(state.slots['prune'].masks['layers']['up'])
    assert before is None or (mask <= before).all()
    if (i + 1 - 4) % 4 == 0 and 4 <= i + 1 <= 24:
      target = float(sparsity_at('cubic', jnp.int32(i + 1), 4, 24, jnp.float32(0.8)))
      assert mask.sum() == round((1 - target) * mask.size)
    before = mask


def test_sparsity_zero_is_plain_training():
  close(run(chain(prune(0.0, 1, 4, 1)), 10)[0].params, run(chain(), 10)[0].params, 1e-6)


def test_two_transforms_chained_work_together():
  transform = chain(distill(TEACHER, 0.5, 2.0), prune(0.5, 2, 10, 2), ema(0.9))
  state, metrics = run(transform, 40)
  assert (state.params['layers']['up'] == 0).sum() == state.params['layers']['up'].size // 2
  assert {'loss', 'distill', 'distill_kl', 'density', 'total'} <= set(metrics)
  fixed = jax.jit(make_step(MODEL, OPTIM, transform))
  first = None
  state = start(transform)
  for _ in range(60):
    state, metrics = fixed(state, toy_batch(0), FROZEN)
    first = metrics['total'] if first is None else first
  assert metrics['total'] < first


@pytest.mark.as_written
def test_golden_step():
  """The statistics of one step, written down once; any change of the maths shows here."""
  _, metrics = run(chain(distill(TEACHER, 0.5, 2.0)), 1)
  golden = {
    'accuracy': 0.08,
    'distill': 2.1428564,
    'distill_kl': 1.9628232,
    'distill_entropy': 1.5305367,
    'grad_norm': 1.4587071,
    'learning_rate': 0.01,
    'loss': 3.0149658,
    'tokens': 25.0,
    'total': 2.5789111,
  }
  assert {k: float(v) for k, v in metrics.items()} == pytest.approx(golden, rel=1e-5)
