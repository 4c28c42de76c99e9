"""Distillation by the distribution of the next token: signal x teacher x loss, as one transform.

    taught_by(dense(online(model)), dense_loss(jsd), {'distill.weight': 0.5, 'distill.temperature': 1.0})
    distill(model, weight=0.5, temperature=1.0)       # the plain case: all of the distribution, forward KL

The configurations below say which: `Distill` learns from other arms, `SelfDistill` from the student's own average,
`CachedDistill` (cached.py) from what a teacher said earlier. They share what a `TokenLoss` is.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from slm_jax import vocabulary
from slm_jax.conditions import Needs
from slm_jax.config import require, setting
from slm_jax.distill import signals, teachers
from slm_jax.distill.divergences import DIVERGENCES, LOWEST, kl, reverse_kl
from slm_jax.distill.judge import judge
from slm_jax.distill.signals import Dense, SignalLoss, Tail
from slm_jax.distill.teachers import Average, Precision, Source
from slm_jax.losses import Auxiliary, Term
from slm_jax.model.api import Model
from slm_jax.model.config import ModelConfig
from slm_jax.model.decoder import in_blocks
from slm_jax.model.flops import flops_per_token
from slm_jax.step import Resources, Transform, TransformConfig
from slm_jax.vocabulary import Logits

MIXED = ('jsd', 'normalized_jsd', 'skew_kl', 'skew_reverse_kl', 'taid')  # divergences that read `mix`
STAYS = -1.0  # as the value of a number at the end: the same as at the start

Signal = Literal['dense', 'top_k', 'sampled']

SPARSE: Needs = {  # the settings of sparse signals
  **dict.fromkeys(('k', 'tail'), (lambda its: its.signal == 'top_k', 'signal=top_k')),
  'draws': (lambda its: its.signal == 'sampled', 'signal=sampled'),
}


# ------------------------------------------------------------------------------------------------------- configuration


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLoss(TransformConfig):
  """(1 - w) CE(y, q) + w D(p, q): what all distillation by the next token's distribution has."""

  divergence: Literal[
    'kl',
    'reverse_kl',
    'jsd',
    'normalized_jsd',
    'skew_kl',
    'skew_reverse_kl',
    'total_variation',
    'mse',
    'taid',
    'policy_gradient',
  ] = 'kl'
  weight: float = setting(0.5, '[0, 1]', traced=True)  # w of the teacher's term; the data's has 1 - w
  temperature: float = setting(1.0, '(0, inf)', traced=True)
  weight_end: float = setting(STAYS, '[0, 1] or -1', traced=True)  # at the last step, reached linearly; -1: stays
  temperature_end: float = setting(STAYS, '(0, inf) or -1', traced=True)
  # b of the JSDs, a of the skew KLs (0.1 in DistiLLM), t of TAID at the start (0.4 there)
  mix: float = setting(0.5, '[0, 1]', traced=True)

  needs: ClassVar[Needs] = {'mix': (lambda its: its.divergence in MIXED, f'divergence={", ".join(MIXED)}')}

  def check(self, key: str) -> None:
    fixed = self.divergence == 'policy_gradient' and self.tempered
    require(not fixed, f'{key}.temperature={self.temperature}: policy_gradient is at temperature 1 only')

  def check_in(self, config: Any, key: str) -> None:
    writes = any(t.kind == 'on_policy' for t in config.transforms)
    require(
      writes or self.divergence != 'policy_gradient',
      f'{key}.divergence=policy_gradient: needs the draws of the student; add on_policy to transforms',
    )

  @property
  def tempered(self) -> bool:
    return self.temperature != 1 or self.temperature_end not in (1, STAYS)

  def transform(
    self, source: Source, loss: SignalLoss, teacher: teachers.Teacher | None, resources: Resources
  ) -> Transform:
    """teacher: that of the source, if it can be asked about a finished student."""
    numbers = {
      f'{self.kind}.{f.name}': getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata.get('traced')
    }
    made = taught_by(
      source,
      loss,
      numbers,
      name=self.kind,
      vocab=resources.vocab,
      steps=resources.steps,
      moving=self.divergence == 'taid',
      drawn=self.divergence == 'policy_gradient',
    )
    if teacher is None:
      return made
    by_teacher = judge(resources.model, teacher, resources)
    return made._replace(judge=lambda slot, *given: by_teacher(slot['source'], *given))

  def dense_loss(self) -> SignalLoss:
    if self.divergence == 'policy_gradient':
      return signals.policy_gradient()
    return signals.dense_loss(DIVERGENCES['kl' if self.divergence == 'taid' else self.divergence])


@dataclasses.dataclass(frozen=True)
class Distill(TokenLoss):
  """Learn from other arms' trained models as well as from the data."""

  kind: ClassVar[str] = 'distill'
  holds_teacher: ClassVar[bool] = True  # in memory, as `frozen`
  teacher: str = setting('', arm=True)  # name of the arm
  co_teachers: tuple[str, ...] = setting((), arm=True)  # further arms, whose predictions are averaged with its
  shares: tuple[float, ...] = setting((), '(0, inf)')  # of the teacher and each co-teacher; none: equal
  average: Average = 'probabilities'  # or of 'logits'
  precision: Precision = 'own'  # of the teachers' parameters in memory
  signal: Signal = 'dense'
  k: int = setting(64, '[1, 2^31)')  # of top_k
  tail: Tail = 'bucket'  # of top_k
  draws: int = setting(50, '[1, 255]')  # of sampled

  needs: ClassVar[Needs] = {
    **TokenLoss.needs,
    **SPARSE,
    **dict.fromkeys(('shares', 'average'), (lambda its: its.co_teachers, 'co_teachers')),
  }

  def check(self, key: str) -> None:
    super().check(key)
    require(bool(self.teacher), f'{key}.teacher={self.teacher!r}: name the arm to learn from')
    n = 1 + len(self.co_teachers)
    require(len(self.shares) in (0, n), f'{key}.shares={self.shares}: expected {n}, one for each teacher, or none')
    check_signal(self, key)

  def check_in(self, config: Any, key: str) -> None:
    super().check_in(config, key)
    check_k(self, config, key)
    teachers.check_precision(self, config, key)

  def build(self, resources: Resources) -> tuple[Transform, dict[str, Any]]:
    most = resources.vocab  # fewer than model.vocab_size, where that is padded
    require(self.signal != 'top_k' or self.k <= most, f'transforms.distill.k={self.k}: the tokenizer has {most} tokens')
    parts, frozen, models = [], {}, {}
    for arm in (self.teacher, *self.co_teachers):
      model, params = resources.load(arm)
      name = f'teacher_{arm}'
      frozen[name] = teachers.stored(params, self.precision)
      parts.append(teachers.online(in_blocks(model, resources.vocab_chunk), name, resources.vocab))
      models[arm] = model.config
    shares = self.shares or (1.0,) * len(parts)
    teacher = parts[0] if len(parts) == 1 else teachers.average_of(parts, shares, self.average)
    source, loss = self.source(teacher)
    flops = self.count_flops(resources.model.config, resources.seq_len, models)
    return self.transform(source, loss, teacher, resources)._replace(flops=flops), frozen

  def count_flops(self, model: ModelConfig, seq_len: int, others: Mapping[str, ModelConfig]) -> dict[str, float]:
    arms = (self.teacher, *self.co_teachers)
    return {arm: flops_per_token(others[arm], seq_len, backward=False) for arm in arms}

  def source(self, teacher: teachers.Teacher) -> tuple[Source, SignalLoss]:
    if self.signal == 'top_k':
      return teachers.largest(teacher, self.k), signals.top_k_loss(self.tail)
    if self.signal == 'sampled':
      return teachers.drawn(teacher, self.draws, self.kind), signals.sampled_loss()
    return teachers.dense(teacher), self.dense_loss()


@dataclasses.dataclass(frozen=True)
class SelfDistill(TokenLoss):
  """Learn from one's own moving average. From an own earlier arm: `Distill`, and `init.arm`."""

  kind: ClassVar[str] = 'self_distill'
  decay: float = setting(0.99, '[0, 1)', traced=True)

  def check_in(self, config: Any, key: str) -> None:
    super().check_in(config, key)
    for other in config.transforms:
      latent = other.kind == 'l0' or getattr(other, 'method', '') == 'ste'
      what = f'its teacher is the average of the weights, which are no model without the masks or gates of {other.kind}'
      require(not latent, f'{key}: {what}; use one of the two')

  def build(self, resources: Resources) -> tuple[Transform, dict[str, Any]]:
    own = teachers.own_average(in_blocks(resources.model, resources.vocab_chunk), self.kind, resources.vocab)
    flops = self.count_flops(resources.model.config, resources.seq_len, {})
    return self.transform(teachers.dense(own), self.dense_loss(), own, resources)._replace(flops=flops), {}

  def count_flops(self, model: ModelConfig, seq_len: int, others: Mapping[str, ModelConfig]) -> dict[str, float]:
    return {self.kind: flops_per_token(model, seq_len, backward=False)}


def check_signal(spec: Any, key: str) -> None:
  """What a sparse signal cannot do."""
  if spec.signal != 'dense':
    known = spec.divergence == 'kl'
    require(known, f'{key}.divergence={spec.divergence}: needs the whole distribution; {spec.signal} allows: kl')
  untempered = spec.signal == 'sampled' or (spec.signal == 'top_k' and spec.tail in ('none', 'renormalize_teacher'))
  if untempered:
    what = 'sampled' if spec.signal == 'sampled' else f'tail={spec.tail}'
    require(not spec.tempered, f'{key}.temperature={spec.temperature}: {what} is at temperature 1 only')


def check_k(spec: Any, config: Any, key: str) -> None:
  vocab = config.model.vocab_size
  require(spec.signal != 'top_k' or spec.k <= vocab, f'{key}.k={spec.k}: larger than model.vocab_size={vocab}')


# ------------------------------------------------------------------------------------------------------- the transform


class Moving(NamedTuple):
  """What TAID remembers: how far the target has moved from the student to the teacher, and how the loss does."""

  t: jax.Array
  before: jax.Array  # the loss of the step before; 0 at the start
  momentum: jax.Array  # of its relative decrease


def distill(teacher: Model, weight: float, temperature: float) -> Transform:
  """(1 - w) CE(y, q) + w T^2 KL(p_T || q_T), p_T = softmax(z / T) (Hinton et al., arXiv 1503.02531).

  `frozen['teacher']` holds the teacher's parameters.
  """
  source = teachers.dense(teachers.online(teacher))
  numbers = {'distill.weight': weight, 'distill.temperature': temperature}
  return taught_by(source, signals.dense_loss(kl), numbers)


def taught_by(
  source: Source,
  loss: SignalLoss,
  numbers: dict[str, float],
  *,
  name: str = 'distill',
  vocab: int | None = None,
  steps: int = 1,
  moving: bool = False,
  drawn: bool = False,
) -> Transform:
  """(1 - w) CE(y, q) + w D(p, q) over the tokens of the batch's mask, or of its entry 'taught' where there is one.

  1 - w is the factor of all terms of the data (`Transform.data_weight`), CE being the one that is always there.

  numbers: weight, temperature, mix, weight_end, temperature_end, each with `name.` before it; all are traced.
  vocab: the student's logits beyond so many tokens are padding, and not in D.
  steps: in the last of which the schedules are at their ends.
  moving: the target is p_t = softmax((1 - t) z_student + t z_teacher), a constant to the gradient, whose t goes from
    mix to 1 (TAID, arXiv 2501.16937): t <- max(linear in the step, t + 5e-4 sigmoid(m) (1 - t)), m <- 0.99 m + 0.01
    times the relative decrease of the term.
  drawn: only tokens that the student wrote are counted, the batch's entry 'rollout'.

  The teacher's `data` runs once a batch, outside of the gradient; its distribution exists only for the chunk of tokens
  whose student logits exist too, so full logits of neither are ever held. Logs `name`, the term; `name_kl` and
  `name_entropy` at temperature 1, where the signal tells (signals.logged); `name_reverse_kl` of what the student wrote.
  """
  hparams = {f'{name}.weight_end': STAYS, f'{name}.temperature_end': STAYS, f'{name}.mix': 0.5, **numbers}

  def init(key, params):
    slot = {'source': source.init(params)}
    if moving:
      slot['moving'] = Moving(*jnp.zeros(3, jnp.float32))
    return slot

  def data(slot, params, batch, context):
    return {**batch, **jax.lax.stop_gradient(source.data(slot['source'], batch, context))}

  def now(context, number):
    start, end = context.hparams[f'{name}.{number}'], context.hparams[f'{name}.{number}_end']
    done = jnp.minimum(context.step / max(steps - 1, 1), 1.0)
    return jnp.where(end == STAYS, start, start + (end - start) * done)

  def token_loss(slot, fn):
    def with_teacher(logits, tokens, context):
      terms = fn(logits, tokens, context)
      student = vocabulary.first(logits, vocab)
      signal = told = vocabulary.constant(source.signal(slot['source'], tokens, context))
      if moving:
        t = jnp.maximum(slot['moving'].t, context.hparams[f'{name}.mix'])
        signal = Dense(_between(student, told.logits, t))  # always dense here
      nats = loss(signal, student, tokens, now(context, 'temperature'), context.hparams[f'{name}.mix'])
      mask = tokens['rollout'] if drawn else tokens.get('taught', tokens['mask'])
      plain = signals.logged(told, vocabulary.constant(student))
      if isinstance(told, Dense) and 'rollout' in tokens:
        back = reverse_kl(told.logits, vocabulary.constant(student)) * tokens['rollout']
        terms[f'{name}_reverse_kl'] = Term(back.sum(), tokens['rollout'].sum(), 0.0)
      return {
        **terms,
        name: Auxiliary((nats * mask).sum(), mask.sum(), now(context, 'weight')),
        **{f'{name}_{what}': Term((value * mask).sum(), mask.sum(), 0.0) for what, value in plain.items()},
      }

    return with_teacher

  def data_weight(context):
    return 1 - now(context, 'weight')

  def after(slot, state, update):
    new = {'source': source.after(slot['source'], state, update)}
    if moving:
      term, start = update.terms[name], update.context.hparams[f'{name}.mix']
      done = state.step / max(steps - 1, 1)  # in the next step, so that the last one has the teacher for its target
      new['moving'] = _moved(slot['moving'], term.sum / jnp.maximum(term.count, 1), start, done)
    return new, state

  return Transform(name, hparams, init=init, data=data, token_loss=token_loss, data_weight=data_weight, after=after)


def _between(student: Logits, teacher: Logits, t: jax.Array) -> Logits:
  def mixed(z_s, z_t):
    return (1 - t) * jnp.maximum(z_s, LOWEST) + t * jnp.maximum(z_t, LOWEST)

  return vocabulary.each(mixed, vocabulary.constant(student), teacher)


def _moved(moving: Moving, loss: jax.Array, start: jax.Array, done: jax.Array) -> Moving:
  fall = jnp.where(moving.before > 0, (moving.before - loss) / jnp.maximum(moving.before, 1e-15), 0.0)
  momentum = 0.99 * moving.momentum + 0.01 * fall
  step = 5e-4 * jax.nn.sigmoid(momentum) * (1 - moving.t)
  t = jnp.maximum(start + (1 - start) * done, moving.t + step)
  return Moving(jnp.minimum(t, 1.0), loss, momentum)
