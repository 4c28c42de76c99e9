"""Magnitude pruning while training: exact masks, global or per layer, on a cubic schedule with a traced target."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from slm_jax.config import require, setting
from slm_jax.losses import Term
from slm_jax.prune.select import keep_largest
from slm_jax.step import Resources, Transform, TransformConfig


@dataclasses.dataclass(frozen=True)
class Prune(TransformConfig):
  """Set the smallest weights of the layers' matrices to zero, more and more of them, and go on training."""

  kind: ClassVar[str] = 'prune'
  sparsity: float = setting(0.5, traced=True)  # share of the layers' weights that is zero in the end
  scope: Literal['global', 'layer'] = 'layer'  # 'layer': every matrix of every layer loses the same share
  start: float = 0.25  # share of the steps before the first pruning
  end: float = 0.75  # share of the steps after which the masks stay
  every: int = 20  # steps between refreshes

  def check(self, key: str) -> None:
    require(0 <= self.sparsity < 1, f'{key}.sparsity={self.sparsity}: must lie in [0, 1)')
    require(0 <= self.start <= self.end <= 1, f'{key}.start={self.start}, end={self.end}: need 0 <= start <= end <= 1')
    require(self.every > 0, f'{key}.every={self.every}: must be positive')

  def build(self, resources: Resources) -> tuple[Transform, dict[str, Any]]:
    first, last = int(self.start * resources.steps), int(self.end * resources.steps)
    return prune(self.sparsity, self.scope, first, last, self.every), {}


def cubic(step: jax.Array, first: int, last: int, target: jax.Array) -> jax.Array:
  """s(t) = target * (1 - (1 - (t - first)/(last - first))^3), clipped at both ends (Zhu & Gupta, arXiv 1710.01878)."""
  p = jnp.clip((step - first) / max(last - first, 1), 0, 1)
  return jnp.where(step < first, 0.0, target * (1 - (1 - p) ** 3))


def prune(sparsity: float, scope: str, first: int, last: int, every: int) -> Transform:
  """Masks in the slot; masked in the forward pass (`view`), projected after the optimiser, so moments revive nothing.

  Masks are a full tree of booleans, all True where nothing is pruned: embeddings, norms, biases. They are chosen anew
  every `every` steps from `first` to `last`, from the surviving weights only, so they are nested. Logs 'density', the
  share of prunable weights that is left.
  """

  def init(key, params):
    return jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)

  def view(masks, params, context):
    return apply(masks, params)

  def loss(masks, fn):
    def with_density(params, hidden_BTD, batch, context):
      kept = [m for m, p in zip(jax.tree.leaves(masks), jax.tree.leaves(prunable(masks)), strict=True) if p]
      left = sum(m.sum(dtype=jnp.float32) for m in kept)
      return {
        **fn(params, hidden_BTD, batch, context),
        'density': Term(left, jnp.float32(sum(m.size for m in kept)), 0.0),
      }

    return with_density

  def after(masks, state, update):
    step = state.step  # steps taken so far
    due = (step >= first) & (step <= last) & (((step - first) % every == 0) | (step == last))
    target = cubic(step, first, last, state.hparams['prune.sparsity'])
    masks = jax.lax.cond(due, lambda: magnitude_masks(state.params, masks, target, scope), lambda: masks)
    return masks, state._replace(params=apply(masks, state.params))

  return Transform('prune', {'prune.sparsity': sparsity}, init, view=view, loss=loss, after=after, final=apply)


def prunable(params: Any) -> Any:
  """True for the matrices inside the layers."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[0].key == 'layers' and path[-1].key in ('q', 'k', 'v', 'o', 'gate', 'up', 'down'), params
  )


def apply(masks: Any, params: Any) -> Any:
  """params where the mask is True, else 0 (also where a pruned weight has become infinite or NaN)."""
  return jax.tree.map(lambda m, p: jnp.where(m, p, 0), masks, params)


def magnitude_masks(params: Any, masks: Any, sparsity: jax.Array, scope: str) -> Any:
  """Masks that keep the largest |w|: of each layer of each matrix, or of all of them together. Exact to one weight."""
  is_prunable = prunable(params)
  # A weight that is pruned already scores below every one that is not.
  scores = jax.tree.map(lambda p, m: jnp.where(m, jnp.abs(p.astype(jnp.float32)), -1.0), params, masks)
  leaves, treedef = jax.tree.flatten(scores)
  flags = jax.tree.leaves(is_prunable)
  chosen = [s for s, f in zip(leaves, flags, strict=True) if f]
  if scope == 'global':
    kept = keep_largest(chosen, 1 - sparsity)
  else:
    kept = [jax.vmap(lambda s: keep_largest([s], 1 - sparsity)[0])(s) for s in chosen]
  kept_leaves = iter(kept)
  old = jax.tree.leaves(masks)
  return jax.tree.unflatten(treedef, [next(kept_leaves) if f else m for f, m in zip(flags, old, strict=True)])
