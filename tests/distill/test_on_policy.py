"""On-policy distillation: unbiased, masked right, reproducible, and without a gradient through the sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax import losses
from slm_jax.config import ConfigError, check
from slm_jax.data.config import DataConfig
from slm_jax.distill import rollouts, signals, teachers
from slm_jax.distill.cached import CachedDistill
from slm_jax.distill.divergences import DIVERGENCES, log_softmax, reverse_kl
from slm_jax.distill.features import Features, Relations
from slm_jax.distill.logits import Distill, taught_by
from slm_jax.distill.on_policy import OnPolicy, on_policy
from slm_jax.experiment import Config, InitConfig
from slm_jax.model import decoder
from slm_jax.model.config import ModelConfig
from slm_jax.optim import OptimConfig, optimizer
from slm_jax.step import Context, chain, init_state, make_step

V, T, NEW, EOS, PAD = 8, 10, 6, 2, 0
TINY = ModelConfig(
  vocab_size=V, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=16, max_len=16, init_std=0.5, unroll=1
)
MODEL = decoder.build(TINY)
STUDENT, TEACHER = (MODEL.init(jax.random.PRNGKey(i)) for i in (0, 1))
FROZEN = {'teacher': TEACHER}


def batch_of(b=4, start=3, seed=0):
  """Documents of random tokens, 3 of them the prompt, ended after 4 to 7 more."""
  rng = np.random.default_rng(seed)
  tokens, end = rng.integers(3, V, (b, T + 1)), rng.integers(start + 4, T + 1, b)
  at = np.arange(T + 1)[None]
  tokens = np.where(at < end[:, None] - 1, tokens, np.where(at == end[:, None] - 1, EOS, PAD))
  rows = rollouts.Rows(jnp.asarray(tokens, jnp.int32), jnp.full(b, start, jnp.int32), jnp.asarray(end, jnp.int32))
  return rollouts.entries(rows)


def chained(divergence='reverse_kl', fraction=1.0, weight=1.0, **settings):
  """OnPolicy before Distill."""
  numbers = {
    'on_policy.fraction': fraction,
    **{f'on_policy.{k}': settings.pop(k) for k in ('replay', 'temperature') if k in settings},
  }
  write = on_policy(TINY, numbers, max_new=NEW, t=T, vocab=V, eos=EOS, pad=PAD, **settings)
  return chain(write, taught(divergence, weight))


def taught(divergence='reverse_kl', weight=1.0):
  drawn = divergence == 'policy_gradient'
  loss = signals.policy_gradient() if drawn else signals.dense_loss(DIVERGENCES[divergence])
  source = teachers.dense(teachers.online(MODEL, vocab=V))
  return taught_by(source, loss, {'distill.weight': weight, 'distill.temperature': 1.0}, drawn=drawn)


def context_of(transform, step=0, key=0):
  hparams = {k: jnp.float32(v) for k, v in transform.hparams.items()}
  return Context(jnp.int32(step), jax.random.PRNGKey(key), hparams, FROZEN)


def rewritten(transform, batch, key=0, slots=None):
  slots = transform.init(jax.random.PRNGKey(0), STUDENT) if slots is None else slots
  return transform.data(slots, STUDENT, batch, context_of(transform, key=key))


def stepped(transform, batch, steps=1, accumulate=1):
  optim = optimizer(OptimConfig(learning_rate=1e-2, warmup=0), 10)
  state = init_state(jax.random.PRNGKey(3), STUDENT, optim, transform)
  step = jax.jit(make_step(MODEL, optim, transform, accumulate=accumulate))
  for _ in range(steps):
    state, metrics = step(state, batch, FROZEN)
  return state, metrics


def close(a, b, tolerance=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance), a, b)


# ------------------------------------------------------------------------------------------------------------- unbiased


def written(n, max_new, key=5):
  """n rollouts of one prompt of two tokens, room for max_new."""
  tokens = jnp.tile(jnp.array([[1, 5] + [PAD] * (max_new + 1)], jnp.int32), (n, 1))
  prompts = rollouts.Rows(tokens, jnp.full(n, 2, jnp.int32), jnp.full(n, 3, jnp.int32))
  settings = {'max_new': max_new, 'temperature': 1.0, 'vocab': V, 'eos': EOS, 'pad': PAD}
  return rollouts.written(TINY, STUDENT, prompts, jax.random.PRNGKey(key), **settings)


def log_probs(params, batch):
  """[B, T, V]"""
  return log_softmax(MODEL.head(params, MODEL.hidden(params, batch)))


def test_the_mean_over_rollouts_is_the_exact_reverse_kl_of_completions():
  """KL(q || p) over all completions of at most two tokens, by enumeration; the estimate sums log q/p over each."""
  pairs = jnp.array([[1, 5, a, b] for a in range(V) for b in range(V)], jnp.int32)
  full = rollouts.entries(rollouts.Rows(pairs, jnp.full(V * V, 2), jnp.full(V * V, 4)))
  q, p = (
    np.asarray(jnp.take_along_axis(log_probs(params, full), full['targets'][..., None], -1)[..., 0])
    for params in (STUDENT, TEACHER)
  )
  ends = np.asarray(pairs[:, 2] == EOS)  # after <eos> there is nothing
  first = ends & (np.asarray(pairs[:, 3]) == 0)
  weight = np.where(ends, first * np.exp(q[:, 1]), np.exp(q[:, 1] + q[:, 2]))
  assert weight.sum() == pytest.approx(1, abs=1e-5)
  ratio = (q - p)[:, 1] + np.where(ends, 0, (q - p)[:, 2])
  exact = (weight * ratio).sum()

  rows = written(20_000, 2)
  batch = rollouts.entries(rows)
  z_q, z_p = (log_probs(params, batch) for params in (STUDENT, TEACHER))
  one = jnp.float32(1)
  each = signals.policy_gradient()(signals.Dense(z_p), z_q, batch, one, one) * batch['mask']
  sums = np.asarray(each.sum(1), np.float64)
  assert exact > 0.05
  assert abs(sums.mean() - exact) < 4 * sums.std() / np.sqrt(len(sums))
  by_position = np.asarray((reverse_kl(z_p, z_q) * batch['mask']).sum(1), np.float64)  # the single-step term, summed
  assert abs(by_position.mean() - exact) < 4 * by_position.std() / np.sqrt(len(sums))


def test_rollouts_are_draws_from_what_the_forward_pass_gives():
  """The cached sampler and the full forward pass: of a student that is nearly certain, the same tokens."""
  sharp = {**STUDENT, 'final_norm': jax.tree.map(lambda w: 60 * w, STUDENT['final_norm'])}
  batch = batch_of(16)
  rows = rollouts.written(
    TINY,
    sharp,
    rollouts.of_mask(batch, batch['mask']),
    jax.random.PRNGKey(0),
    max_new=NEW,
    temperature=0.0,
    eos=EOS,
    pad=PAD,
  )
  new = rollouts.entries(rows)
  best = np.asarray(log_probs(sharp, new).argmax(-1))
  mask = np.asarray(new['mask']) > 0
  assert mask.sum() > 16
  assert (best == np.asarray(new['targets']))[mask].mean() > 0.98  # but for ties


# ---------------------------------------------------------------------------------------------------------------- masks


def test_the_completion_counts_through_its_end_and_nothing_else():
  rows = rollouts.Rows(jnp.array([[1, 5, 6, 7, EOS, PAD]]), jnp.array([3]), jnp.array([5]))
  batch = rollouts.entries(rows)
  assert batch['mask'].tolist() == [[0, 0, 1, 1, 0]]  # predicts 7 and <eos>
  assert batch['targets'][0, 2:4].tolist() == [7, EOS]
  assert batch['segments'].tolist() == [[1, 1, 1, 1, 1]]
  close(rollouts.of_mask(batch, batch['mask']), rows, 0)


def test_rollouts_keep_the_prompt_and_end_at_the_first_end():
  batch = batch_of(64)
  new = rewritten(chained(), batch)
  inputs, targets, mask = (np.asarray(new[k]) for k in ('inputs', 'targets', 'rollout'))
  assert (inputs[:, :3] == np.asarray(batch['inputs'])[:, :3]).all()
  assert (mask[:, :2] == 0).all()
  assert (mask[:, 2] == 1).all()
  lengths = mask.sum(1).astype(int)
  assert len(set(lengths)) > 1
  for row, n in zip(targets, lengths, strict=True):
    completion = row[2 : 2 + n]
    assert EOS not in completion[:-1]
    assert completion[-1] == EOS or n == NEW
    assert (row[2 + n :] == PAD).all()
  np.testing.assert_array_equal(np.asarray(new['segments']).sum(1), np.minimum(3 + lengths, T))
  assert (new['mask'] == 0).all()
  np.testing.assert_array_equal(new['taught'], new['rollout'])


def test_a_prompt_without_room_stays_with_its_document():
  batch = batch_of(4, start=5)
  new = rewritten(chained(), batch)
  assert (new['rollout'] == 0).all()
  np.testing.assert_array_equal(new['inputs'], batch['inputs'])


def test_padding_of_the_vocabulary_is_never_written():
  write = on_policy(TINY, {}, max_new=NEW, t=T, vocab=5, eos=EOS, pad=PAD)
  new = write.data((), STUDENT, batch_of(64), context_of(write))
  assert np.asarray(new['targets'])[np.asarray(new['rollout']) > 0].max() < 5


# ------------------------------------------------------------------------------------------------------------- fraction


@pytest.mark.parametrize('divergence', ['kl', 'reverse_kl', 'jsd'])
def test_at_fraction_zero_it_is_plain_distillation(divergence):
  plain, _ = stepped(taught(divergence, 0.5), batch_of(), 3)
  ours, metrics = stepped(chained(divergence, 0.0, 0.5), batch_of(), 3)
  close(ours.params, plain.params)
  assert metrics['on_policy_share'] == 0


def test_at_fraction_one_nothing_is_learnt_from_the_documents_labels():
  """With no weight on the teacher there is no gradient at all, and other completions change nothing."""
  state, metrics = stepped(chained(weight=0.0), batch_of())
  assert metrics['on_policy_share'] == 1
  assert metrics['grad_norm'] == 0
  assert metrics['tokens'] == batch_of()['mask'].sum()  # of the data that the step used up
  other = batch_of(seed=1)
  at = jnp.arange(T)[None]
  other['inputs'] = jnp.where(at < 3, batch_of()['inputs'], other['inputs'])
  (a, _), (b, _) = stepped(chained(), batch_of()), stepped(chained(), other)
  close(a.params, b.params, 0)


def test_in_between_each_row_is_one_or_the_other():
  batch = batch_of(200)
  new = rewritten(chained(fraction=0.3), batch)
  row = np.asarray(new['rollout']).any(1)
  assert row.mean() == pytest.approx(0.3, abs=0.1)
  np.testing.assert_array_equal(np.asarray(new['mask'])[~row], np.asarray(batch['mask'])[~row])
  np.testing.assert_array_equal(np.asarray(new['inputs'])[~row], np.asarray(batch['inputs'])[~row])
  assert (np.asarray(new['mask'])[row] == 0).all()
  np.testing.assert_array_equal(new['taught'], new['mask'] + new['rollout'])
  transform = chained(fraction=0.3)
  slots = transform.init(jax.random.PRNGKey(0), STUDENT)
  counted = transform.loss(slots, lambda *given: {})(STUDENT, None, new, context_of(transform))
  assert counted['on_policy_share'][:2] == (row.sum(), 200)
  assert counted['on_policy_length'][:2] == (np.asarray(new['rollout']).sum(), row.sum())


def test_the_term_is_that_of_the_rollouts_taken_as_constants():
  """So no gradient flows through the sampling."""
  transform = chained()
  batch = {k: jax.lax.stop_gradient(v) for k, v in rewritten(transform, batch_of()).items()}
  context = context_of(transform)

  def by_hand(params):
    z_q, z_p = (MODEL.head(p, MODEL.hidden(p, batch)) for p in (params, TEACHER))
    return (reverse_kl(z_p, z_q) * batch['rollout']).sum() / batch['rollout'].sum()

  token_loss = transform.token_loss(transform.init(context.key, STUDENT), losses.cross_entropy())

  def ours(params):
    return losses.objective(token_loss(MODEL.head(params, MODEL.hidden(params, batch)), batch, context))

  close(jax.grad(ours)(STUDENT), jax.grad(by_hand)(STUDENT))


def test_the_temperature_is_that_of_the_draws():
  greedy, drawn = (
    [rewritten(chained(temperature=temperature), batch_of(8), key=key) for key in (0, 1)] for temperature in (0.0, 1.0)
  )
  np.testing.assert_array_equal(greedy[0]['targets'], greedy[1]['targets'])
  assert (drawn[0]['targets'] != drawn[1]['targets']).any()
  best = jnp.argmax(log_probs(STUDENT, greedy[0]), axis=-1)
  written_by_it = greedy[0]['rollout'] > 0
  np.testing.assert_array_equal(best[written_by_it], greedy[0]['targets'][written_by_it])


# ------------------------------------------------------------------------------------------------------- one program


def test_traced_numbers_do_not_compile_again():
  transform = chained(buffer=4)
  optim = optimizer(OptimConfig(), 10)
  state = init_state(jax.random.PRNGKey(3), STUDENT, optim, transform)
  step = jax.jit(make_step(MODEL, optim, transform))
  for fraction in (0.0, 0.4, 1.0):
    numbers = {'on_policy.fraction': jnp.float32(fraction), 'on_policy.temperature': jnp.float32(fraction)}
    step(state._replace(hparams={**state.hparams, **numbers}), batch_of(), FROZEN)
  assert step._cache_size() == 1


@pytest.mark.parametrize('buffer', [0, 6])
def test_arms_side_by_side_equal_arms_alone(buffer):
  transform = chained(buffer=buffer)
  optim = optimizer(OptimConfig(learning_rate=1e-2, warmup=0), 10)
  step = make_step(MODEL, optim, transform)
  states = []
  for seed, fraction in enumerate((0.0, 0.5, 1.0)):
    state = init_state(jax.random.PRNGKey(seed), STUDENT, optim, transform)
    states.append(state._replace(hparams={**state.hparams, 'on_policy.fraction': jnp.float32(fraction)}))
  together = jax.tree.map(lambda *x: jnp.stack(x), *states)._replace(step=states[0].step)
  axes = states[0]._replace(step=None, key=0, params=0, opt_state=0, slots=0, hparams=0)
  mapped = jax.jit(jax.vmap(step, in_axes=(axes, None, None), out_axes=(axes, 0)))
  alone = jax.jit(step)
  for i in range(3):
    batch = batch_of(seed=i)
    together, _ = mapped(together, batch, FROZEN)
    states = [alone(state, batch, FROZEN)[0] for state in states]
  for i, state in enumerate(states):
    close(jax.tree.map(lambda x, i=i: x[i], together.params), state.params, 1e-5)


def test_accumulation_changes_nothing():
  whole, parts = (stepped(chained(fraction=0.5), batch_of(), 2, accumulate=n) for n in (1, 2))
  close(whole[0].params, parts[0].params, 1e-5)


def test_rollouts_are_a_function_of_the_key():
  one, same, other = (rewritten(chained(), batch_of(), key=key)['targets'] for key in (0, 0, 1))
  np.testing.assert_array_equal(one, same)
  assert (one != other).any()


# -------------------------------------------------------------------------------------------------------------- buffer


def rows_of(first, n):
  """n rows that are known by their first token."""
  tokens = jnp.zeros((n, T + 1), jnp.int32).at[:, 0].set(jnp.arange(first, first + n))
  return rollouts.Rows(tokens, jnp.full(n, 2, jnp.int32), jnp.full(n, 5, jnp.int32))


def test_the_newest_are_kept():
  memory = rollouts.none(5, T)
  assert not rollouts.there(memory).any()
  memory = rollouts.newest(memory, rows_of(10, 3))
  assert memory.tokens[:, 0].tolist() == [0, 0, 10, 11, 12]
  gaps = jax.tree.map(lambda x: x.at[1].set(0), rows_of(20, 4))  # a row that is none
  memory = rollouts.newest(memory, gaps)
  assert memory.tokens[:, 0].tolist() == [11, 12, 20, 22, 23]
  assert rollouts.newest(memory, rows_of(30, 9)).tokens[:, 0].tolist() == [34, 35, 36, 37, 38]


def test_draws_from_a_buffer_that_is_not_full_are_of_what_it_has():
  memory = rollouts.newest(rollouts.none(50, T), rows_of(10, 3))
  found = np.asarray(rollouts.drawn(memory, 3000, jax.random.PRNGKey(0)).tokens[:, 0])
  assert np.bincount(found)[10:] == pytest.approx([1000] * 3, rel=0.15)


def test_a_step_that_replays_writes_nothing_new():
  transform = chained(buffer=8, replay=1.0)
  first, metrics = stepped(transform, batch_of())  # nothing there yet
  assert metrics['on_policy_fresh'] == 1
  second, metrics = stepped(transform, batch_of(), 2)
  assert metrics['on_policy_fresh'] == 0
  assert metrics['on_policy_share'] == 1
  close(second.slots['on_policy'], first.slots['on_policy'], 0)
  known = {tuple(row) for row in np.asarray(first.slots['on_policy'].tokens).tolist()}
  new = rewritten(transform, batch_of(seed=7), slots=first.slots)
  tokens = np.concatenate([new['inputs'], new['targets'][:, -1:]], 1)
  assert {tuple(row) for row in tokens.tolist()} <= known


# -------------------------------------------------------------------------------------------------------------- errors

PROMPTED = DataConfig(sources=('addition',), packing='single', prompt_end='=')


def config(first=OnPolicy(), then=Distill('t'), data=PROMPTED, init='sft', swap=False, early=None):  # noqa: B008
  transforms = [t for t in (early, first, then) if t is not None]
  return Config(data=data, init=InitConfig(init), transforms=tuple(transforms[::-1] if swap else transforms))


def test_what_goes_together():
  check(config())
  check(config(OnPolicy(cold_start=True), init=''))
  check(config(then=Distill('t', divergence='policy_gradient')))


@pytest.mark.parametrize(
  'wrong, message',
  [
    ({'data': DataConfig(prompt_end='=')}, 'needs data.packing=single, one document a sequence; got split'),
    ({'data': DataConfig(packing='single')}, "needs data.prompt_end, after which the student writes; got ''"),
    ({'first': OnPolicy(max_new=128)}, 'max_new=128: leaves no room for a prompt in data.seq_len=128'),
    ({'init': ''}, 'what an untrained student writes is noise'),
    ({'then': None}, 'nobody judges what the student writes'),
    ({'swap': True}, 'transforms=distill, on_policy: on_policy must stand before distill'),
    ({'early': Features('t', layers=('1:1',))}, 'on_policy must stand before features'),
    ({'early': Relations('t')}, 'on_policy must stand before relations'),
    ({'then': CachedDistill(teacher='t')}, 'cached_distill holds what a teacher said of documents'),
    ({'first': OnPolicy(fraction=1.5)}, 'fraction=1.5: must lie in [0, 1]'),
    ({'first': OnPolicy(replay=-1)}, 'replay=-1'),
    ({'first': OnPolicy(temperature=-1)}, 'temperature=-1'),
    ({'first': OnPolicy(max_new=0)}, 'max_new=0: must be positive'),
    ({'first': OnPolicy(buffer=-1)}, 'buffer=-1: must not be negative'),
    ({'first': None, 'then': Distill('t', divergence='policy_gradient')}, 'needs the draws of the student'),
    (
      {'first': OnPolicy(buffer=4), 'then': Distill('t', divergence='policy_gradient')},
      'on_policy.buffer=4: policy_gr',
    ),
    (
      {'first': OnPolicy(temperature=0.5), 'then': Distill('t', divergence='policy_gradient')},
      'temperature=0.5: policy',
    ),
  ],
)
def test_what_does_not_is_one_line(wrong, message):
  with pytest.raises(ConfigError) as error:
    check(config(**wrong))
  assert message in str(error.value)
  assert '\n' not in str(error.value)
