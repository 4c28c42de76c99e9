"""Decoding with a cache of keys and values: prefill, then one token a step, all under jit.

    tokens = jax.jit(generate, static_argnums=0, static_argnames=('max_new', 'eos', 'pad'))(
        config, params, prompt_BT, lengths_B, key, max_new=64, temperature=0.8, top_p=0.95, eos=2)

Prompts of different lengths are shifted so that all of them end in the same slot: every step then writes one slot of
the cache, and what stands before a row's first token is never seen (attention.py).
"""

import jax
import jax.numpy as jnp

from slm_jax.config import require
from slm_jax.model.api import Params
from slm_jax.model.attention import Cache
from slm_jax.model.config import ModelConfig
from slm_jax.model.decoder import apply


def init_cache(config: ModelConfig, start_B: jax.Array, slots: int) -> Cache:
  """An empty cache with room for `slots` tokens a row, of which the first `start_B` will be padding."""
  shape = (config.n_layers, start_B.shape[0], slots, config.n_kv_heads, config.head_dim)
  return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype), start_B, jnp.int32(0))


def extend(config: ModelConfig, params: Params, cache: Cache, tokens_BT: jax.Array) -> tuple[jax.Array, Cache]:
  """Final-normed x_BTD of T more tokens, and the cache with them. The caller sees to it that they fit."""
  return apply(config, params, tokens_BT, cache.start_B[:, None], cache, method='run')[:2]


def logits(config: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
  """x_...D -> float32 logits_...V."""
  return apply(config, params, x, method='head')


def align_right(prompt_BT: jax.Array, lengths_B: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Rows padded on the right -> rows that end in the last slot, and the slot where each starts."""
  t = prompt_BT.shape[1]
  start_B = t - lengths_B
  source_BT = (jnp.arange(t)[None] - start_B[:, None]) % t
  return jnp.take_along_axis(prompt_BT, source_BT, axis=1), start_B


def restrict(logits_BV: jax.Array, top_k: jax.Array | int | None, top_p: jax.Array | float | None) -> jax.Array:
  """-inf for all but the top_k largest and, of what is left, the smallest set whose probability reaches top_p.

  None: no restriction. Tokens equal to the last one kept are kept as well; the most likely token always is.
  Top-p (nucleus) sampling: arXiv 1904.09751.
  """
  if top_k is None and top_p is None:
    return logits_BV
  sorted_BV = -jnp.sort(-logits_BV, axis=-1)
  rank_BV = jnp.arange(logits_BV.shape[-1])[None]
  if top_k is not None:
    sorted_BV = jnp.where(rank_BV < jnp.maximum(top_k, 1), sorted_BV, -jnp.inf)
  if top_p is not None:
    probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV  # probability of the tokens that are more likely
    sorted_BV = jnp.where((before_BV < top_p) | (rank_BV == 0), sorted_BV, -jnp.inf)
  last_kept_B = jnp.min(sorted_BV, axis=-1, where=sorted_BV > -jnp.inf, initial=jnp.inf)
  return jnp.where(logits_BV >= last_kept_B[:, None], logits_BV, -jnp.inf)


def sample(
  logits_BV: jax.Array,
  key: jax.Array,
  temperature: jax.Array | float,
  top_k: jax.Array | int | None,
  top_p: jax.Array | float | None,
) -> jax.Array:
  """One token a row, int32 [B]: from softmax(logits / temperature), restricted; at temperature 0 the most likely."""
  scaled_BV = logits_BV / jnp.where(temperature > 0, temperature, 1.0)
  drawn_B = jax.random.categorical(key, restrict(scaled_BV, top_k, top_p), axis=-1)
  return jnp.where(temperature > 0, drawn_B, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)


def generate(
  config: ModelConfig,
  params: Params,
  prompt_BT: jax.Array,
  lengths_B: jax.Array,
  key: jax.Array,
  *,
  max_new: int,
  temperature: jax.Array | float = 1.0,
  top_k: jax.Array | int | None = None,
  top_p: jax.Array | float | None = None,
  vocab: int | None = None,
  eos: int | None = None,
  pad: int = 0,
) -> jax.Array:
  """Continues each prompt by `max_new` tokens: int32 [B, max_new], the new tokens only.

  prompt_BT: padded on the right; lengths_B: tokens of each row, at least 1. temperature (0: greedy), top_k and top_p
  may be traced. vocab: only the first so many tokens are drawn; what a model has beyond is padding. After `eos`, which
  is returned, a row goes on with `pad`. ConfigError if T + max_new positions are more than the model has.
  """
  b, t = prompt_BT.shape
  require(
    max_new > 0 and t + max_new <= config.max_len,
    f'max_new={max_new}: must be positive, and with the prompt of {t} at most model.max_len={config.max_len}',
  )
  tokens_BT, start_B = align_right(prompt_BT, lengths_B)

  def draw(x_BD, done_B, key):
    token_B = jnp.where(done_B, pad, sample(logits(config, params, x_BD)[:, :vocab], key, temperature, top_k, top_p))
    return token_B, done_B if eos is None else done_B | (token_B == eos)

  def step(carry, key):
    cache, token_B, done_B = carry
    x_BTD, cache = extend(config, params, cache, token_B[:, None])
    token_B, done_B = draw(x_BTD[:, 0], done_B, key)
    return (cache, token_B, done_B), token_B

  keys = jax.random.split(key, max_new)
  cache = init_cache(config, start_B, t + max_new - 1)  # the last token is not fed back
  x_BTD, cache = extend(config, params, cache, tokens_BT)
  first_B, done_B = draw(x_BTD[:, -1], jnp.zeros(b, bool), keys[0])
  _, rest_TB = jax.lax.scan(step, (cache, first_B, done_B), keys[1:])
  return jnp.concatenate([first_B[None], rest_TB]).T
