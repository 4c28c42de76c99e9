"""The decoder: its contract, causality, packing, padding, and that no field of its configuration is dead."""

import dataclasses
import functools

import cheap
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, SMALL, B, T, params_of, setup
from hypothesis import given, settings

from slm_jax.config import ConfigError
from slm_jax.model import decoder
from slm_jax.model.config import ModelConfig
from slm_jax.model.decoder import Decoder, build


def random_tokens(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, SMALL['vocab_size'], shape, dtype=np.int32)


def is_tuple(x):
  return isinstance(x, tuple)


# -------------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize('family', FAMILIES)
def test_parameters_match_their_declared_shapes_and_axes(family):
  config = FAMILIES[family]
  params = jax.eval_shape(build(config).init, jax.random.key(0))
  assert jax.tree.map(lambda p: (p.shape, p.dtype), params) == jax.tree.map(
    lambda s: (s.shape, s.dtype), decoder.shapes(config)
  )
  axes = decoder.logical_axes(config)
  assert jax.tree.structure(axes, is_leaf=is_tuple) == jax.tree.structure(params)
  jax.tree.map(lambda a, p: np.testing.assert_equal(len(a), p.ndim), axes, params, is_leaf=is_tuple)
  assert all(axes['layers'][name][0] == 'layers' for name in params['layers'])
  assert axes['layers']['q'] == ('layers', 'embed', 'heads', 'head_dim')
  assert axes['embed']['tokens'] == ('vocab', 'embed')


@pytest.mark.parametrize('family', FAMILIES)
def test_logits_are_the_head_of_the_hidden_states(family):
  params, logits = setup(family)
  model = build(FAMILIES[family])
  tokens = random_tokens(B, T)
  segments = np.ones_like(tokens)
  got = logits(params, tokens, segments)
  halves = jax.jit(lambda p, batch: model.head(p, model.hidden(p, batch)))(
    params, {'inputs': tokens, 'segments': segments}
  )
  assert (got.shape, got.dtype) == ((B, T, SMALL['vocab_size']), jnp.float32)
  np.testing.assert_allclose(got, halves, atol=1e-5)
  np.testing.assert_allclose(got, logits(params, tokens, None), atol=1e-5)


def test_initial_scales():
  config = ModelConfig(**{**SMALL, 'd_model': 64, 'd_ff': 256}, init_std=0.1, norm='layer', bias=True, tied=False)
  params = jax.jit(build(config).init)(jax.random.key(0))
  layers = params['layers']
  for w in (layers['q'], layers['v'], layers['up'], params['embed']['tokens'], params['head']):
    assert np.std(w) == pytest.approx(0.1, rel=0.1)
    assert np.mean(w) == pytest.approx(0, abs=0.01)
  for w in (layers['o'], layers['down']):
    assert np.std(w) == pytest.approx(0.1 / 6**0.5, rel=0.1)
  assert not np.allclose(layers['q'][0], layers['q'][1]), 'layers must differ'
  assert not np.allclose(layers['k'], layers['v']), 'matrices must differ'
  for name, w in layers.items():
    if 'bias' in name or 'norm' in name:
      assert np.all(w == (0 if 'bias' in name else 1))


def test_norms_start_as_the_identity_with_an_offset_too():
  @functools.partial(jax.jit, static_argnums=0)
  def hidden(offset):
    model = build(ModelConfig(**SMALL, norm_offset=offset, qk_norm=True, post_norms=True))
    return model.hidden(model.init(jax.random.key(0)), {'inputs': random_tokens(1, 8)})

  np.testing.assert_array_equal(hidden(0.0), hidden(1.0))


def test_bad_input_is_a_one_line_error():
  params, _ = setup('llama')
  with pytest.raises(ConfigError, match='65 is longer than model.max_len=64'):
    Decoder(FAMILIES['llama']).apply({'params': params}, random_tokens(1, 65))
  for change, message in (
    ({'n_kv_heads': 3}, 'n_heads=4: must be a multiple of n_kv_heads=3'),
    ({'head_dim': 7}, 'RoPE needs an even head size'),
    ({'window': 8}, 'no layer is local with global_every=1'),
    ({'unroll': 4}, 'must be 0..n_layers=3'),
    ({'rope_scaling': (2.0,)}, 'rope_scaling'),
    ({'attn_scale': -1.0}, 'attn_scale=-1.0: must not be negative'),
    ({'d_ff': 0}, 'd_ff=0: must be positive'),
    ({'norm': 'batch'}, "norm='batch': allowed: rms, layer"),
  ):
    with pytest.raises(ConfigError, match=message):
      build(ModelConfig(**{**SMALL, **change}))


def test_a_token_beyond_the_vocabulary_is_not_another_token():
  params, logits = setup('llama')
  tokens = random_tokens(B, T)
  tokens[0, -1] = SMALL['vocab_size']
  out = np.asarray(logits(params, tokens, None))
  assert np.isnan(out[0, -1]).all()


# ------------------------------------------------------------------------------------------- what depends on what


@pytest.mark.parametrize('family', FAMILIES)
def test_gradients_reach_exactly_the_earlier_tokens_of_the_same_document(family):
  config, (params, _) = FAMILIES[family], setup(family)
  tokens = np.arange(12, dtype=np.int32)[None]  # all different, so that row t of the table is the input at t
  segments = np.array([[1] * 5 + [2] * 4 + [0] * 3], np.int32)
  direction = jax.random.normal(jax.random.key(0), (config.d_model,))

  def hidden(table):
    changed = {**params, 'embed': {**params['embed'], 'tokens': table}}
    return build(config).hidden(changed, {'inputs': tokens, 'segments': segments})[0] @ direction

  jacobian = jax.jit(jax.jacrev(hidden))(params['embed']['tokens'])
  reached = np.asarray((jacobian[:, :12] != 0).any(-1))
  same = segments[0][:, None] == segments[0][None]
  np.testing.assert_array_equal(reached, np.tril(same))
  assert np.isfinite(jacobian).all()


def test_local_layers_reach_no_further_than_the_window():
  config = dataclasses.replace(FAMILIES['gemma3'], n_layers=2, window=3, global_every=5)
  params = params_of(config)
  tokens = np.arange(12, dtype=np.int32)[None]

  def hidden(table):
    changed = {**params, 'embed': {**params['embed'], 'tokens': table}}
    return build(config).hidden(changed, {'inputs': tokens})[0].sum(-1)

  reached = np.asarray((jax.jit(jax.jacrev(hidden))(params['embed']['tokens'])[:, :12] != 0).any(-1))
  t, s = np.indices((12, 12))
  np.testing.assert_array_equal(reached, (s <= t) & (t - s <= 2 * (3 - 1)))  # two layers, each window - 1 back


@pytest.mark.parametrize('family', FAMILIES)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_packed_equals_unpacked(family, data):
  params, logits = setup(family)
  lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=B).filter(lambda n: sum(n) <= T))
  gaps = data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
  tokens = random_tokens(B, T, seed=sum(lengths))
  segments, alone = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
  places, at = [], 0
  for i, (n, gap) in enumerate(zip(lengths, gaps, strict=True)):
    at += gap if at + gap + sum(lengths[i:]) <= T else 0  # padding between documents
    segments[0, at : at + n] = i + 1
    alone[i, :n] = tokens[0, at : at + n]
    places.append((at, n))
    at += n
  packed, unpacked = np.asarray(logits(params, tokens, segments)), np.asarray(logits(params, alone, None))
  for i, (at, n) in enumerate(places):
    np.testing.assert_allclose(packed[0, at : at + n], unpacked[i, :n], atol=1e-5)


@pytest.mark.parametrize('family', ['gemma3', 'gpt2'])
def test_padding_never_changes_anything(family):
  params, logits = setup(family)
  segments = np.array([[1] * 7 + [0] * (T - 7), [0] * 4 + [1] * 9 + [2] * 8 + [0] * 3, [0] * T], np.int32)
  one, other = random_tokens(3, T, seed=1), random_tokens(3, T, seed=2)
  other = np.where(segments > 0, one, other)

  def loss(params, tokens):
    z = logits(params, tokens, segments)
    return (jax.nn.logsumexp(z, -1) * (segments > 0)).sum(), z

  grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (loss_a, z_a), grads_a = grad(params, one)
  (loss_b, z_b), grads_b = grad(params, other)
  assert np.isfinite(z_a).all()
  np.testing.assert_array_equal(np.asarray(z_a)[segments > 0], np.asarray(z_b)[segments > 0])
  assert loss_a == loss_b
  # Rows of the table that only padding uses would show here, but sums over tokens may round in another order.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5), grads_a, grads_b)


# ----------------------------------------------------------------------------------------- same function, other program


def value_and_grad(config, params, tokens):
  def loss(params):
    z = Decoder(config).apply({'params': params}, tokens)
    return (jax.nn.logsumexp(z, -1) - z[..., 0]).mean()

  # Other emitters make a loop of every scatter.
  return jax.jit(jax.value_and_grad(loss)).lower(params).compile(cheap.EMITTERS)


def test_unroll_and_remat_change_nothing_but_the_program():
  config = dataclasses.replace(FAMILIES['gemma3'], d_ff=200, window=20, global_every=2)
  params, tokens = params_of(config), random_tokens(4, 64)
  compiled = {
    (unroll, remat): value_and_grad(dataclasses.replace(config, unroll=unroll, remat=remat), params, tokens)
    for unroll, remat in ((1, 'none'), (0, 'none'), (1, 'dots'), (1, 'full'))
  }
  values = {key: f(params) for key, f in compiled.items()}
  for value in values.values():
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-3), values[1, 'none'], value)
  assert ' while(' not in compiled[0, 'none'].as_text(), 'all layers unrolled leave no loop'
  assert ' while(' in compiled[1, 'none'].as_text()
  none, dots, full = (compiled[1, remat].memory_analysis().temp_size_in_bytes for remat in ('none', 'dots', 'full'))
  assert none > 1.2 * dots > 1.2 * 1.2 * full, 'remat saves memory'


@pytest.mark.parametrize(
  'family, param_dtype', [('llama', 'float32'), ('qwen3', 'bfloat16'), ('gemma3', 'float32'), ('gpt2', 'bfloat16')]
)
def test_bfloat16_is_close(family, param_dtype):
  params, logits = setup(family)
  tokens = random_tokens(B, T)
  exact = np.asarray(logits(params, tokens, None))
  model = build(dataclasses.replace(FAMILIES[family], dtype='bfloat16', param_dtype=param_dtype))
  rounded = jax.tree.map(lambda p, s: p.astype(s.dtype), params, decoder.shapes(model.config))
  assert jax.eval_shape(model.hidden, rounded, {'inputs': tokens}).dtype == jnp.bfloat16
  got = jax.jit(lambda p: model.head(p, model.hidden(p, {'inputs': tokens})))(rounded)
  assert got.dtype == jnp.float32
  assert np.sqrt(np.mean((got - exact) ** 2)) < 0.05 * np.std(exact)


@pytest.mark.parametrize('family', ['gemma3', 'gpt2'])
def test_vmap_over_params_equals_one_by_one(family):
  params, logits = setup(family)
  several = [params, params_of(FAMILIES[family], seed=5)]
  stacked = jax.tree.map(lambda *p: np.stack(p), *several)
  tokens = random_tokens(B, T)
  together = jax.jit(jax.vmap(logits, in_axes=(0, None, None)))(stacked, tokens, None)
  for i, one in enumerate(several):
    np.testing.assert_allclose(together[i], logits(one, tokens, None), atol=1e-5)
  assert not np.allclose(together[0], together[1])


# --------------------------------------------------------------------------------------------------- no dead options

GEMMA, GPT2 = {'window': 5, 'global_every': 2}, {'positions': 'learned'}
PERTURBED = {  # field: (its other value, what else must hold for it to matter)
  'vocab_size': (67, {}),
  'd_model': (32, {}),
  'n_layers': (4, {}),
  'n_heads': (6, {}),
  'n_kv_heads': (4, {}),
  'head_dim': (10, {}),
  'd_ff': (48, {}),
  'max_len': (32, GPT2),
  'norm': ('layer', {}),
  'norm_eps': (1e-3, {}),
  'qk_norm_eps': (1e-3, {'qk_norm': True}),
  'norm_offset': (1.0, {}),
  'post_norms': (True, {}),
  'qk_norm': (True, {}),
  'mlp': ('geglu', {}),
  'bias': (True, {}),
  'positions': ('learned', {}),
  'rope_theta': (5e5, {}),
  'rope_local_theta': (100.0, GEMMA),
  'rope_scaling': ((8.0, 1.0, 4.0, 32.0), {}),
  'window': (4, GEMMA),
  'global_every': (3, GEMMA),
  'attn_scale': (0.5, {}),
  'tied': (False, {}),
  'embed_scale': (2.0, {}),
  'softcap': (30.0, {}),
  'dtype': ('bfloat16', {}),
  'param_dtype': ('bfloat16', {}),
  'init_std': (0.5, {}),
  'mup_base_width': (8, {}),
  'mup_base_head_dim': (4, {'mup_base_width': 8}),
  'remat': ('full', {}),
  'unroll': (2, {}),
  'attention': ('splash', {}),
}


@functools.cache
def program(config):
  """The text of initialisation and of loss and gradient, before compilation."""
  model = build(config)

  def loss(params, tokens):
    return model.head(params, model.hidden(params, {'inputs': tokens})).var()

  params = jax.eval_shape(model.init, jax.random.key(0))
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  return jax.jit(model.init).lower(jax.random.key(0)).as_text(), jax.jit(jax.grad(loss)).lower(params, tokens).as_text()


def test_the_same_configuration_gives_the_same_text():
  first = program(ModelConfig(**SMALL))
  program.cache_clear()
  assert first == program(ModelConfig(**SMALL))


@pytest.mark.parametrize('field', [f.name for f in dataclasses.fields(ModelConfig)])
def test_every_field_changes_something(field):
  value, context = PERTURBED[field]
  base = ModelConfig(**{**SMALL, **context})
  assert program(base) != program(dataclasses.replace(base, **{field: value}))
