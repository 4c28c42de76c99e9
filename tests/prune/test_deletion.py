"""Formulas for what the deletion of one weight costs, against deleting it, in a language model that was trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import spearmanr

from slm_jax import losses
from slm_jax.data.config import DataConfig
from slm_jax.data.dataset import open_data
from slm_jax.model.config import ModelConfig
from slm_jax.model.decoder import build
from slm_jax.optim import OptimConfig, optimizer
from slm_jax.prune import criteria, fisher
from slm_jax.prune.matrices import matrices, put
from slm_jax.step import init_state, make_step

MODEL = build(
  ModelConfig(
    vocab_size=384, d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=64, max_len=64, init_std=0.05
  )
)
STEPS = 200
EACH = 30  # weights of each matrix that are deleted, one at a time


@pytest.fixture(scope='module')
def deletions(tmp_path_factory):
  """By weight: the change of the loss on 32 sequences, -g w and h w^2 / 2 of the same sequences, and |w|."""
  data = DataConfig(documents=200, seq_len=64, batch_size=16)
  dataset = open_data(data, tmp_path_factory.mktemp('data'), lambda line: None)
  optim = optimizer(OptimConfig(learning_rate=1e-2, warmup=20), STEPS)
  key = jax.random.PRNGKey(0)
  state = init_state(key, MODEL.init(key), optim)
  step = jax.jit(make_step(MODEL, optim), donate_argnums=0)
  for i in range(STEPS):
    state, _ = step(state, dataset.batch(i), {})

  params, batches = state.params, [dataset.batch(STEPS + i) for i in range(2)]
  w, whole = matrices(params), {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
  g = fisher.average(fisher.gradient, MODEL, params, batches)
  h = fisher.average(fisher.sampled, MODEL, params, batches, key)
  rng = np.random.default_rng(0)

  @jax.jit
  def loss_without(name_at):
    """Mean loss with one weight at 0; of the matrix of each name, an index into its entries, -1 for none."""
    new = {name: jnp.where(jnp.arange(x.size).reshape(x.shape) == name_at[name], 0, x) for name, x in w.items()}
    new = put(params, new)
    terms = losses.over_chunks(losses.cross_entropy(), MODEL.head, new, MODEL.hidden(new, whole), whole, None)
    return terms['loss'].sum / terms['loss'].count

  none = dict.fromkeys(w, -1)
  dense, rows = float(loss_without(none)), []
  for name, x in w.items():
    for at in rng.choice(x.size, EACH, replace=False):
      change = float(loss_without({**none, name: int(at)})) - dense
      parts = (criteria.predicted(w, g)[name], criteria.obd(w, h)[name], jnp.abs(x))
      rows.append([change, *(float(part.ravel()[at]) for part in parts)])
  assert dense < 3, 'it has been trained'
  return np.array(rows).T


def rank(a, b):
  return spearmanr(a, b).statistic


def test_second_order_predicts_what_a_deletion_costs(deletions):
  """O8: rank correlation of -gw + h w^2 / 2 with the change, with its sign, at least 0.9."""
  change, first, second, size = deletions
  assert rank(first + second, change) >= 0.9
  assert rank(first + second, change) >= rank(first, change) - 0.01
  assert rank(size, change) < 0.5, 'of magnitude, which knows no sign'


def test_the_second_order_term_has_the_right_size(deletions):
  """O8: the median of (dL + gw) / (h w^2 / 2) lies in [0.6, 1.6]; of the larger half, which rounding leaves alone."""
  change, first, second, _ = deletions
  large = second > np.median(second)
  assert 0.6 <= np.median(((change - first) / second)[large]) <= 1.6
