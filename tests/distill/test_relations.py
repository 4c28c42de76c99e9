"""Laws of relations between tokens: by hand, in blocks, under rotations, and as attention has them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from within import (
  BOTH,
  FROZEN,
  MODEL,
  SMALL,
  TEACHER,
  batch_of,
  close,
  fresh,
  measured_by,
  relations,
)

from slm_jax.distill import features
from slm_jax.distill.features import relation_kl
from slm_jax.model.api import Feature
from slm_jax.model.attention import attention, document_starts


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
