"""Blocks of the vocabulary: what is asked of them has the values and gradients of whole logits, at less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax import losses, vocabulary
from slm_jax.distill.divergences import DIVERGENCES, LOWEST, kl
from slm_jax.model.config import ModelConfig
from slm_jax.model.decoder import build, in_blocks

B, T, D, V, K = 2, 3, 5, 23, 4
KEYS = jax.random.split(jax.random.PRNGKey(0), 6)
X, Y = jax.random.normal(KEYS[0], (2, B, T, D))
TABLE, ITS = jax.random.normal(KEYS[1], (2, V, D))
IDS = jnp.argsort(jax.random.uniform(KEYS[2], (B, T, V)), axis=-1)[..., :K]
UNIFORM = jax.random.uniform(KEYS[3], (B, T, 50))
WIDTHS = (1, 7, 40)  # one token; not a divisor; more than all


def read(width, table=TABLE, x=X):
  """Logits, whole for a width of 0."""
  return vocabulary.blocks(lambda rows: x @ rows.T, table, width) if width else x @ table.T


def close(a, b, tolerance=1e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


QUESTIONS = {
  'whole': lambda z: vocabulary.whole(z)[..., :V],
  'log_z': vocabulary.log_z,
  'log_z and most likely': lambda z: vocabulary.log_z_and_most_likely(z)[0],
  'log_z without': lambda z: vocabulary.log_z(z, without=IDS),
  'at': lambda z: vocabulary.at(z, IDS),
  'at log_softmax': lambda z: vocabulary.at(vocabulary.log_softmax(z, LOWEST), IDS),
  'total': lambda z: vocabulary.total(lambda z: {'a': z**2, 'b': jnp.tanh(z)}, vocabulary.first(z, 17)),
  'log_z of the first': lambda z: vocabulary.log_z(vocabulary.first(z, 17)),
  'largest': lambda z: vocabulary.largest(z, K)[0],
}


@pytest.mark.parametrize('width', WIDTHS)
@pytest.mark.parametrize('name', QUESTIONS)
def test_values_and_gradients_are_those_of_whole_logits(name, width):
  def value(width, table, x):
    answers = jax.tree.leaves(QUESTIONS[name](read(width, table, x)))
    weights = [jnp.cos(jnp.arange(a.size)).reshape(a.shape) for a in answers]
    return sum((a * w).sum() for a, w in zip(answers, weights, strict=True)), answers

  ours, theirs = (
    jax.value_and_grad(functools.partial(value, w), argnums=(0, 1), has_aux=True)(TABLE, X) for w in (width, 0)
  )
  close(ours, theirs)


@pytest.mark.parametrize('width', WIDTHS)
def test_ids_and_draws_are_those_of_whole_logits(width):
  """Of equals the first, as argmax and top_k have it; draws by the same numbers are the same draws."""
  ties = jnp.concatenate([TABLE[:9], TABLE[:9], TABLE[:5]])
  for table in (TABLE, ties):
    close(vocabulary.largest(read(width, table), 9), vocabulary.largest(read(0, table), 9))
    close(vocabulary.most_likely(read(width, table)), jnp.argmax(read(0, table), axis=-1), 0)
  close(vocabulary.drawn(read(width), UNIFORM), vocabulary.drawn(read(0), UNIFORM), 0)
  one = vocabulary.first(read(width), 6)
  most = vocabulary.drawn(one, jnp.full((B, T, 1), 1 - 1e-7))
  assert (most < 6).all()  # nothing is drawn of what is absent


@pytest.mark.parametrize('scale', [1.0, 300.0])
def test_log_z_beside_the_most_likely_is_logsumexp(scale):
  """Exponentials of 300 overflow: the peak is taken off first, and has no gradient of its own."""
  logits = scale * read(0)
  (ours, best), pull = jax.vjp(vocabulary.log_z_and_most_likely, logits)
  close(ours, jax.nn.logsumexp(logits, -1))
  close(best, jnp.argmax(logits, -1), 0)
  (gradient,) = pull((jnp.ones_like(ours), np.zeros(best.shape, jax.dtypes.float0)))
  close(gradient, jax.nn.softmax(logits))


ENDS = [(name, mix) for name in ('normalized_jsd', 'skew_kl', 'skew_reverse_kl') for mix in (0.0, 1.0)]


@pytest.mark.parametrize('width', [4, 40])
@pytest.mark.parametrize('name, mix', [*((name, 0.3) for name in DIVERGENCES), *ENDS])
def test_divergences_of_blocks(name, mix, width):
  """Also between blocks and an array, and with padding beyond the tokenizer's tokens."""

  def value(table, x, p, q):
    student, teacher = read(q, table, x), read(p, ITS, Y)
    return DIVERGENCES[name](vocabulary.first(teacher, 19), vocabulary.first(student, 19), mix).sum()

  grad = jax.value_and_grad(value, argnums=(0, 1))
  theirs = grad(TABLE, X, 0, 0)
  for p, q in ((width, width), (0, width)):
    close(grad(TABLE, X, p, q), theirs)


@pytest.mark.parametrize(
  'changes', [{}, {'tied': False}, {'softcap': 2.0}, {'mup_base_width': 8}], ids=['tied', 'untied', 'softcap', 'mup']
)
def test_a_model_in_blocks_is_the_model(changes):
  config = ModelConfig(
    vocab_size=50, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=16, max_len=8, **changes
  )
  model = build(config)
  params, x = model.init(KEYS[4]), jax.random.normal(KEYS[5], (B, T, 16))

  def loss(params, x, width):
    terms = losses.cross_entropy(1e-3)(in_blocks(model, width).head(params, x), BATCH, None)
    return losses.objective(terms), terms

  ours, theirs = (jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x, w) for w in (7, 0))
  close(ours, theirs)
  assert in_blocks(model, 50) is model


BATCH = {'targets': IDS[..., 0], 'mask': (jax.random.uniform(KEYS[5], (B, T)) < 0.7).astype(jnp.float32)}


def test_memory_is_an_eighth_of_dense_with_all_tokens_at_once():
  """A student's cross-entropy and KL to a teacher, N = 8192, V = 32768, 1,024 tokens of the vocabulary at a time."""
  n, d, v = 8192, 64, 32768

  def objective(table, x, its, y, targets, width):
    student, teacher = read(width, table, x), read(width, its, y)
    nats = vocabulary.log_z(student) - vocabulary.at(student, targets[:, None])[:, 0]
    return (nats + kl(vocabulary.constant(teacher), student)).mean()

  def temporary(width):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((v, d), (n, d), (v, d), (n, d))]
    grad = jax.jit(jax.grad(functools.partial(objective, width=width), argnums=(0, 1)))
    return grad.lower(*shapes, jax.ShapeDtypeStruct((n,), jnp.int32)).compile().memory_analysis().temp_size_in_bytes

  assert temporary(1024) <= temporary(0) / 8
