"""Losses as float32 (sum, count) pairs, summed over chunks of tokens so that full logits never exist.

Shapes: B batch, T time, D width, V vocabulary, C tokens of a chunk (see slm_jax/model/config.py).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slm_jax import vocabulary
from slm_jax.vocabulary import Logits

CHUNK = 2048  # tokens whose logits exist at once
BINS = 15  # of a calibration error


class Term(NamedTuple):
  """A sum over tokens (or whatever is counted), how many there were, and the term's weight in the objective.

  Sums and counts add up over chunks, micro-batches and devices; they are divided once, at the end. A term of weight 0
  is a metric. A count must not depend on the parameters.
  """

  sum: jax.Array
  count: jax.Array  # type: ignore[assignment]  # hides tuple.count, which nobody asks a term for
  weight: jax.Array | float = 1.0


class Auxiliary(Term):
  """A term that is not of the data: a teacher's, or a penalty. Transforms that take a share from the data leave it.

  A class of its own and no field, since the fields of a term are arrays, through scan, vmap and checkpoint.
  """


Terms = dict[str, Term]


def objective(terms: Terms, counts: dict[str, jax.Array] | None = None) -> jax.Array:
  """sum_k weight_k * sum_k / count_k; `counts` override the terms' own (a whole batch's, for a part of it)."""
  total = jnp.float32(0)
  for name, term in terms.items():
    count = term.count if counts is None else counts[name]
    total += term.weight * term.sum / jnp.maximum(count, 1)
  return total


def means(terms: Terms) -> dict[str, jax.Array]:
  """sum / count of every term."""
  return {name: term.sum / jnp.maximum(term.count, 1) for name, term in terms.items()}


def add(a: Terms, b: Terms) -> Terms:
  """The terms of two disjoint sets of tokens together."""
  return {name: t._replace(sum=a[name].sum + t.sum, count=a[name].count + t.count) for name, t in b.items()}


def weigh_data(terms: Terms, factor: jax.Array | float) -> Terms:
  """Multiplies the weights of the data's terms by `factor`: of all that are not `Auxiliary`."""

  def weighed(term: Term) -> Term:
    return term if isinstance(term, Auxiliary) else term._replace(weight=term.weight * factor)

  return {name: weighed(term) for name, term in terms.items()}


def cross_entropy(z_loss: float = 0.0) -> Callable[..., Terms]:
  """Token loss: 'loss' = -log softmax(z)[target] in nats, 'accuracy' (weight 0), and, if asked for, z_loss * log(Z)^2.

  z-loss: PaLM, arXiv 2204.02311, section 5.
  """

  def token_loss(logits, tokens, context) -> Terms:
    del context
    targets, mask = tokens['targets'], tokens['mask']
    log_z, best = vocabulary.log_z_and_most_likely(logits)
    nats = log_z - vocabulary.at(logits, targets[..., None])[..., 0]
    hits = best == targets
    count = mask.sum()
    terms = {
      'loss': Term((nats * mask).sum(), count, 1.0),
      'accuracy': Term((hits * mask).sum(), count, 0.0),
    }
    if z_loss:
      terms['z_loss'] = Auxiliary((log_z**2 * mask).sum(), count, z_loss)
    return terms

  return token_loss


def calibration(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> Term:
  """Of the most likely token, in each of BINS equal bins of its confidence: the sum of (is it right? - confidence).

  A term in bins, [BINS]; its mean (evaluate.mean) is the expected calibration error.
  """
  confidence = jnp.exp(logits.max(-1) - jax.nn.logsumexp(logits, axis=-1))
  right = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
  bins = jax.nn.one_hot((confidence * BINS).astype(jnp.int32).clip(0, BINS - 1), BINS) * mask[..., None]
  over_tokens = tuple(range(mask.ndim))
  return Term((bins * (right - confidence)[..., None]).sum(over_tokens), bins.sum(over_tokens), 0.0)


def over_chunks(
  token_loss: Callable[..., Terms],
  head: Callable[[Any, jax.Array], Logits],
  params: Any,
  hidden_BTD: jax.Array,
  batch: dict[str, jax.Array],
  context: Any,
  chunk: int = CHUNK,
) -> Terms:
  """Sums `token_loss(head(params, x), tokens, context)` over chunks of about `chunk` tokens.

  A chunk takes every sequence and a stretch of time, so a batch sharded over devices stays so. Each chunk's logits are
  recomputed in the backward pass (`jax.checkpoint`): peak memory falls from B*T*V to chunk*V floats, for a third more
  FLOPs in the head. A batch that fits one chunk skips both the loop and the recomputation. Entries of `batch` whose
  leading axes are (B, T) are cut along with the hidden states; the others are not passed on.
  """
  b, t, _ = hidden_BTD.shape
  tokens = {k: v for k, v in batch.items() if v.ndim >= 2 and v.shape[:2] == (b, t)}
  if b * t <= chunk:
    return token_loss(head(params, hidden_BTD), tokens, context)

  @jax.checkpoint
  def body(params, x, tokens):
    return token_loss(head(params, x), tokens, context)

  pieces = cut((hidden_BTD, tokens), chunk)  # padded tokens have mask 0
  first = jax.eval_shape(body, params, *jax.tree.map(lambda x: x[0], pieces))
  zero = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), first)
  total, _ = jax.lax.scan(lambda terms, piece: (add(terms, body(params, *piece)), None), zero, pieces)
  return total


def cut(tree: Any, chunk: int) -> Any:
  """Arrays [B,T,...] as pieces [n,B,T/n,...] of about `chunk` tokens, padded with zeros."""

  def of(x):
    b, t = x.shape[:2]
    width = max(1, min(t, chunk // b))
    n = -(-t // width)
    x = jnp.pad(x, [(0, 0), (0, n * width - t)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(b, n, width, *x.shape[2:]), 1, 0)

  return jax.tree.map(of, tree)


def uncut(tree: Any, t: int) -> Any:
  """What `cut` cut, without its padding."""

  def of(x):
    n, b, width = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(b, n * width, *x.shape[3:])[:, :t]

  return jax.tree.map(of, tree)


def gradient(
  terms_of: Callable[[Any, Any], Terms],
  params: Any,
  batch: Any,
  parts: int = 1,
  groups: int = 1,
  axis: str | tuple[str, ...] | None = None,
) -> tuple[Terms, Any]:
  """Terms and gradient of the objective over `batch`, computed in `parts` slices of it along the leading axis.

  The gradient is that of the whole batch's objective: each slice's sums are divided by the counts of all slices, which
  are computed first (the compiler drops all of that first pass but the masks). Slices' gradients add up in float32.

  groups: of rows that stand together; each has a gradient of its own until the end, where they are added up. So if
  groups are spread over the devices of a mesh axis, whose name is `axis`, these talk once, however many parts there are
  and wherever in the model a parameter is used.
  """
  if parts == groups == 1:
    (_, terms), grads = jax.value_and_grad(lambda p: _with_terms(terms_of(p, batch)), has_aux=True)(params)
    return terms, grads
  slices = jax.tree.map(lambda x: _slices(x, parts, groups), batch)

  def counted(part):
    return {name: term.count for name, term in terms_of(params, part).items()}

  def counts_of(part):
    """Of [groups, ...]. A single group needs no vmap, for which not every kernel has a rule."""
    if groups == 1:
      return counted(jax.tree.map(lambda x: x[0], part))
    return jax.tree.map(lambda x: x.sum(0), jax.vmap(counted, spmd_axis_name=axis)(part))

  counts = jax.tree.map(lambda x: x.sum(0), jax.lax.map(counts_of, slices))

  def of(part):
    (_, terms), grads = jax.value_and_grad(lambda p: _with_terms(terms_of(p, part), counts), has_aux=True)(params)
    return terms, grads

  def of_all(part):
    """Of [groups, ...], with one gradient for each."""
    if groups == 1:
      return of(jax.tree.map(lambda x: x[0], part))
    terms, grads = jax.vmap(of, spmd_axis_name=axis)(part)
    added = {name: t._replace(sum=t.sum.sum(0), count=t.count.sum(0), weight=t.weight[0]) for name, t in terms.items()}
    return added, grads

  first = jax.tree.map(lambda x: x[0], slices)
  if parts == 1:
    terms, grads = of_all(first)
  else:

    def body(carry, part):
      terms, grads = of_all(part)
      return (add(carry[0], terms), jax.tree.map(lambda so_far, g: so_far + g, carry[1], grads)), None

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), jax.eval_shape(of_all, first))
    (terms, grads), _ = jax.lax.scan(body, zeros, slices)
  return terms, grads if groups == 1 else jax.tree.map(lambda g: g.sum(0), grads)


def _slices(x: jax.Array, parts: int, groups: int) -> jax.Array:
  """[B, ...] as [parts, groups, rows, ...]: a group stands together, and of each one slice i has rows i, i + parts, ..

  So on a batch that is sharded along its rows, every device keeps its own.
  """
  rows = x.reshape(groups, x.shape[0] // (groups * parts), parts, *x.shape[1:])
  return jnp.moveaxis(rows, 2, 0)


def _with_terms(terms: Terms, counts: dict[str, jax.Array] | None = None) -> tuple[jax.Array, Terms]:
  return objective(terms, counts), terms
