"""A rotated model computes what it did, and its stream has the principal directions first."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.config import ConfigError
from slm_jax.model.api import Feature
from slm_jax.model.config import ModelConfig
from slm_jax.model.decoder import build
from slm_jax.prune.rotate import directions, fold, gram, rotate

LLAMA = ModelConfig(
  vocab_size=40, d_model=12, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=20, max_len=32, init_std=0.5
)
OTHER = dataclasses.replace(
  LLAMA, tied=False, bias=True, mlp='gelu', positions='learned', norm_offset=1.0, embed_scale=3.0, softcap=5.0
)
QWEN = dataclasses.replace(LLAMA, qk_norm=True, mup_base_width=6)
TOKENS = np.random.default_rng(1).integers(0, 40, (2, 16), dtype=np.int32)
BATCH = {'inputs': TOKENS, 'segments': np.repeat([[1] * 10 + [2] * 5 + [0]], 2, 0).astype(np.int32)}


def random_params(config):
  """All of them random, gains and biases too; float64 numpy."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(build(config).init, jax.random.key(0))
  params = jax.tree.map(lambda s: rng.normal(size=s.shape) * 0.4, shapes)
  for name in ('attn_norm', 'mlp_norm'):
    params['layers'][name] += 1
  params['final_norm'] += 1
  return params


def cast(params):
  return jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)


def stream(config, params):
  """Of the stream after every layer, each token of length 1; and the stream [N,D]."""
  wanted = [Feature('hidden', i) for i in range(config.n_layers + 1)]
  features = jax.jit(lambda p: build(config).features(p, BATCH, wanted)[1])(cast(params))
  x_ND = np.concatenate([np.float64(x).reshape(-1, config.d_model) for x in features.values()])
  x_ND /= np.linalg.norm(x_ND, axis=1, keepdims=True)
  return x_ND.T @ x_ND


def logits(config, params):
  model = build(config)
  return np.asarray(jax.jit(lambda p: model.head(p, model.hidden(p, BATCH)))(cast(params)))


def forward64(config, params, tokens_T):
  """Logits of one document in float64: a second, plain implementation of the Llama family."""
  c, t = config, len(tokens_T)

  def norm(x, gain):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * gain

  def turn(x):
    half = c.head_dim // 2
    angle = np.arange(t)[:, None] * c.rope_theta ** -(np.arange(half) / half)
    cos, sin, a, b = np.cos(angle)[:, None], np.sin(angle)[:, None], x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

  x = params['embed']['tokens'][tokens_T]
  for l in range(c.n_layers):
    w = {name: p[l] for name, p in params['layers'].items()}
    a = norm(x, w['attn_norm'])
    q, k, v = (np.einsum('td,dhk->thk', a, w[name]) for name in 'qkv')
    q, k = turn(q), turn(k)
    k, v = (np.repeat(y, c.n_heads // c.n_kv_heads, 1) for y in (k, v))
    score = np.einsum('thk,shk->hts', q, k) / np.sqrt(c.head_dim) + np.where(np.tri(t), 0, -np.inf)
    p = np.exp(score - score.max(-1, keepdims=True))
    x = x + np.einsum('hts,shk,hkd->td', p / p.sum(-1, keepdims=True), v, w['o'])
    h = norm(x, w['mlp_norm'])
    gate = h @ w['gate']
    x = x + (gate / (1 + np.exp(-gate)) * (h @ w['up'])) @ w['down']
  return norm(x, params['final_norm']) @ (params['embed']['tokens'].T if c.tied else params['head'])


def test_logits_do_not_change_in_float64():
  """O15, to 1e-9; the forward pass is checked against the model, so that it says something about it."""
  params = random_params(LLAMA)
  config, turned = rotate(LLAMA, params, stream(LLAMA, params))
  before, after = forward64(LLAMA, params, TOKENS[0, :10]), forward64(config, turned, TOKENS[0, :10])
  np.testing.assert_allclose(before, logits(LLAMA, params)[0, :10], rtol=1e-4, atol=1e-4)
  assert np.abs(after - before).max() < 1e-9
  assert np.abs(before).max() > 1
  assert np.abs(turned['embed']['tokens'] - params['embed']['tokens']).max() > 0.1


@pytest.mark.parametrize('config', [LLAMA, OTHER, QWEN], ids=['llama', 'other', 'qwen'])
def test_logits_do_not_change_in_the_model(config):
  """O15 in float32: tied and not, biases, learned positions, offsets of gains, muP, norms of heads."""
  params = random_params(config)
  new_config, turned = rotate(config, cast(params), stream(config, params))
  assert not new_config.tied
  assert dataclasses.replace(new_config, tied=config.tied) == config
  for name in ('attn_norm', 'mlp_norm'):
    np.testing.assert_array_equal(turned['layers'][name] + config.norm_offset, np.ones((2, 12), np.float32))
  np.testing.assert_array_equal(turned['final_norm'] + config.norm_offset, np.ones(12, np.float32))
  shapes = jax.eval_shape(build(new_config).init, jax.random.key(0))
  assert jax.tree.map(lambda p: (p.shape, p.dtype), turned) == jax.tree.map(lambda s: (s.shape, s.dtype), shapes)
  before = logits(config, params)
  np.testing.assert_allclose(logits(new_config, turned), before, atol=1e-4 * np.abs(before).max())


def test_the_stream_has_its_principal_directions_first():
  params = random_params(LLAMA)
  old = stream(LLAMA, params)
  new = stream(*rotate(LLAMA, params, old))
  values = np.diagonal(new)
  np.testing.assert_allclose(new, np.diag(values), atol=1e-4 * values[0])
  assert (np.diff(values) <= 1e-4 * values[0]).all()
  np.testing.assert_allclose(values, np.linalg.eigvalsh(old)[::-1], rtol=1e-4)
  assert values[:6].sum() > np.sort(np.diagonal(old))[-6:].sum() * 1.05, 'than by cutting channels as they were'


@pytest.mark.parametrize('config', [LLAMA, OTHER, QWEN], ids=['llama', 'other', 'qwen'])
def test_the_gram_is_that_of_what_the_norms_put_out(config):
  """Gains and padding do not count, and after the rotation it is diagonal."""
  params = cast(random_params(config))
  found = gram(config, params, [BATCH])
  other = {**params, 'final_norm': 2 * params['final_norm'] + config.norm_offset}  # gains of the last norm, twice
  np.testing.assert_allclose(gram(config, other, [BATCH]), found, rtol=1e-4, atol=1e-3)
  padded = {**BATCH, 'inputs': np.where(BATCH['segments'] > 0, TOKENS, 7)}
  np.testing.assert_allclose(gram(config, params, [padded, padded]), 2 * found, rtol=1e-5, atol=1e-4)
  tokens = (BATCH['segments'] > 0).sum()
  assert np.trace(found) == pytest.approx(config.d_model * tokens * (2 * config.n_layers + 1), rel=1e-2)
  turned = gram(*rotate(config, params, found), [BATCH])
  np.testing.assert_allclose(turned, np.diag(np.diagonal(turned)), atol=1e-4 * turned.max())
  assert (np.diff(np.diagonal(turned)) < 1e-3).all()


def test_directions_are_a_rotation():
  x = np.random.default_rng(0).normal(size=(5, 12))  # fewer tokens than channels: eigenvalues that are equal
  q = directions(x.T @ x)
  np.testing.assert_allclose(q.T @ q, np.eye(12), atol=1e-12)


def test_bfloat16_stays():
  config = dataclasses.replace(LLAMA, param_dtype='bfloat16')
  params = build(config).init(jax.random.key(0))
  _, turned = rotate(config, params, np.eye(12))
  assert {p.dtype for p in jax.tree.leaves(turned)} == {jnp.dtype('bfloat16')}


def test_what_does_not_commute_with_a_rotation_is_refused():
  for changes, says in (
    ({'norm': 'layer'}, 'rotate: model.norm=layer'),
    ({'post_norms': True}, 'model.post_norms=true'),
  ):
    with pytest.raises(ConfigError, match=says):
      fold(dataclasses.replace(LLAMA, **changes), {})
  with pytest.raises(ConfigError, match=r'a gram of shape \(3, 3\)'):
    rotate(LLAMA, {}, np.eye(3))
