"""One-shot pruning: weights of a trained model set to zero at once, before the first step. Runs on the host.

    criterion -> select -> compensate, by statistics or gradients of calibration text; or SparseGPT, which does it all

Recovery is another arm, which starts from this one and keeps its zeros (`Prune(0.0, ticket=...)`).
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import jax

from slm_jax.config import require, setting
from slm_jax.model.api import Model, Params
from slm_jax.model.config import ModelConfig
from slm_jax.prune import criteria, fisher
from slm_jax.prune.allocate import Allocation
from slm_jax.prune.matrices import Matrices, matrices, put, sizes
from slm_jax.prune.oneshot import compensated, require_bias, sequential
from slm_jax.prune.patterns import Pattern, check_budget, check_shapes, check_sparsity, select
from slm_jax.prune.stats import collect_all


@dataclasses.dataclass(frozen=True)
class OneShot:
  """Which weights of the layers' matrices are zero at the start."""

  criterion: Literal['none', 'random', 'magnitude', 'first_order', 'obd', 'wanda', 'ria', 'sparsegpt'] = 'none'
  sparsity: float = setting(0.5, '[0, 1)')
  pattern: str = 'layer'  # what is compared: see `Prune`; Wanda and RIA are meant for 'output'
  allocation: Allocation = 'uniform'  # of the sparsity over the matrices of the layers
  # What makes up for them, layer by layer (oneshot.compensated): what stays is fitted anew, or biases are shifted.
  compensate: Literal['none', 'least_squares', 'mean_shift'] = 'none'

  def check(self, key: str) -> None:
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
  w = matrices(params)
  masks = _select(scores(spec.criterion, model, params, text, seed), 1 - spec.sparsity, spec.pattern, spec.allocation)
  if spec.compensate != 'none':
    return compensated(model, params, masks, text, spec.compensate)
  return put(params, {name: w[name] * masks[name] for name in w})


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
