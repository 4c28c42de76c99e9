"""Parity with transformers: random models of each family, odd shapes; logits equal to 1e-4 in float32."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from slm_jax.config import ConfigError
from slm_jax.interop.hf import config_from_hf, params_from_hf
from slm_jax.model.decoder import Decoder, shapes

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 40))
ATOL = 1e-4

SHAPE = dict(
  vocab_size=97,
  hidden_size=48,
  intermediate_size=74,  # no multiple of anything
  num_hidden_layers=3,
  num_attention_heads=6,
  num_key_value_heads=2,
  max_position_embeddings=64,
  bos_token_id=1,
  eos_token_id=2,
)
LLAMA3 = dict(
  rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
GEMMA = {**SHAPE, 'head_dim': 16, 'sliding_window': 8, 'num_hidden_layers': 5, 'sliding_window_pattern': 3}
GPT2 = dict(vocab_size=97, n_embd=48, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)

CASES = {
  'llama': ('Llama', SHAPE),
  'llama_tied_mha': ('Llama', {**SHAPE, 'num_key_value_heads': 6, 'tie_word_embeddings': True}),
  'llama_single_kv_wide_heads': ('Llama', {**SHAPE, 'num_key_value_heads': 1, 'head_dim': 24, 'rms_norm_eps': 1e-5}),
  'llama_biases': ('Llama', {**SHAPE, 'attention_bias': True, 'mlp_bias': True}),
  'llama3_scaling': ('Llama', {**SHAPE, 'rope_theta': 500.0, 'rope_scaling': LLAMA3}),
  'qwen3': ('Qwen3', {**SHAPE, 'head_dim': 10, 'rope_theta': 1e6}),
  'qwen3_tied_pruned_heads': (
    'Qwen3',
    {**SHAPE, 'head_dim': 32, 'num_attention_heads': 5, 'num_key_value_heads': 5, 'tie_word_embeddings': True},
  ),
  'gemma3': ('Gemma3', GEMMA),
  'gemma3_scale_and_cap': (
    'Gemma3',
    {**GEMMA, 'num_key_value_heads': 1, 'query_pre_attn_scalar': 24, 'final_logit_softcapping': 5.0},
  ),
  'gemma3_untied_all_local': ('Gemma3', {**GEMMA, 'num_hidden_layers': 2, 'tie_word_embeddings': False}),
  'gpt2': ('GPT2', GPT2),
  'gpt2_narrow_untied': ('GPT2', {**GPT2, 'n_inner': 100, 'tie_word_embeddings': False, 'scale_attn_weights': False}),
}


@functools.cache
def reference(name):
  """A transformers model whose every tensor is random, norms and biases too."""
  family, settings = CASES[name]
  config = getattr(transformers, {'Gemma3': 'Gemma3TextConfig'}.get(family, f'{family}Config'))(**settings)
  torch.manual_seed(0)
  model = getattr(transformers, f'{family}LMHeadModel' if family == 'GPT2' else f'{family}ForCausalLM')(config)
  with torch.no_grad():
    for p in model.parameters():
      p.add_(torch.randn_like(p) * 0.1)
  return model.eval()


def expected_logits(name):
  with torch.no_grad():
    return reference(name)(torch.tensor(TOKENS)).logits.numpy()


def logits(config, params):
  config = dataclasses.replace(config, unroll=1)  # compiles faster
  return np.asarray(jax.jit(Decoder(config).apply)({'params': params}, TOKENS))


@pytest.mark.parametrize('name', CASES)
def test_logits_equal_those_of_transformers(name, record_property):
  model = reference(name)
  config = config_from_hf(model.config)
  params = params_from_hf(model.state_dict(), config)
  jax.tree.map(lambda p, s: np.testing.assert_equal((p.shape, p.dtype), (s.shape, s.dtype)), params, shapes(config))
  got, expected = logits(config, params), expected_logits(name)
  record_property('max_abs_difference', float(np.abs(got - expected).max()))
  assert np.abs(expected).max() > 1, 'a model whose logits are nearly zero proves nothing'
  np.testing.assert_allclose(got, expected, atol=ATOL, rtol=0)


def test_the_cases_reach_what_they_are_for():
  """Undoing each switch must break parity: otherwise the case above would pass with a wrong mapping of it."""
  for name, undo in (
    ('gemma3', {'window': 0, 'global_every': 1}),
    ('gemma3', {'global_every': 2}),
    ('gemma3', {'rope_local_theta': 1e6}),
    ('gemma3_scale_and_cap', {'attn_scale': 0.0}),
    ('gemma3_scale_and_cap', {'softcap': 0.0}),
    ('llama3_scaling', {'rope_scaling': ()}),
    ('gpt2_narrow_untied', {'attn_scale': 0.0}),
  ):
    model = reference(name)
    config = config_from_hf(model.config)
    params = params_from_hf(model.state_dict(), config)
    wrong = logits(dataclasses.replace(config, **undo), params)
    assert np.abs(wrong - expected_logits(name)).max() > 10 * ATOL, (name, undo)


def test_config_json_of_version_4_means_the_same():
  old = dict(
    SHAPE, model_type='llama', rms_norm_eps=1e-6, rope_theta=500.0, rope_scaling=LLAMA3, tie_word_embeddings=False
  )
  assert config_from_hf(old) == config_from_hf(reference('llama3_scaling').config)
  new = reference('gemma3').config
  old = {k: v for k, v in new.to_dict().items() if k not in ('rope_parameters', 'layer_types')}
  old |= {'rope_theta': 1e6, 'rope_local_base_freq': 10_000.0}
  assert config_from_hf(old) == config_from_hf(new)


@pytest.mark.parametrize(
  'family, change, message',
  [
    ('llama', {'model_type': 'mamba'}, "model_type='mamba': allowed: llama, qwen3, gemma3_text, gpt2"),
    ('llama', {'hidden_act': 'relu'}, "llama config: hidden_act='relu' is not supported; allowed: 'silu'"),
    (
      'llama',
      {'attention_bias': True},
      'attention_bias=True, mlp_bias=False is not supported; allowed: both or neither',
    ),
    ('llama', {'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1.0}}, "rope_type='yarn'"),
    ('llama', {'hidden_size': None}, "key 'hidden_size' is missing"),
    ('llama', {'rope_parameters': {'rope_type': 'default'}}, "llama config: key 'rope_theta' is missing"),
    ('llama', {'rope_parameters': {'rope_type': 'llama3', 'rope_theta': 1.0, 'factor': 8}}, "'low_freq_factor'"),
    ('gemma3', {'rope_parameters': {'rope_theta': 1.0}}, "gemma3_text config: key 'sliding_attention' is missing"),
    ('llama', {'num_key_value_heads': 4}, 'llama.n_heads=6: must be a multiple of n_kv_heads=4'),
    ('qwen3', {'use_sliding_window': True}, 'use_sliding_window=True'),
    ('gemma3', {'attn_logit_softcapping': 50.0}, 'attn_logit_softcapping=50.0'),
    ('gemma3', {'layer_types': ['full_attention'] + ['sliding_attention'] * 4}, 'layer_types'),
    ('gpt2', {'activation_function': 'relu'}, "activation_function='relu'"),
    ('gpt2', {'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx=True'),
  ],
)
def test_what_cannot_be_expressed_is_refused_by_name(family, change, message):
  settings = reference(family).config.to_dict() | change
  with pytest.raises(ConfigError, match=message) as error:
    config_from_hf({k: v for k, v in settings.items() if v is not None})
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['llama_tied_mha', 'gpt2', 'gemma3'])
def test_keys_that_do_not_fit_are_named(name):
  model = reference(name)
  config, state = config_from_hf(model.config), dict(model.state_dict())
  matrix = next(key for key in state if key.endswith(('q_proj.weight', 'c_attn.weight')))

  def refused(changed, message):
    with pytest.raises(ConfigError, match=message) as error:
      params_from_hf(changed, config)
    assert '\n' not in str(error.value)

  refused({k: v for k, v in state.items() if k != matrix}, f'missing {matrix}$')
  refused(state | {'model.extra.weight': state[matrix]}, 'unexpected model.extra.weight$')
  refused(state | {matrix: state[matrix][:, :-1]}, rf'{matrix}: shape \(.*\), expected \(.*\)')
  refused(state | {'lm_head.weight': state['lm_head.weight'] + 1}, 'lm_head.weight: differs from .* tied=True')


def test_a_configuration_of_no_family_is_refused():
  model = reference('gpt2')
  config = dataclasses.replace(config_from_hf(model.config), qk_norm=True)
  with pytest.raises(ConfigError, match='layers.k_norm: no tensor of transformer.* corresponds to it'):
    params_from_hf(model.state_dict(), config)


def test_other_forms_of_the_same_tensors():
  """Without the tied copy, of the body alone, with old buffers, as numpy, in bfloat16."""
  model = reference('gpt2')
  config, state = config_from_hf(model.config), dict(model.state_dict())
  params = params_from_hf(state, config)
  body = {k.removeprefix('transformer.'): v.numpy() for k, v in state.items() if k != 'lm_head.weight'}
  body['h.0.attn.bias'] = np.tril(np.ones((1, 1, 64, 64)))
  jax.tree.map(np.testing.assert_array_equal, params, params_from_hf(body, config))
  rounded = params_from_hf({k: v.bfloat16() for k, v in state.items()}, config)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), params, rounded)
