"""Bad input by kind: one line that names the key, the value and what is allowed, or a warning that says enough."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from slm_jax.config import ConfigError, check, override
from slm_jax.model.config import ModelConfig
from slm_jax.model.decoder import build
from slm_jax.model.flops import parameter_count
from slm_jax.prune import criteria, rotate
from slm_jax.prune.choose import at_random, choose, ranked
from slm_jax.prune.cut import Kept, cut
from slm_jax.prune.l0 import L0
from slm_jax.prune.matrices import matrices
from slm_jax.prune.oneshot import compensated, sequential
from slm_jax.prune.patterns import select
from slm_jax.prune.sparse import OneShot
from slm_jax.prune.stats import collect_all, distinct_tokens
from slm_jax.prune.target import search
from slm_jax.prune.transform import Prune
from slm_jax.step import Resources

CONFIG = ModelConfig(
  vocab_size=48, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=24, max_len=32, tied=False
)
MODEL = build(CONFIG)
PARAMS = MODEL.init(jax.random.PRNGKey(0))


def batch(seed, tokens=8, rows=1):
  inputs = np.random.default_rng(seed).integers(0, 48, (rows, 8), dtype=np.int32)
  return {'inputs': inputs, 'segments': np.array([[1] * tokens + [0] * (8 - tokens)] * rows, np.int32)}


def refused(changes, message):
  with pytest.raises(ConfigError, match=message) as error:
    check(override(tiny.config(4), changes), 'config')
  assert '\n' not in str(error.value)


# ----------------------------------------------------------------------------------- a budget that leaves a layer empty


@pytest.mark.parametrize(
  'changes,message',
  [
    (
      {'init.arm': 'x', 'init.sparse': OneShot('magnitude', 0.999)},
      'init.sparse.sparsity=0.999: leaves no weight in a',
    ),
    (
      {'init.arm': 'x', 'init.sparse': OneShot('wanda', 0.97, 'output')},
      'init.sparse.sparsity=0.97: leaves no weight in an output of q',
    ),
    (
      {'init.arm': 'x', 'init.sparse': OneShot('obd', 0.9999, allocation='global')},
      'for 14 matrices, each of which needs',
    ),
    ({'transforms': (Prune(0.999),)}, 'transforms.prune.sparsity=0.999: leaves no weight in a matrix'),
    ({'transforms': (L0(channels=0.01),)}, 'transforms.l0.channels=0.01: leaves none of them in a layer'),
  ],
)
def test_a_budget_that_leaves_a_layer_empty(changes, message):
  refused(changes, message)


def test_a_cut_that_leaves_nothing_and_a_share_that_nothing_fits():
  with pytest.raises(ConfigError, match=r'kept.channels: indices of shape \(2, 0\), expected \(2, 1..24\)'):
    cut(CONFIG, PARAMS, Kept(channels=np.zeros((2, 0), int)))
  with pytest.raises(ConfigError, match='share=0.001: nothing fits; the least that is tried costs'):
    search(CONFIG, 0.001, parameter_count)
  with pytest.raises(ConfigError, match='keep=0.001: leaves no weight in a matrix of q'):
    select(criteria.magnitude(matrices(PARAMS)), 0.001)


# ---------------------------------------------------------------- heads that key/value groups do not divide after a cut


def test_heads_that_are_no_multiple_of_the_groups():
  refused({'model.n_heads': 3, 'model.n_kv_heads': 2}, 'model.n_heads=3: must be a multiple of n_kv_heads=2')
  fewer_groups = dataclasses.replace(CONFIG, n_heads=4, n_kv_heads=1)
  with pytest.raises(ConfigError, match='model.n_heads=4: 4 for each of 1 key/value heads, but the arm .* has 2'):
    choose(CONFIG, fewer_groups, at_random(CONFIG, 0))


# -------------------------------------------------------------------------------- n:m on an axis that m does not divide


@pytest.mark.parametrize(
  'changes,message',
  [
    (
      {'init.arm': 'x', 'init.sparse': OneShot('magnitude', 0.5, '3:6')},
      'init.sparse.pattern=3:6: 6 does not divide the 16 inputs of q',
    ),
    (
      {'init.arm': 'x', 'init.sparse': OneShot('sparsegpt', 0.5, '3:6')},
      'init.sparse.pattern=3:6: 6 does not divide the 16 inputs of q',
    ),
    (
      {'transforms': (Prune(0.5, pattern='16:32'),)},
      'transforms.prune.pattern=16:32: 32 does not divide the 16 inputs',
    ),
  ],
)
def test_n_of_m_where_m_does_not_divide_the_inputs(changes, message):
  refused(changes, message)


# ---------------------------------------------------------------------------- calibration text that is not large enough


def test_text_that_is_too_small_for_the_hessian_is_a_warning_with_the_numbers(caplog):
  masks = select(criteria.magnitude(matrices(PARAMS)), 0.5)
  runs = {
    'sparsegpt': lambda text: sequential(MODEL, PARAMS, text, 0.5)[0],
    'least_squares': lambda text: compensated(MODEL, PARAMS, masks, text, 'least_squares'),
  }
  for run in runs.values():
    caplog.clear()
    with caplog.at_level(logging.WARNING):
      new = run([batch(0), batch(0), batch(0)])  # the same eight tokens, three times
    (record,) = caplog.records
    assert '8 distinct tokens are fewer than the inputs (16 of into_qkv,' in record.getMessage()
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(new))


def test_text_that_does_not_span_the_stream_is_a_warning_too(caplog):
  with caplog.at_level(logging.WARNING):
    config, params, _ = ranked('principal', MODEL, PARAMS, [batch(0, tokens=5)], 0)
  (record,) = caplog.records
  assert '5 distinct tokens are fewer than the 16 channels' in record.getMessage()
  tokens = jnp.arange(12).reshape(2, 6)
  before, after = (build(c).hidden(p, {'inputs': tokens}) for c, p in ((CONFIG, PARAMS), (config, params)))
  logits = [build(c).head(p, x) for c, p, x in ((CONFIG, PARAMS, before), (config, params, after))]
  np.testing.assert_allclose(*logits, atol=1e-5)


def test_a_sequence_that_comes_again_does_not_count_again():
  assert distinct_tokens([batch(0, rows=2), batch(0, rows=2), batch(1, tokens=3)]) == 2 * 8 + 3


@pytest.mark.parametrize('text', [[], [batch(0, tokens=0)]], ids=['none', 'padding'])
def test_no_text_at_all(text):
  masks = select(criteria.magnitude(matrices(PARAMS)), 0.5)
  for run in (
    lambda: sequential(MODEL, PARAMS, text, 0.5),
    lambda: compensated(MODEL, PARAMS, masks, text, 'least_squares'),
    lambda: collect_all(MODEL, PARAMS, text),
    lambda: rotate.gram(CONFIG, PARAMS, text),
    *(lambda by=by: ranked(by, MODEL, PARAMS, text, 0) for by in ('activations', 'flap', 'principal')),
  ):
    with pytest.raises(ConfigError, match='calibration: no tokens'):
      run()


# ---------------------------------------------------------------------------------- a checkpoint whose masks do not fit


def built(spec, params, model=MODEL):
  resources = Resources(steps=10, seq_len=8, vocab=48, model=MODEL, load=lambda arm: (model, params), folder=None)
  return spec.build(resources)


def test_a_ticket_of_another_shape():
  other = build(dataclasses.replace(CONFIG, d_ff=32))
  with pytest.raises(ConfigError, match='prune.ticket=t: its model has other shapes of gate, up, down'):
    built(Prune(ticket='t'), other.init(jax.random.PRNGKey(0)), other)


def test_a_ticket_that_is_not_sparse_or_not_in_the_pattern_is_a_warning(caplog):
  def said(spec, params):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
      built(spec, params)
    return [record.getMessage() for record in caplog.records]

  assert said(Prune(0.5, ticket='t'), PARAMS) == [
    'transforms.prune.ticket=t: it has no zeros, so nothing is masked at the start'
  ]
  hole = {**PARAMS, 'layers': {**PARAMS['layers'], 'up': PARAMS['layers']['up'].at[1, 4:7, 2].set(0)}}
  assert said(Prune(0.5, ticket='t'), hole) == []
  assert said(Prune(0.5, pattern='2:4', ticket='t'), hole) == [
    'transforms.prune.ticket=t: fewer than 2 of some 4 inputs are left in up: sparser than pattern=2:4'
  ]
