"""Presets: published parameter counts, the shapes that transformers gives them, and what the tiny ones promise."""

import math

import jax
import pytest

from slm_jax.config import ConfigError, override
from slm_jax.interop.hf import config_from_hf
from slm_jax.model.config import ModelConfig
from slm_jax.model.decoder import build
from slm_jax.model.flops import parameter_count
from slm_jax.model.presets import preset, presets

PUBLISHED = {
  'smollm2_135m': 134_515_008,
  'smollm2_360m': 361_821_120,
  'smollm2_1_7b': 1_711_376_384,
  'qwen3_0_6b': 596_049_920,
  'llama3_2_1b': 1_235_814_400,
  'llama3_1_8b': 8_030_261_248,
  'gemma3_270m': 268_098_176,
  'gpt2': 124_439_808,
}


def allocated(config):
  return sum(math.prod(p.shape) for p in jax.tree.leaves(jax.eval_shape(build(config).init, jax.random.key(0))))


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
  assert allocated(preset(name)) == parameter_count(preset(name)) == PUBLISHED[name]


@pytest.mark.parametrize('name', [name for name in presets() if name.startswith('tiny')])
def test_tiny_ones_have_the_size_of_their_name_and_heads_that_suit_accelerators(name):
  config, text = preset(name), name.removeprefix('tiny_')
  target = float(text[:-1]) * {'k': 1e3, 'm': 1e6}[text[-1]]
  assert abs(allocated(config) / target - 1) < 0.15
  assert config.head_dim % (64 if target >= 3e6 else 32) == 0
  assert config.n_heads * config.head_dim == config.d_model
  assert config.d_ff % 32 == 0


def test_names():
  assert set(presets()) == PUBLISHED.keys() | {f'tiny_{n}' for n in ('100k', '300k', '1m', '3m', '10m', '30m')}
  with pytest.raises(
    ConfigError, match="model='smollm_135m': unknown preset; did you mean 'smollm2_135m'. allowed: tiny"
  ):
    preset('smollm_135m')
  assert ModelConfig.parse('gpt2', 'model') == preset('gpt2')


def smollm2(d, layers, heads, groups, d_ff, theta=100_000.0):
  return dict(
    hidden_size=d,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    num_key_value_heads=groups,
    intermediate_size=d_ff,
    vocab_size=49_152,
    max_position_embeddings=8192,
    rope_theta=theta,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
  )


# The models' own config.json files, as far as they differ from the defaults of their class.
CONFIG_JSON = {
  'smollm2_135m': ('Llama', smollm2(576, 30, 9, 3, 1536)),
  'smollm2_360m': ('Llama', smollm2(960, 32, 15, 5, 2560)),
  'smollm2_1_7b': ('Llama', smollm2(2048, 24, 32, 32, 8192, 130_000.0)),
  'qwen3_0_6b': (
    'Qwen3',
    dict(
      hidden_size=1024,
      num_hidden_layers=28,
      num_attention_heads=16,
      num_key_value_heads=8,
      intermediate_size=3072,
      max_position_embeddings=40_960,
      rope_theta=1_000_000.0,
      tie_word_embeddings=True,
    ),
  ),
  'llama3_2_1b': (
    'Llama',
    dict(
      hidden_size=2048,
      num_hidden_layers=16,
      num_attention_heads=32,
      num_key_value_heads=8,
      intermediate_size=8192,
      vocab_size=128_256,
      max_position_embeddings=131_072,
      rms_norm_eps=1e-5,
      rope_theta=500_000.0,
      rope_scaling=dict(
        rope_type='llama3',
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
      ),
      tie_word_embeddings=True,
    ),
  ),
  'llama3_1_8b': (
    'Llama',
    dict(
      hidden_size=4096,
      num_hidden_layers=32,
      num_attention_heads=32,
      num_key_value_heads=8,
      intermediate_size=14_336,
      vocab_size=128_256,
      max_position_embeddings=131_072,
      rms_norm_eps=1e-5,
      rope_theta=500_000.0,
      rope_scaling=dict(
        rope_type='llama3',
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
      ),
      tie_word_embeddings=False,
    ),
  ),
  'gemma3_270m': (
    'Gemma3',
    dict(
      hidden_size=640,
      num_hidden_layers=18,
      num_attention_heads=4,
      num_key_value_heads=1,
      intermediate_size=2048,
      vocab_size=262_144,
      max_position_embeddings=32_768,
      sliding_window=512,
    ),
  ),
  'gpt2': ('GPT2', {}),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_transformers_builds_the_same_model(name):
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  family, settings = CONFIG_JSON[name]
  config = getattr(transformers, {'Gemma3': 'Gemma3TextConfig'}.get(family, f'{family}Config'))(**settings)
  model = getattr(transformers, f'{family}LMHeadModel' if family == 'GPT2' else f'{family}ForCausalLM')
  with torch.device('meta'):
    assert sum(p.numel() for p in model(config).parameters()) == PUBLISHED[name]
  ours, theirs = preset(name), config_from_hf(config)
  assert theirs == override(ours, {'attn_scale': theirs.attn_scale})
  assert theirs.attn_scale in (0, ours.head_dim**-0.5)  # 0 means this
