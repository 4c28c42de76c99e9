"""Diagonals of the Fisher information of a layer's matrices, by three estimators with names, and the mean gradient.

    h = average(sampled, model, params, batches, key)      # [L,I,O] by name, for criteria.obd

L is the mean cross-entropy in nats a token that counts (mask). A diagonal's unit is nats / weight^2: h w^2 / 2 is nats
a token. All are float32 and differentiate with respect to the matrices only. They measure different things:

    estimator       what it is                                                        of a sequence of T tokens, about
    per_sequence    E_seq[g_seq^2], g_seq the gradient of a sequence's mean loss      h / T: good for ranking only
    sampled         (1/N) sum_seq E_y[G_seq^2], G_seq of its summed loss, y ~ p(.|x)  h: Gauss-Newton of softmax CE
    per_token       (1/N) sum_t (x_t d_t)^2, d the cotangent at the matrix's output   h, less terms between positions

With equal lengths T, `sampled` is T E[g_seq^2] over sampled labels. Which of the three a paper means is often not said;
Adam's second moment is like the first. Full logits never exist: losses are summed in chunks of tokens.
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from slm_jax import losses
from slm_jax.config import require
from slm_jax.model.api import Batch, Feature, Model, Params
from slm_jax.prune.matrices import SITES, Matrices, matrices, put

ROWS = 8  # sequences whose gradients exist at once


class Sums(NamedTuple):
  """Over sequences or tokens, and how many those were; the two of disjoint batches add up."""

  sum: Matrices  # float32
  count: jax.Array  # type: ignore[assignment]  # hides tuple.count


Estimator = Callable[[Model, Params, Batch, jax.Array], Sums]  # the key is that of draws; jittable


def average(
  estimator: Estimator, model: Model, params: Params, batches: Iterable[Batch], key: jax.Array | None = None
) -> Matrices:
  """sum / count over all batches, [L,I,O] by name. ConfigError if there are none, or if nothing counts in them."""
  one = jax.jit(functools.partial(estimator, model))
  key = jax.random.PRNGKey(0) if key is None else key
  total = None
  for i, batch in enumerate(batches):
    known = {name: batch[name] for name in ('inputs', 'targets', 'segments', 'mask')}
    new = one(params, known, jax.random.fold_in(key, i))
    total = new if total is None else jax.tree.map(jnp.add, total, new)
  require(total is not None and bool(total.count > 0), 'fisher: no tokens to average over')
  assert total is not None
  return {name: x / total.count for name, x in total.sum.items()}


def gradient(model: Model, params: Params, batch: Batch, key: jax.Array) -> Sums:
  """dL/dW, summed over tokens that count: for criteria.predicted and first_order. Needs no draws."""
  del key
  g = jax.grad(lambda w: _nats(model, put(params, w), batch))(_f32(matrices(params)))
  return Sums(g, batch['mask'].sum())


def per_sequence(model: Model, params: Params, batch: Batch, key: jax.Array) -> Sums:
  """sum over sequences of g_seq^2, and their number; g_seq: gradient of the mean loss of one, with the data's labels.

  The empirical Fisher of sequences (as WoodFisher takes it, arXiv 2004.14340). Sequences without a token that counts
  are none. Needs no draws.
  """
  del key

  def mean_loss(params, one):
    return _nats(model, params, one) / jnp.maximum(one['mask'].sum(), 1)

  return Sums(_squares(mean_loss, params, batch), (batch['mask'] > 0).any(1).sum(dtype=jnp.float32))


def sampled(model: Model, params: Params, batch: Batch, key: jax.Array) -> Sums:
  """sum over sequences of G_seq^2, and the number of tokens; G_seq: gradient of the summed loss of labels y ~ p(.|x).

  Each position's label is drawn on its own, so terms between positions vanish in expectation: what is left is
  sum_t E_y[(d -log p(y|x_t) / dw)^2], the diagonal of the true Fisher, which is that of the Gauss-Newton matrix of
  softmax and cross-entropy (arXiv 1412.1193). One draw a position; the data's labels are not read.
  """
  b, t = batch['inputs'].shape
  keys = jax.random.split(key, b * t).reshape(b, t, -1)

  def drawn_loss(params, one):
    return _nats(model, params, one, _draw)

  counts = (batch['mask'] > 0).astype(jnp.float32)
  return Sums(_squares(drawn_loss, params, {**batch, 'mask': counts, 'keys': keys}), counts.sum())


def per_token(model: Model, params: Params, batch: Batch, key: jax.Array) -> Sums:
  """(X*X)^T (D*D), and the number of tokens; D: cotangent of the summed loss at the matrix's output, data's labels.

  One forward and one backward pass of the whole batch, and a product for each matrix. d_t holds what position t does
  to later positions' losses, but two positions' contributions to one weight are squared apart. So it is the squared
  gradients of tokens' own losses exactly where positions no longer mix: in the last layer from `o` on. Memory holds
  the inputs and outputs of all matrices, [L,B,T,I+O]. Needs no draws.
  """
  del key
  layers, shape = range(model.config.n_layers), batch['inputs'].shape
  w = matrices(params)
  taps = {
    f'{name}_tap': jnp.zeros(
      (len(layers), *shape, *params['layers'][name].shape[1 + SITES[name].n_in :]), model.config.dtype
    )
    for name in w
  }
  into = dict.fromkeys(SITES[name].into for name in w)

  def loss(taps):
    # The decoder adds a tap to the output of its matrix.
    hidden_BTD, made = model.features(
      {**params, 'taps': taps}, batch, [Feature(k, i + 1) for k in into for i in layers]
    )
    return _head_nats(model, params, hidden_BTD, batch, losses.cross_entropy()), made

  d, made = jax.grad(loss, has_aux=True)(taps)

  def of(name, w_LIO):
    x_LBTI = jnp.stack([made[Feature(SITES[name].into, i + 1)].reshape(*shape, -1) for i in layers])
    d_LBTO = d[f'{name}_tap'].reshape(*x_LBTI.shape[:3], w_LIO.shape[2])
    return jnp.einsum('lbti,lbto->lio', x_LBTI.astype(jnp.float32) ** 2, d_LBTO.astype(jnp.float32) ** 2)

  return Sums({name: of(name, w_LIO) for name, w_LIO in w.items()}, batch['mask'].sum())


def _squares(loss: Callable[[Params, Batch], jax.Array], params: Params, batch: Batch) -> Matrices:
  """sum over sequences of (d loss / dW)^2, `loss` being that of a batch of one sequence; some ROWS at once."""
  w = _f32(matrices(params))
  b = len(batch['inputs'])
  rows = max(n for n in range(1, ROWS + 1) if b % n == 0)

  def of_row(one):
    return jax.grad(lambda w: loss(put(params, w), {name: x[None] for name, x in one.items()}))(w)

  def body(total, some):
    return jax.tree.map(lambda s, g: s + (g**2).sum(0), total, jax.vmap(of_row)(some)), None

  parts = {name: x.reshape(b // rows, rows, *x.shape[1:]) for name, x in batch.items()}
  return jax.lax.scan(body, jax.tree.map(jnp.zeros_like, w), parts)[0]


def _nats(model: Model, params: Params, batch: Batch, token_loss=losses.cross_entropy()) -> jax.Array:
  return _head_nats(model, params, model.hidden(params, batch), batch, token_loss)


def _head_nats(model: Model, params: Params, hidden_BTD: jax.Array, batch: Batch, token_loss) -> jax.Array:
  """Summed over the tokens that count."""
  return losses.over_chunks(token_loss, model.head, params, hidden_BTD, dict(batch), None)['loss'].sum


def _draw(logits: jax.Array, tokens: Batch, context: None) -> losses.Terms:
  """Cross-entropy with labels that are drawn from the logits, by each token's own key."""
  drawn = jax.vmap(jax.vmap(jax.random.categorical))(tokens['keys'], jax.lax.stop_gradient(logits))
  return losses.cross_entropy()(logits, {**tokens, 'targets': drawn}, context)


def _f32(w: Matrices) -> Matrices:
  return {name: w_LIO.astype(jnp.float32) for name, w_LIO in w.items()}
