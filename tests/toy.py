"""The smallest model that has everything a step needs: embedding, one stacked 'layer', head. For laws about steps."""

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.model.api import Model
from slm_jax.model.config import ModelConfig


def toy_model(vocab: int = 11, width: int = 8, layers: int = 2) -> Model:
  config = ModelConfig(
    vocab_size=vocab, d_model=width, n_layers=layers, d_ff=width, head_dim=4, n_heads=2, n_kv_heads=2
  )

  def init(key):
    a, b, c = jax.random.split(key, 3)
    return {
      'embed': {'tokens': jax.random.normal(a, (vocab, width))},
      'layers': {'up': jax.random.normal(b, (layers, width, width)) * 0.3},
      'head': jax.random.normal(c, (width, vocab)) * 0.3,
    }

  def hidden(params, batch):
    x = params['embed']['tokens'][batch['inputs']]
    for w in params['layers']['up']:
      x = x + jnp.tanh(x @ w)
    return x

  def head(params, x):
    return x @ params['head']

  def features(params, batch, wanted):
    """Hidden states; q, k and v are slices of them, so that one toy has all kinds."""
    stream = [params['embed']['tokens'][batch['inputs']]]
    for w in params['layers']['up']:
      stream.append(stream[-1] + jnp.tanh(stream[-1] @ w))

    def of(kind, layer):
      x = stream[layer]
      return x if kind == 'hidden' else jnp.roll(x, 'qkv'.index(kind), -1).reshape(*x.shape[:2], -1, config.head_dim)

    return stream[-1], {f: of(*f) for f in wanted}

  return Model(config, init, hidden, head, features)


def toy_batch(seed: int = 0, b: int = 8, t: int = 6, vocab: int = 11):
  """Random tokens with a ragged mask."""
  rng = np.random.default_rng(seed)
  return {
    'inputs': jnp.asarray(rng.integers(0, vocab, (b, t)), jnp.int32),
    'targets': jnp.asarray(rng.integers(0, vocab, (b, t)), jnp.int32),
    'segments': jnp.ones((b, t), jnp.int32),
    'mask': jnp.asarray(rng.random((b, t)) < 0.6, jnp.float32),
  }
