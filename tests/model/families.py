"""Small models of every family, with all that makes one differ from the others, for the tests of this folder."""

import functools

import jax
import numpy as np

from slm_jax.model.config import ModelConfig
from slm_jax.model.decoder import Decoder, shapes

B, T = 6, 24  # one shape for most tests, so that most share their compilations
SMALL = dict(vocab_size=61, d_model=24, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40, max_len=64, unroll=1)

FAMILIES = {
  'llama': ModelConfig(**SMALL, rope_scaling=(4.0, 1.0, 4.0, 16.0)),
  'qwen3': ModelConfig(**{**SMALL, 'n_heads': 6, 'head_dim': 10}, qk_norm=True, tied=False),
  'gemma3': ModelConfig(
    **SMALL,
    norm_offset=1.0,
    post_norms=True,
    qk_norm=True,
    mlp='geglu',
    rope_theta=1e6,
    window=5,
    global_every=3,
    attn_scale=0.3,
    embed_scale=24**0.5,
    softcap=15.0,
  ),
  'gpt2': ModelConfig(
    **{**SMALL, 'n_kv_heads': 4}, norm='layer', mlp='gelu', bias=True, positions='learned', attn_scale=1.0
  ),
}


def params_of(config: ModelConfig, seed: int = 0):
  """Random parameters, norms and biases too, so that nothing is an identity; numpy, so that nothing is compiled."""
  rng = np.random.default_rng(seed)

  def draw(path, s):
    mean = 1 - config.norm_offset if path[-1].key.endswith('norm') else 0
    return (mean + 0.2 * rng.normal(size=s.shape)).astype(s.dtype)

  return jax.tree.map_with_path(draw, shapes(config))


@functools.cache
def setup(family: str):
  """(params, jitted logits(params, tokens, segments)) of a family, compiled once for all tests."""
  config = FAMILIES[family]
  return params_of(config), jax.jit(lambda p, tokens, segments: Decoder(config).apply({'params': p}, tokens, segments))
