"""On-policy distillation: the student learns on what it writes itself, and a teacher says what it would have said.

    chain(on_policy(config.model, ...), taught_by(...))         transforms=(OnPolicy(), Distill('teacher', ...))

`OnPolicy` stands before the distillation and replaces documents of the batch by the student's own continuations of
their prompts, written with the cache of keys and values in the same compiled step. The loss is that of the transforms
after it:

    reverse_kl, weight 1        KL(q || p) at each position of the student's own text: the single-step term of MiniLLM
                                (arXiv 2306.08543)
    jsd, kl, ...                GKD (arXiv 2306.13649): (1 - l) E_data[D] + l E_{y ~ q}[D], l = fraction
    policy_gradient             the sampled reverse KL, with rewards log p(y) - log q(y) and no discount
    skew_reverse_kl, buffer     DistiLLM (arXiv 2402.03898)

The teacher is listened to at the completion's tokens up to and including <eos>, in documents and rollouts alike. A
rollout is no label: it is not in the cross-entropy of the data, nor is a step's metric 'loss' about it.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from slm_jax.conditions import Needs
from slm_jax.config import require, setting
from slm_jax.distill import rollouts
from slm_jax.distill.logits import Distill, SelfDistill, TokenLoss
from slm_jax.losses import Term
from slm_jax.model.config import ModelConfig
from slm_jax.model.flops import flops_per_token
from slm_jax.step import Resources, Transform, TransformConfig


@dataclasses.dataclass(frozen=True)
class OnPolicy(TransformConfig):
  """Let the student write part of what it learns on. Goes before `Distill`; needs data with prompts.

  With a buffer, a step takes its rollouts from earlier ones with probability `replay`, and then writes none, which is
  what saves time (but not where arms run side by side on an accelerator: there both are computed). Such rollouts are of
  a student some steps old: the mean over them is that of another distribution, the more so the longer the buffer.
  """

  kind: ClassVar[str] = 'on_policy'
  before: ClassVar[tuple[str, ...]] = ('distill', 'self_distill', 'features', 'relations')  # they read what it writes
  fraction: float = setting(1.0, '[0, 1]', traced=True)  # of rows that the student writes; each is chosen independently
  temperature: float = setting(1.0, '[0, inf)', traced=True)  # of its draws; 0: greedy
  # Tokens that it writes; a prompt that leaves less room in a sequence stays with its document.
  max_new: int = setting(64, '[1, 2^31)')
  buffer: int = setting(0, '[0, 2^20]')  # rollouts that are kept for later steps, the newest
  replay: float = setting(0.5, '[0, 1]', traced=True)  # with a buffer: probability that a step writes none and reads it
  cold_start: bool = False  # start without a trained model (`init.arm`), whose rollouts are noise

  needs: ClassVar[Needs] = {'replay': (lambda its: its.buffer, 'a buffer')}

  def check_in(self, config: Any, key: str) -> None:
    data = config.data
    require(data.packing == 'single', f'{key}: needs data.packing=single, one document a sequence; got {data.packing}')
    require(bool(data.prompt_end), f"{key}: needs data.prompt_end, after which the student writes; got ''")
    require(
      self.max_new < data.seq_len,
      f'{key}.max_new={self.max_new}: leaves no room for a prompt in data.seq_len={data.seq_len}',
    )
    require(
      bool(config.init.arm) or self.cold_start,
      f"{key}: what an untrained student writes is noise; name a trained arm in init.arm (now ''), or set cold_start",
    )
    losses = [t for t in config.transforms if isinstance(t, TokenLoss)]
    require(bool(losses), f'{key}: nobody judges what the student writes; add a transform that does, such as distill')
    for loss in losses:
      require(
        isinstance(loss, (Distill, SelfDistill)),
        f'{key}: {loss.kind} holds what a teacher said of documents, and nothing of rollouts; allowed: distill',
      )
      if loss.divergence == 'policy_gradient':
        need = 'policy_gradient needs the draws of the present student at temperature 1'
        require(self.buffer == 0, f'{key}.buffer={self.buffer}: {need}; allowed: 0')
        require(self.temperature == 1, f'{key}.temperature={self.temperature}: {need}')

  def build(self, resources: Resources) -> tuple[Transform, dict[str, Any]]:
    config = resources.model.config
    numbers = {f'{self.kind}.{name}': getattr(self, name) for name in ('fraction', 'temperature', 'replay')}
    transform = on_policy(
      config,
      numbers,
      max_new=self.max_new,
      t=resources.seq_len,
      vocab=resources.vocab,
      eos=resources.eos,
      pad=resources.pad,
      buffer=self.buffer,
    )
    return transform._replace(flops=self.count_flops(config, resources.seq_len, {})), {}

  def count_flops(self, model: ModelConfig, seq_len: int, others: Mapping[str, ModelConfig]) -> dict[str, float]:
    return {self.kind: flops_per_token(model, seq_len, backward=False)}


def on_policy(
  config: ModelConfig,
  numbers: dict[str, float],
  *,
  max_new: int,
  t: int,
  vocab: int | None = None,
  eos: int,
  pad: int,
  buffer: int = 0,
  name: str = 'on_policy',
) -> Transform:
  """Replaces rows of the batch by rollouts; see the module, and `OnPolicy` for what the settings mean.

  numbers: fraction, temperature, replay, each with `name.` before it; all are traced. t: predictions of a sequence.

  New entries of the batch: 'taught' [B, T], where a teacher is listened to; 'rollout' [B, T], what the student wrote;
  `name`_fresh [B], 1 where it did so in this step. Logs `name`_share, of rows that are rollouts; `name`_length, of
  their completions in tokens; `name`_unfinished, the share of rollouts that reach max_new tokens without an end; with a
  buffer `name`_fresh, of rows that were written in this step.
  """

  def init(key, params):
    return rollouts.none(buffer, t) if buffer else ()

  def data(slot, params, batch, context):
    n = batch['mask'].shape[0]
    of_rows, of_step, of_tokens, of_buffer = jax.random.split(
      jax.random.fold_in(context.key, zlib.crc32(name.encode())), 4
    )
    chosen = jax.random.uniform(of_rows, (n,)) < context.hparams[f'{name}.fraction']
    prompts = rollouts.of_mask(batch, batch['mask'])
    temperature = context.hparams[f'{name}.temperature']

    def write():
      # If none is to be written, no time is spent, unless arms run side by side.
      new = lambda: rollouts.written(  # noqa: E731
        config, params, prompts, of_tokens, max_new=max_new, temperature=temperature, vocab=vocab, eos=eos, pad=pad
      )
      return jax.lax.cond(chosen.any(), new, lambda: rollouts.none(n, t))

    replayed = jnp.bool_(False)
    if buffer:
      replay = jax.random.uniform(of_step) < context.hparams[f'{name}.replay']
      replayed = replay & rollouts.there(slot).any()
      rows = jax.lax.cond(replayed, lambda: rollouts.drawn(slot, n, of_buffer), write)
    else:
      rows = write()
    chosen &= rollouts.there(rows)
    own = jax.lax.stop_gradient(rollouts.entries(rows))
    new = {k: jnp.where(chosen[:, None], own[k], batch[k]) for k in ('inputs', 'targets', 'segments')}
    rollout = own['mask'] * chosen[:, None]
    label = jnp.where(chosen[:, None], 0.0, batch['mask'])
    fresh = (chosen & ~replayed).astype(jnp.float32)
    return {**batch, **new, 'mask': label, 'taught': label + rollout, 'rollout': rollout, f'{name}_fresh': fresh}

  def loss(slot, fn):
    def with_counts(params, hidden, batch, context):
      rows, length = batch['rollout'].any(axis=1).astype(jnp.float32), batch['rollout'].sum()
      n = jnp.float32(rows.size)
      fresh = {f'{name}_fresh': Term(batch[f'{name}_fresh'].sum(), n, 0.0)} if buffer else {}
      ended = ((batch['targets'] == eos) & (batch['rollout'] > 0)).any(axis=1)
      counts = {
        f'{name}_share': Term(rows.sum(), n, 0.0),
        f'{name}_length': Term(length, rows.sum(), 0.0),
        f'{name}_unfinished': Term((rows * ~ended).sum(), rows.sum(), 0.0),
      }
      return {**fn(params, hidden, batch, context), **counts, **fresh}

    return with_counts

  def after(slot, state, update):
    if buffer:
      batch = update.batch
      slot = rollouts.newest(slot, rollouts.of_mask(batch, batch['rollout'] * batch[f'{name}_fresh'][:, None]))
    return slot, state

  hparams = {f'{name}.fraction': 1.0, f'{name}.temperature': 1.0, f'{name}.replay': 0.5, **numbers}
  return Transform(name, hparams, init=init, data=data, loss=loss, after=after)
