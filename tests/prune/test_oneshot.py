"""One-shot pruning of a model, layer after layer."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.config import ConfigError
from slm_jax.model.api import Feature
from slm_jax.model.config import ModelConfig
from slm_jax.model.decoder import build
from slm_jax.prune import criteria
from slm_jax.prune.compensate import damped, error, inverse_factor, least_squares, mean_shift, sparsegpt
from slm_jax.prune.matrices import SITES, full, matrices, put
from slm_jax.prune.oneshot import compensated, sequential
from slm_jax.prune.patterns import select

CONFIG = ModelConfig(
  vocab_size=48,
  d_model=16,
  n_layers=3,
  n_heads=4,
  n_kv_heads=2,
  head_dim=4,
  d_ff=24,
  max_len=32,
  init_std=0.3,
  unroll=1,
)
MODEL = build(CONFIG)
SEGMENTS = np.array([[1] * 20 + [2] * 12, [1] * 25 + [0] * 7] * 3, np.int32)


def batch(seed, segments=SEGMENTS):
  return {'inputs': np.random.default_rng(seed).integers(0, 48, segments.shape, dtype=np.int32), 'segments': segments}


BATCHES = [batch(0), batch(1)]
prune_half = jax.jit(lambda w, h: sparsegpt(w, inverse_factor(h), 0.5))


@pytest.fixture(scope='module')
def params():
  """Embeddings of rank 6 in 16 channels, so that inputs are correlated, as those of a trained model are."""
  params = MODEL.init(jax.random.key(0))
  rng = np.random.default_rng(3)
  tokens = (rng.normal(size=(48, 6)) @ rng.normal(size=(6, 16))).astype(np.float32)
  return {**params, 'embed': {'tokens': jnp.asarray(tokens)}}


@pytest.fixture(scope='module')
def pruned(params):
  with jax.numpy_rank_promotion('raise'):
    return sequential(MODEL, params, BATCHES, 0.5)


@functools.cache
def features_of():
  wanted = [Feature(into, l + 1) for into in {s.into for s in SITES.values()} for l in range(CONFIG.n_layers)]
  return jax.jit(lambda params, batch: MODEL.features(params, batch, wanted)[1])


def grams(params):
  """X^T X over all tokens in documents, by feature; float64 sums."""
  out = {}
  for one in BATCHES:
    for feature, x in features_of()(params, one).items():
      x = np.float64(x).reshape(*SEGMENTS.shape, -1)[SEGMENTS > 0]
      out[feature] = out.get(feature, 0) + x.T @ x
  return out


def by_these(params, h):
  """All matrices at once, each by its gram: {(name, layer): (w, mask)}."""
  return {
    (name, l): prune_half(w[l], jnp.asarray(h[Feature(SITES[name].into, l + 1)], jnp.float32))
    for name, w in matrices(params).items()
    for l in range(CONFIG.n_layers)
  }


def test_every_matrix_is_pruned_by_what_the_pruned_model_gives_it(params, pruned):
  """All that a matrix's inputs depend on has had its turn: so they are those of the final model, in any layer."""
  new, masks = pruned
  expected = by_these(params, grams(new))
  same = [key for key, (_, mask) in expected.items() if (np.asarray(mask) == masks[key[0]][key[1]]).all()]
  assert len(same) >= len(expected) - 2, 'rounding may turn a near tie'
  for name, l in same:
    np.testing.assert_allclose(
      matrices(new)[name][l], expected[name, l][0], rtol=1e-3, atol=1e-4, err_msg=f'{name} {l}'
    )


def test_all_at_once_is_another_thing(params, pruned):
  """Only what nothing was pruned before is the same: q, k, v of the first layer."""
  new, _ = pruned
  for (name, l), (w, _) in by_these(params, grams(params)).items():
    apart = np.abs(w - matrices(new)[name][l]).max()
    if l == 0 and name in ('q', 'k', 'v'):
      assert apart < 1e-4
    else:
      assert apart > 1e-2, (name, l)


def test_every_layer_has_its_share_and_nothing_else_changes(params, pruned):
  new, masks = pruned
  assert masks.keys() == matrices(params).keys()
  for name, mask in masks.items():
    assert mask.shape == matrices(params)[name].shape
    np.testing.assert_array_equal(mask.sum((1, 2)), [mask[0].size // 2] * CONFIG.n_layers)
    assert not np.asarray(matrices(new)[name])[~np.asarray(mask)].any()
  free = {name for name in params['layers'] if name not in masks}
  for old, now in ((params['embed'], new['embed']), ({n: params['layers'][n] for n in free}, new['layers'])):
    for name, p in old.items():
      np.testing.assert_array_equal(now[name], p)


def test_it_keeps_the_outputs_better_than_its_masks_do_alone(params, pruned):
  new, masks = pruned
  logits = jax.jit(lambda p, b: MODEL.head(p, MODEL.hidden(p, b)))
  fresh, only_masked = batch(7), jax.tree.map(lambda p, m: jnp.where(m, p, 0), params, full(params, masks))
  off = [np.square(logits(p, fresh) - logits(params, fresh))[SEGMENTS > 0].mean() for p in (new, only_masked)]
  assert off[0] < 0.7 * off[1]


def test_padding_does_not_count(params, pruned, caplog):
  others = [{**b, 'inputs': np.where(SEGMENTS > 0, b['inputs'], 5)} for b in BATCHES]
  assert any((a['inputs'] != b['inputs']).any() for a, b in zip(others, BATCHES, strict=True))
  with caplog.at_level(logging.WARNING):
    again = sequential(MODEL, params, others, 0.5)
  jax.tree.map(np.testing.assert_array_equal, again, pruned)
  assert not caplog.records, 'there are more tokens than inputs'


def test_a_sparsity_of_each_matrix_and_layer(params):
  budget = {name: [0.25, 0.75, 0.5] if name == 'down' else 0.25 for name in matrices(params)}
  masks = sequential(MODEL, params, iter(BATCHES), budget)[1]  # an iterator will do
  np.testing.assert_array_equal(masks['down'].mean((1, 2)), [0.75, 0.25, 0.5])
  np.testing.assert_array_equal(masks['q'].mean((1, 2)), [0.75] * 3)


def test_n_of_m_in_bfloat16_with_too_few_tokens(caplog):
  """Six tokens for 16 and 24 inputs: a warning with the numbers, and a result."""
  model = build(dataclasses.replace(CONFIG, n_layers=2, param_dtype='bfloat16', dtype='bfloat16'))
  few = batch(2, np.array([[1] * 6 + [0] * 2], np.int32))
  with caplog.at_level(logging.WARNING):
    new, masks = sequential(model, model.init(jax.random.key(1)), [few], (2, 4))
  assert len(caplog.records) == 1
  assert (
    '6 distinct tokens are fewer than the inputs (16 of into_qkv, 16 of into_o, 16 of into_mlp, 24 of' in caplog.text
  )
  for mask in masks.values():
    layers, inputs, outputs = mask.shape
    assert (mask.reshape(layers, inputs // 4, 4, outputs).sum(2) == 2).all()
  assert all(np.isfinite(np.float32(p)).all() for p in jax.tree.leaves(new))
  assert {p.dtype for p in jax.tree.leaves(new)} == {jnp.dtype('bfloat16')}


# ------------------------------------------------------------ masks of any criterion, and what makes up for them


@pytest.fixture(scope='module')
def halved(params):
  return select(criteria.magnitude(matrices(params)), 0.5)


@pytest.fixture(scope='module')
def refitted(params, halved):
  with jax.numpy_rank_promotion('raise'):
    return compensated(MODEL, params, halved, BATCHES, 'least_squares')


def test_least_squares_errs_less_than_zeros_alone_in_every_output(params, halved, refitted):
  """By what each matrix is given in the final model, which is what it was given when its turn came."""
  h, dense, new = grams(refitted), matrices(params), matrices(refitted)
  gains = []
  for name, site in SITES.items():
    for l in range(CONFIG.n_layers):
      h_II = jnp.asarray(h[Feature(site.into, l + 1)], jnp.float32)
      mask, w = halved[name][l], dense[name][l]
      ours, none = error(w, new[name][l], h_II), error(w, w * mask, h_II)
      assert (ours <= none * (1 + 1e-4)).all(), (name, l)
      assert not np.asarray(new[name][l])[~np.asarray(mask)].any()
      np.testing.assert_allclose(new[name][l], least_squares(w, damped(h_II), mask), rtol=1e-2, atol=1e-3)
      gains.append(float(ours.sum() / none.sum()))
  assert np.median(gains) < 0.7


def test_least_squares_keeps_the_logits_better(params, halved, refitted):
  logits = jax.jit(lambda p: MODEL.head(p, MODEL.hidden(p, batch(7))))
  masked = put(params, {name: w * halved[name] for name, w in matrices(params).items()})
  off = [np.square(logits(p) - logits(params))[SEGMENTS > 0].mean() for p in (refitted, masked)]
  assert off[0] < 0.7 * off[1]


BIASED = dataclasses.replace(CONFIG, bias=True, n_layers=2)


def test_a_shift_of_the_biases_keeps_the_mean_of_every_matrixs_output(halved):
  model = build(BIASED)
  params = model.init(jax.random.key(2))
  masks = {name: mask[:2] for name, mask in halved.items()}
  with jax.numpy_rank_promotion('raise'):
    new = compensated(model, jax.device_get(params), masks, BATCHES, 'mean_shift')  # as an arm gets them of its parent
  wanted = [Feature(into, l + 1) for into in {s.into for s in SITES.values()} for l in range(2)]
  given = [model.features(new, one, wanted)[1] for one in BATCHES]
  for name, site in SITES.items():
    for l in range(2):
      x = np.concatenate([np.asarray(g[Feature(site.into, l + 1)]).reshape(*SEGMENTS.shape, -1) for g in given])
      mean_I = x[np.concatenate([SEGMENTS > 0] * 2)].mean(0)
      old_w, new_w = matrices(params)[name][l], matrices(new)[name][l]
      np.testing.assert_array_equal(new_w, old_w * masks[name][l])
      old_b, new_b = (np.asarray(p['layers'][f'{name}_bias'][l]).ravel() for p in (params, new))
      np.testing.assert_allclose(mean_I @ new_w + new_b, mean_I @ old_w + old_b, atol=1e-5)
      np.testing.assert_allclose(new_b - old_b, mean_shift(old_w, masks[name][l], mean_I), atol=1e-5)


def test_a_mean_needs_few_tokens_and_a_bias(params, halved, caplog):
  few = batch(2, np.array([[1] * 6 + [0] * 2], np.int32))
  model = build(BIASED)
  masks = {name: mask[:2] for name, mask in halved.items()}
  with caplog.at_level(logging.WARNING):
    compensated(model, model.init(jax.random.key(2)), masks, [few], 'mean_shift')
  assert not caplog.records
  with caplog.at_level(logging.WARNING):
    compensated(model, model.init(jax.random.key(2)), masks, [few], 'least_squares')
  assert '6 distinct tokens are fewer than the inputs' in caplog.text
  with pytest.raises(ConfigError, match='compensate=mean_shift: needs biases, and model.bias=false'):
    compensated(MODEL, params, halved, BATCHES, 'mean_shift')


def test_what_cannot_be_is_one_line(params):
  broken = {**params, 'layers': {**params['layers'], 'v': params['layers']['v'].at[1].set(jnp.nan)}}
  nothing = batch(0, np.zeros_like(SEGMENTS))
  for args, says in (
    ((params, [nothing], 0.5), 'calibration: no tokens'),
    ((params, [], 0.5), 'calibration: no tokens'),
    ((params, BATCHES, 1.0), 'sparsity of q=1.0: must lie in'),
    ((params, BATCHES, {'q': 0.5}), 'sparsity of q: the matrices are q, k, v, o, gate, up, down'),
    ((params, BATCHES, dict.fromkeys(matrices(params), [0.5])), r'sparsity of q: shape \(1,\) for 3 layers'),
    ((params, BATCHES, (2, 5)), 'n:m=2:5: 5 does not divide the 16 inputs'),
    ((broken, BATCHES, 0.5), 'into_o of layer 2: not finite'),
  ):
    with pytest.raises(ConfigError, match=says):
      sequential(MODEL, *args)
