"""One-shot pruning: weights of a trained model set to zero at once, before the first step. Runs on the host.

    criterion -> select -> compensate, by statistics or gradients of calibration text; or SparseGPT, which does it all

Recovery is another arm, which starts from this one and keeps its zeros (`Prune(0.0, ticket=...)`).
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from slm_jax.conditions import Needs
from slm_jax.config import require, setting
from slm_jax.model.api import Model, Params
from slm_jax.model.config import ModelConfig
from slm_jax.prune import criteria, fisher
from slm_jax.prune.allocate import Allocation
from slm_jax.prune.matrices import Matrices, matrices, put, sizes
from slm_jax.prune.oneshot import compensated, require_bias, sequential
from slm_jax.prune.patterns import Pattern, check_budget, check_shapes, check_sparsity, select
from slm_jax.prune.stats import collect_all, collector


@dataclasses.dataclass(frozen=True)
class OneShot:
  """Which weights of the layers' matrices are zero at the start."""

  criterion: Literal['none', 'random', 'magnitude', 'first_order', 'obd', 'wanda', 'ria', 'sparsegpt'] = 'none'
  sparsity: float = setting(0.5, '[0, 1)')
  pattern: str = 'layer'  # what is compared: see `Prune`; Wanda and RIA are meant for 'output'
  allocation: Allocation = 'uniform'  # of the sparsity over the matrices of the layers
  # What makes up for them, layer by layer (oneshot.compensated): what stays is fitted anew, or biases are shifted.
  compensate: Literal['none', 'least_squares', 'mean_shift'] = 'none'
  # Of which model Wanda and RIA read activations. dense: of the dense one for all layers, by one pass over the text.
  # layerwise, as their authors do: for each layer of the model whose earlier layers are pruned already, L passes.
  activations: Literal['dense', 'layerwise'] = 'dense'

  needs: ClassVar[Needs] = dict.fromkeys(
    ('sparsity', 'pattern', 'allocation'), (lambda its: its.criterion != 'none', 'a criterion')
  )

  def check(self, key: str) -> None:
    if self.activations == 'layerwise':
      what = f'{key}.activations=layerwise'
      why = 'takes them so in any case' if self.criterion == 'sparsegpt' else 'reads none'
      known = self.criterion in ('wanda', 'ria')
      require(known, f'{what}: is for wanda and ria; criterion={self.criterion} {why}; allowed: dense')
      known = self.allocation in ('uniform', 'erk')
      require(known, f'{what}: allocation={self.allocation} compares the scores of all layers; allowed: uniform, erk')
      known = self.compensate == 'none'
      require(known, f'{what}: compensate={self.compensate} changes what later layers are given; allowed: none')
    require(
      self.compensate == 'none' or self.criterion not in ('none', 'sparsegpt'),
      f'{key}.compensate={self.compensate}: with criterion={self.criterion} there is '
      f'{"nothing to make up for" if self.criterion == "none" else "an update already"}; allowed: none',
    )
    rule = Pattern.parse(self.pattern, f'{key}.pattern')
    check_sparsity(rule, self.sparsity, self.allocation, key)
    if self.criterion == 'sparsegpt':
      what = f'{key}.pattern={self.pattern}, allocation={self.allocation}: sparsegpt chooses in blocks of inputs'
      known = rule.kind in ('layer', 'n:m') and self.allocation == 'uniform'
      require(known, f'{what}; allowed: layer or n:m, uniform')

  def check_model(self, config: ModelConfig, key: str) -> None:
    """ConfigError for what this model's matrices cannot have."""
    if self.criterion != 'none':
      rule, shapes = Pattern.parse(self.pattern, f'{key}.pattern'), sizes(config)
      check_shapes(rule, shapes, f'{key}.pattern')
      check_budget(rule, shapes, 1 - self.sparsity, self.allocation, f'{key}.sparsity', f'{self.sparsity:g}')
    if self.compensate == 'mean_shift':
      require_bias(config.bias, f'{key}.compensate')


def sparse(spec: OneShot, model: Model, params: Params, batches: Iterable[Any], seed: int) -> Params:
  """The parameters with zeros in them; batches are the calibration text, and the seed counts for draws."""
  if spec.criterion == 'none':
    return params
  text = list(batches)
  if spec.criterion == 'sparsegpt':
    rule = Pattern.parse(spec.pattern, 'pattern')
    return sequential(model, params, text, (rule.n, rule.m) if rule.kind == 'n:m' else spec.sparsity)[0]
  if spec.activations == 'layerwise':
    return layer_by_layer(spec, model, params, text)
  w = matrices(params)
  masks = _select(scores(spec.criterion, model, params, text, seed), 1 - spec.sparsity, spec.pattern, spec.allocation)
  if spec.compensate != 'none':
    return compensated(model, params, masks, text, spec.compensate)
  return put(params, {name: w[name] * masks[name] for name in w})


def layer_by_layer(spec: OneShot, model: Model, params: Params, text: list[Any]) -> Params:
  """Prunes one layer after another, each by what it is given once the layers before it are pruned.

  All matrices of a layer are judged by its dense activations, as in the code of Wanda (arXiv 2306.11695) and RIA.
  """
  collect, score = collector(model), criteria.wanda if spec.criterion == 'wanda' else criteria.ria
  params = jax.tree.map(jnp.asarray, params)  # those of a cut are numpy's
  for layer in range(model.config.n_layers):
    found = score(matrices(params), collect(params, text))
    masks = _select(found, 1 - spec.sparsity, spec.pattern, spec.allocation)  # of which one layer's are taken
    new = {name: w.at[layer].multiply(masks[name][layer]) for name, w in matrices(params).items()}
    params = put(params, new)
  return params


# Outside of jit each of its loops would be a program of its own, and compiled anew for every arm.
_select = jax.jit(select, static_argnums=(1, 2, 3))


def scores(criterion: str, model: Model, params: Params, text: list[Any], seed: int) -> Matrices:
  """[L,I,O] by name; what is largest stays. obd: by the Fisher information of labels that the model draws."""
  w, key = matrices(params), jax.random.PRNGKey(seed)
  if criterion == 'random':
    return criteria.random(w, key)
  if criterion == 'magnitude':
    return criteria.magnitude(w)
  if criterion == 'first_order':
    return criteria.first_order(w, fisher.average(fisher.gradient, model, params, text))
  if criterion == 'obd':
    return criteria.obd(w, fisher.average(fisher.sampled, model, params, text, key))
  stats = collect_all(model, params, text)
  return criteria.wanda(w, stats) if criterion == 'wanda' else criteria.ria(w, stats)
