"""Configurations of known models, and of tiny ones to think with.

The published shapes are those of the models' own config.json files; their parameter counts are tested. The tiny ones
have Qwen3's form (QK-norm, grouped queries, tied), which trains calmly and can still be exported when heads have been
pruned; `tiny_N` has N parameters within 15 % at their vocabulary of 512, and K is 32 below 3M, 64 up to 10M, 128 above.
"""

import difflib

from slm_jax.config import ConfigError
from slm_jax.model.config import ModelConfig


def _tiny(d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, head_dim: int, d_ff: int) -> ModelConfig:
  return ModelConfig(
    vocab_size=512,
    d_model=d_model,
    n_layers=n_layers,
    n_heads=n_heads,
    n_kv_heads=n_kv_heads,
    head_dim=head_dim,
    d_ff=d_ff,
    max_len=2048,
    qk_norm=True,
    norm_eps=1e-6,
  )


_PRESETS = {
  'tiny_100k': _tiny(64, 2, 2, 1, 32, 128),
  'tiny_300k': _tiny(96, 3, 3, 1, 32, 192),
  'tiny_1m': _tiny(128, 4, 4, 2, 32, 512),
  'tiny_3m': _tiny(256, 4, 4, 2, 64, 640),
  'tiny_10m': _tiny(384, 6, 6, 2, 64, 1024),
  'tiny_30m': _tiny(512, 10, 4, 2, 128, 1536),
  'smollm2_135m': ModelConfig(
    vocab_size=49_152,
    d_model=576,
    n_layers=30,
    n_heads=9,
    n_kv_heads=3,
    head_dim=64,
    d_ff=1536,
    max_len=8192,
    rope_theta=100_000.0,
  ),
  'smollm2_360m': ModelConfig(
    vocab_size=49_152,
    d_model=960,
    n_layers=32,
    n_heads=15,
    n_kv_heads=5,
    head_dim=64,
    d_ff=2560,
    max_len=8192,
    rope_theta=100_000.0,
  ),
  'smollm2_1_7b': ModelConfig(
    vocab_size=49_152,
    d_model=2048,
    n_layers=24,
    n_heads=32,
    n_kv_heads=32,
    head_dim=64,
    d_ff=8192,
    max_len=8192,
    rope_theta=130_000.0,
  ),
  'qwen3_0_6b': ModelConfig(
    vocab_size=151_936,
    d_model=1024,
    n_layers=28,
    n_heads=16,
    n_kv_heads=8,
    head_dim=128,
    d_ff=3072,
    max_len=40_960,
    norm_eps=1e-6,
    qk_norm=True,
    rope_theta=1_000_000.0,
  ),
  'llama3_2_1b': ModelConfig(
    vocab_size=128_256,
    d_model=2048,
    n_layers=16,
    n_heads=32,
    n_kv_heads=8,
    head_dim=64,
    d_ff=8192,
    max_len=131_072,
    rope_theta=500_000.0,
    rope_scaling=(32.0, 1.0, 4.0, 8192.0),
  ),
  'llama3_1_8b': ModelConfig(
    vocab_size=128_256,
    d_model=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    d_ff=14_336,
    max_len=131_072,
    rope_theta=500_000.0,
    rope_scaling=(8.0, 1.0, 4.0, 8192.0),
    tied=False,
  ),
  'gemma3_270m': ModelConfig(
    vocab_size=262_144,
    d_model=640,
    n_layers=18,
    n_heads=4,
    n_kv_heads=1,
    head_dim=256,
    d_ff=2048,
    max_len=32_768,
    norm_eps=1e-6,
    norm_offset=1.0,
    post_norms=True,
    qk_norm=True,
    mlp='geglu',
    rope_theta=1_000_000.0,
    window=512,
    global_every=6,
    embed_scale=640**0.5,
  ),
  'gpt2': ModelConfig(
    vocab_size=50_257,
    d_model=768,
    n_layers=12,
    n_heads=12,
    n_kv_heads=12,
    head_dim=64,
    d_ff=3072,
    max_len=1024,
    norm='layer',
    mlp='gelu',
    bias=True,
    positions='learned',
  ),
}


def presets() -> tuple[str, ...]:
  """All names that `preset` knows."""
  return tuple(_PRESETS)


def preset(name: str, key: str = 'model') -> ModelConfig:
  """The configuration of that name. ConfigError, with the nearest name, if there is none; `key` is what it names."""
  if name not in _PRESETS:
    close = difflib.get_close_matches(name, _PRESETS, 1)
    hint = f'did you mean {close[0]!r}? ' if close else ''
    raise ConfigError(f'{key}={name!r}: unknown preset; {hint}allowed: {", ".join(_PRESETS)}')
  return _PRESETS[name]
