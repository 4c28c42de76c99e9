"""Chunked losses: equal to dense ones in value and gradient, at a fraction of the memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax import losses
from slm_jax.losses import Auxiliary, Term


def dense_loss(z_loss):
  def loss(hidden, head, batch):
    logits = hidden @ head
    log_p = jax.nn.log_softmax(logits)
    nats = -jnp.take_along_axis(log_p, batch['targets'][..., None], -1)[..., 0]
    log_z = jax.nn.logsumexp(logits, -1)
    return ((nats + z_loss * log_z**2) * batch['mask']).sum() / batch['mask'].sum()

  return loss


def chunked_loss(z_loss, chunk):
  def loss(hidden, head, batch):
    token_loss = losses.cross_entropy(z_loss)
    terms = losses.over_chunks(token_loss, lambda w, x: x @ w, head, hidden, batch, None, chunk)
    return losses.objective(terms)

  return loss


def problem(b, t, d, v, seed=0):
  keys = jax.random.split(jax.random.PRNGKey(seed), 4)
  batch = {
    'targets': jax.random.randint(keys[0], (b, t), 0, v),
    'mask': (jax.random.uniform(keys[1], (b, t)) < 0.7).astype(jnp.float32),
  }
  return jax.random.normal(keys[2], (b, t, d)), jax.random.normal(keys[3], (d, v)) / d**0.5, batch


@pytest.mark.parametrize('chunk', [1, 7, 16, 30, 10_000])
@pytest.mark.parametrize('z_loss', [0.0, 1e-2])
def test_chunked_equals_dense_in_value_and_gradient(chunk, z_loss):
  """Also where the chunk does not divide the tokens, or is smaller than the batch."""
  hidden, head, batch = problem(3, 13, 8, 50)
  dense = jax.value_and_grad(dense_loss(z_loss), (0, 1))(hidden, head, batch)
  ours = jax.value_and_grad(chunked_loss(z_loss, chunk), (0, 1))(hidden, head, batch)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), dense, ours)


def test_memory_is_an_eighth_of_dense():
  """The compiled programs' temporary memory at N=8192, V=32768, D=512."""

  def temporary(loss):
    shapes = jax.eval_shape(lambda: problem(8, 1024, 512, 32768))
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  dense, ours = temporary(dense_loss(0.0)), temporary(chunked_loss(0.0, 512))
  assert ours <= dense / 8, (dense, ours)


def test_terms_add_up_over_any_partition():
  hidden, head, batch = problem(4, 6, 8, 20)

  def terms(rows):
    part = {k: v[rows] for k, v in batch.items()}
    return losses.over_chunks(losses.cross_entropy(), lambda w, x: x @ w, head, hidden[rows], part, None)

  whole, parts = terms(slice(0, 4)), losses.add(terms(slice(0, 1)), terms(slice(1, 4)))
  for name in whole:
    np.testing.assert_allclose(whole[name].sum, parts[name].sum, rtol=1e-6)
    assert whole[name].count == parts[name].count


def test_gradients_of_many_parts_are_added_up_in_float32():
  """In bfloat16, which has 8 bits, 256 parts would lose a part of what each adds."""
  x = jax.random.uniform(jax.random.PRNGKey(0), (256, 1), minval=0.5, maxval=1.5)
  w = jnp.ones((1, 4), jnp.bfloat16)

  def terms_of(w, part):
    return {'loss': Term((part['x'] @ w.astype(jnp.float32)).sum(), jnp.float32(part['x'].size))}

  _, whole = losses.gradient(terms_of, w, {'x': x})
  _, parts = losses.gradient(terms_of, w, {'x': x}, parts=256)
  np.testing.assert_allclose(parts, np.full((1, 4), x.mean()), rtol=2e-3)
  np.testing.assert_allclose(whole.astype(jnp.float32), parts, rtol=5e-3)


def test_an_empty_batch_has_a_finite_loss_and_no_gradient():
  hidden, head, batch = problem(2, 4, 8, 20)
  batch['mask'] = jnp.zeros_like(batch['mask'])
  value, grads = jax.value_and_grad(chunked_loss(0.0, 100), (0, 1))(hidden, head, batch)
  assert value == 0
  assert all((g == 0).all() for g in grads)


def test_objective_weighs_means():
  terms = {'a': Term(jnp.float32(6), jnp.float32(3), 0.5), 'b': Term(jnp.float32(5), jnp.float32(1), 0.0)}
  assert losses.objective(terms) == 1.0
  assert losses.means(terms) == {'a': 2.0, 'b': 5.0}


def test_padded_vocabulary_of_minus_infinity_changes_nothing():
  hidden, head, batch = problem(3, 5, 8, 20)

  def padded(w, x):
    logits = x @ w
    return jnp.concatenate([logits, jnp.full((*logits.shape[:-1], 64), -jnp.inf)], -1)

  def loss(head_fn):
    def f(hidden, head):
      return losses.objective(losses.over_chunks(losses.cross_entropy(), head_fn, head, hidden, batch, None, 6))

    return jax.value_and_grad(f, (0, 1))(hidden, head)

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), loss(lambda w, x: x @ w), loss(padded))


def test_logits_and_their_gradient_are_read_and_written_as_few_times_as_can_be():
  """Two reductions (the largest, the sum of exponentials), and a gradient that nothing is scattered into."""
  _, _, batch = problem(2, 5, 8, 30)

  def loss(logits):
    return losses.objective(losses.cross_entropy()(logits, batch, None))

  program = str(jax.make_jaxpr(jax.value_and_grad(loss))(jnp.ones((2, 5, 30))))
  assert 'scatter' not in program
  assert program.count('argmax[') == 1
  assert sum('reduce_' in line and 'axes=(2,)' in line for line in program.splitlines()) == 1


def test_what_is_not_of_the_data_stays_so_wherever_terms_go():
  """Through scan, vmap, checkpoint and sums; and only the weights of the data's terms are multiplied."""
  one = {'loss': Term(jnp.float32(3), jnp.float32(2)), 'teacher': Auxiliary(jnp.float32(1), jnp.float32(2), 0.5)}
  zero = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x)), one)
  both = jax.tree.map(lambda x: jnp.stack([jnp.float32(x)] * 2), one)
  ways = [
    jax.jit(lambda: jax.lax.scan(lambda terms, part: (losses.add(terms, part), None), zero, both)[0])(),
    jax.tree.map(lambda x: x.sum(0), jax.vmap(jax.checkpoint(lambda terms: terms))(both)),
    losses.add(one, one),
  ]
  for terms in [one, *ways]:
    assert {name: type(term) for name, term in terms.items()} == {'loss': Term, 'teacher': Auxiliary}
  weighed = losses.weigh_data(one, 0.25)
  assert (weighed['loss'].weight, weighed['teacher'].weight) == (0.25, 0.5)
