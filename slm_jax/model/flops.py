"""Parameters and floating-point operations of a model, from its configuration alone; nothing is allocated."""

import math

import jax

from slm_jax.model.config import ModelConfig
from slm_jax.model.decoder import shapes


def parameter_count(config: ModelConfig, embeddings: bool = True) -> int:
  """All parameters; without embeddings (token and position tables, an untied head) as in scaling laws (2001.08361)."""
  tree = shapes(config)
  return sum(
    math.prod(leaf.shape)
    for path, leaf in jax.tree.leaves_with_path(tree)
    if embeddings or path[0].key not in ('embed', 'head')
  )


def flops_per_token(config: ModelConfig, seq_len: int, backward: bool = True) -> float:
  """Matrix-product FLOPs a token, averaged over one document of `seq_len` tokens:

      forward = 2 * (layer matrices + D*V) + 4 * H * K * sum over layers of the mean number of keys seen
      keys seen by the token in slot t = t + 1, or min(t + 1, window) in a local layer

  and three times that with the backward pass. So the head is counted once whether tied or not, the embedding lookup is
  not, and causal attention costs half of the T x T square, although a plain implementation computes all of it: MFU
  should not reward wasted work. Nor is recomputation counted (remat, chunked loss), for the same reason. The norms,
  softmax, RoPE and activations, together a few per cent, are left out. A training step takes this for every slot of its
  batch, and MFU is made of that: prompts and padding are computed as tokens are, though nothing is predicted there.
  """
  c, layers = config, shapes(config)['layers']
  matrices = sum(math.prod(layers[name].shape) for name in ('q', 'k', 'v', 'o', 'gate', 'up', 'down') if name in layers)
  forward = 2 * (matrices + c.d_model * c.vocab_size) + 4 * c.n_heads * c.head_dim * attended_keys(c, seq_len)
  return (3 if backward else 1) * forward


def attended_keys(config: ModelConfig, seq_len: int) -> float:
  """The keys that a token attends to on average, summed over the layers."""
  n_local = config.n_layers - config.n_layers // config.global_every if config.window else 0
  w = min(config.window, seq_len)
  keys_global = (seq_len + 1) / 2
  keys_local = (w * (w + 1) / 2 + (seq_len - w) * w) / seq_len
  return (config.n_layers - n_local) * keys_global + n_local * keys_local
