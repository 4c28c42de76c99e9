"""Rollouts: what a student writes after the prompts of a batch, as rows of a batch, and a memory of the newest.

A row of a batch of T predictions has T + 1 tokens: the prompt, the completion up to its <eos>, padding. Of a document
in training the prompt ends where the mask begins (data.prompt_end).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from slm_jax.model.api import Batch, Params
from slm_jax.model.config import ModelConfig
from slm_jax.model.decode import generate


class Rows(NamedTuple):
  """Prompts with their completions. All zero: no row."""

  tokens: jax.Array  # int32 [B, T + 1]
  start: jax.Array  # int32 [B], tokens of the prompt
  end: jax.Array  # int32 [B], tokens up to the completion's last one, which is counted


def none(rows: int, t: int) -> Rows:
  return Rows(jnp.zeros((rows, t + 1), jnp.int32), *jnp.zeros((2, rows), jnp.int32))


def there(rows: Rows) -> jax.Array:
  """bool [B]"""
  return rows.end > 0


def of_mask(batch: Batch, mask_BT: jax.Array) -> Rows:
  """The rows of a batch whose completions are the mask's tokens; no row where it has none."""
  mask = mask_BT > 0
  start = jnp.argmax(mask, axis=1).astype(jnp.int32) + 1
  tokens = jnp.concatenate([batch['inputs'], batch['targets'][:, -1:]], axis=1)
  any_B = mask.any(axis=1)
  rows = Rows(tokens, start, start + mask.sum(axis=1, dtype=jnp.int32))
  return jax.tree.map(lambda x: jnp.where(any_B[:, None] if x.ndim == 2 else any_B, x, 0), rows)


def written(
  config: ModelConfig,
  params: Params,
  prompts: Rows,
  key: jax.Array,
  *,
  max_new: int,
  temperature: jax.Array | float,
  vocab: int | None = None,
  eos: int,
  pad: int,
) -> Rows:
  """The prompts with the model's own completions of at most `max_new` tokens; no row where the prompt leaves less room.

  `vocab`: of the tokens, so many first ones can be drawn. `pad` follows after `eos`.
  """
  t = prompts.tokens.shape[1] - 1
  room = t - max_new  # for the prompt
  lengths = jnp.clip(prompts.start, 1, room)
  new = generate(
    config,
    params,
    prompts.tokens[:, :room],
    lengths,
    key,
    max_new=max_new,
    temperature=temperature,
    vocab=vocab,
    eos=eos,
    pad=pad,
  )
  ended = new == eos
  count = jnp.where(ended.any(axis=1), jnp.argmax(ended, axis=1) + 1, max_new).astype(jnp.int32)
  end = prompts.start + count
  at = jnp.arange(t + 1)[None]
  own = jnp.take_along_axis(new, jnp.clip(at - prompts.start[:, None], 0, max_new - 1), axis=1)
  tokens = jnp.where(at < prompts.start[:, None], prompts.tokens, jnp.where(at < end[:, None], own, pad))
  fits = (prompts.start > 0) & (prompts.start <= room)
  return jax.tree.map(
    lambda x: jnp.where(fits[:, None] if x.ndim == 2 else fits, x, 0), Rows(tokens, prompts.start, end)
  )


def entries(rows: Rows) -> dict[str, jax.Array]:
  """inputs, targets, segments and mask of a batch, [B, T]: the completion is predicted, its <eos> included."""
  at = jnp.arange(rows.tokens.shape[1] - 1)[None]
  return {
    'inputs': rows.tokens[:, :-1],
    'targets': rows.tokens[:, 1:],
    'segments': (at < rows.end[:, None]).astype(jnp.int32),
    'mask': ((at + 1 >= rows.start[:, None]) & (at + 1 < rows.end[:, None])).astype(jnp.float32),
  }


def newest(memory: Rows, rows: Rows) -> Rows:
  """The memory with more rows, of which as many of the latest are kept as it has room for; oldest first."""
  both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), memory, rows)
  order = jnp.argsort(there(both), stable=True)[-len(memory.end) :]
  return jax.tree.map(lambda x: x[order], both)


def drawn(memory: Rows, n: int, key: jax.Array) -> Rows:
  """n rows of a memory that has some, independently and all equally likely."""
  size = there(memory).sum()  # they stand at its end
  back = jnp.floor(jax.random.uniform(key, (n,)) * size).astype(jnp.int32)
  return jax.tree.map(lambda x: x[len(memory.end) - 1 - back], memory)
