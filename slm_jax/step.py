"""The heart: a training step is a value, and a feature is a function on it.

    step = make_step(model, optimizer, chain(distill(...), prune(...), ema(...)))
    state, metrics = jax.jit(step, donate_argnums=0)(state, batch, frozen)

A `Transform` is to a training step what `optax.GradientTransformation` is to a gradient: a few pure functions and the
slot they remember. Distillation, pruning, EMA, LoRA, quantisation are values of this one type; `chain` composes them;
neither this file nor train.py knows any of them by name.

Laws (tests/test_step.py): `chain()` compiles to the same program as no transform; `chain` is associative; slots are
part of the state and are checkpointed; `frozen` (a teacher's parameters, say) is an argument and is not.

Numbers that an ablation varies (learning rate, KD weight, sparsity) are traced: they live in `state.hparams`, so that
arms which differ only there share one executable and can be trained by `jax.vmap(step)`.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from slm_jax import losses
from slm_jax.config import ConfigError
from slm_jax.losses import Terms
from slm_jax.model.api import Batch, Feature, Model, Params
from slm_jax.model.config import ModelConfig
from slm_jax.optim import Optimizer
from slm_jax.vocabulary import Logits

Slot = Any  # what one transform remembers; () if nothing
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
  """Everything that a step changes, and everything that a checkpoint holds."""

  step: jax.Array  # int32; stays unmapped when arms are vmapped, so that lax.cond on it stays a branch
  key: jax.Array
  params: Params
  opt_state: Any
  slots: dict[str, Slot]  # by name of the transform
  hparams: dict[str, jax.Array]  # traced float32 scalars


class Context(NamedTuple):
  """What every hook may read."""

  step: jax.Array
  key: jax.Array  # a fresh key for this step
  hparams: Mapping[str, jax.Array]
  frozen: Mapping[str, Any]
  features: Mapping[Feature, jax.Array] = {}  # in `loss` only: what transforms want of the model's forward pass


class Update(NamedTuple):
  """What `after` hooks are told about the step that was just taken."""

  grads: Params  # of the objective, before any `gradients` hook
  terms: Terms
  batch: Batch
  context: Context
  before: Params  # as they were before the step


LossFn = Callable[[Params, jax.Array, Batch, Context], Terms]  # (viewed params, hidden_BTD, batch, context)
TokenLossFn = Callable[[Logits, Batch, Context], Terms]  # (float32 logits of some tokens, their batch entries, context)


class Transform(NamedTuple):
  """Hooks around a training step; each defaults to the identity. A chain runs them from left to right.

  init:       (key, params) -> slot
  extra:      (key, params) -> params                   more that is trained, kept as params[name]; evaluation and
                                                        export do not see it
  data:       (slot, params, batch, context) -> batch   before the gradient: teacher signals, rollouts, token weights;
                                                        params as the forward pass sees them
  view:       (slot, params, context) -> params         what the forward pass sees: masked, quantised, LoRA-merged
  token_loss: (slot, token_loss_fn) -> token_loss_fn    terms made of a chunk's logits; all share one pass over the head
  loss:       (slot, loss_fn) -> loss_fn                any other term: of parameters, masks, hidden states
  data_weight: (context) -> factor                      of the weights of the data's terms: 1 - w of a teacher with w
  gradients:  (slot, grads, context) -> grads           what the optimiser sees of them
  after:      (slot, state, update) -> (slot, state)    after the optimiser: refresh masks, EMA, re-project
  instead:    (slot, params) -> params                  evaluated and exported in place of the trained ones: an average
  final:      (slot, params) -> params                  what evaluation and export see of those: masked, gated; after
                                                        the `instead` of all, so either order saves a masked average
  judge:      (slot, params, batch, context) -> Terms   more that a finished model is measured by, on held-out text;
                                                        context.step counts its batches
  witnesses:  () -> entries of frozen                   that only `judge` needs

  The data's terms are all that `token_loss` hooks make, but for those of the class losses.Auxiliary: a teacher's, and
  penalties. The step multiplies their weights by the product of all factors, after all `token_loss` hooks, so that no
  order of transforms spares one of them.
  """

  name: str
  hparams: Mapping[str, float] = {}  # traced numbers the hooks read, by full name: {'ema.decay': 0.999}
  init: Callable[[jax.Array, Params], Slot] = lambda key, params: ()
  extra: Callable[[jax.Array, Params], Params] = lambda key, params: {}
  data: Callable[[Slot, Params, Batch, Context], Batch] = lambda slot, params, batch, context: batch
  view: Callable[[Slot, Params, Context], Params] = lambda slot, params, context: params
  token_loss: Callable[[Slot, TokenLossFn], TokenLossFn] = lambda slot, fn: fn
  loss: Callable[[Slot, LossFn], LossFn] = lambda slot, fn: fn
  data_weight: Callable[[Context], jax.Array | float] = lambda context: 1.0
  gradients: Callable[[Slot, Params, Context], Params] = lambda slot, grads, context: grads
  after: Callable[[Slot, TrainState, Update], tuple[Slot, TrainState]] = lambda slot, state, update: (slot, state)
  instead: Callable[[Slot, Params], Params] = lambda slot, params: params
  final: Callable[[Slot, Params], Params] = lambda slot, params: params
  judge: Callable[[Slot, Params, Batch, Context], Terms] = lambda slot, params, batch, context: {}
  witnesses: Callable[[], Mapping[str, Any]] = dict
  flops: Mapping[str, float] = {}  # model FLOPs that the hooks add to each slot of a batch, see `count_flops`
  wants: tuple[Feature, ...] = ()  # of the model's forward pass; `loss` finds it in context.features
  parts: tuple['Transform', ...] = ()  # of a chain


def _nobody(arm: str) -> Any:
  raise ConfigError(f'arm {arm}: not there')


class Resources(NamedTuple):
  """What the configuration of a transform may need to build it."""

  steps: int  # of the whole run, for schedules
  seq_len: int  # for the books
  vocab: int  # tokens of the tokenizer; what a model has beyond is padding
  model: Model  # the one that is trained
  load: Callable[[str], tuple[Model, Params]]  # another arm's trained model, by arm id; its tokens are the data's
  folder: Path  # for data that are made once and kept
  eos: int = 2  # token that ends a document
  pad: int = 0  # token that fills a sequence up
  load_any: Callable[[str], tuple[Model, Params]] = _nobody  # the same of an arm whose tokens may be others
  tokenizer: Any = None
  tokenizer_of: Callable[[str], Any] = _nobody  # another arm's
  vocab_chunk: int = 0  # tokens of the vocabulary whose logits are to exist at once; 0: all


class TransformConfig:
  """What an experiment file says of a transform: a frozen dataclass with a `kind` and a `build`."""

  kind: ClassVar[str]
  before: ClassVar[tuple[str, ...]] = ()  # kinds that it has to stand before, where it is with them

  def build(self, resources: Resources) -> tuple['Transform', dict[str, Any]]:
    """The transform, and its entries of `frozen`."""
    raise NotImplementedError

  def open(self, dataset: Any, resources: Resources) -> Any:
    """The `Dataset` that the arm is trained and evaluated on: this one, unless the transform makes another of it."""
    return dataset

  def stand_in(self, dataset: Any, resources: Resources) -> Any:
    """What a measurement takes for `open`: a `Dataset` of the same shapes, made of nothing and from no files."""
    return dataset

  def resolved(self, key: str) -> 'TransformConfig':
    """This, with what its files hold in place of where they are; ConfigError if they are missing. Needs no devices."""
    return self

  def check_in(self, config: Any, key: str) -> None:
    """ConfigError for what cannot go together with the rest of the arm's `Config`. `check(key)` sees only itself."""

  def count_flops(self, model: ModelConfig, seq_len: int, others: Mapping[str, ModelConfig]) -> dict[str, float]:
    """Returns the model FLOPs that it adds to each slot of a batch, by what is computed; see `merge_flops`.

    A forward pass of another arm has that arm's name, the rest this transform's. `build` puts them into
    `Transform.flops`. model: the student's. others: the models of the arms that it names, by what stands in its fields.
    """
    return {}


def merge_flops(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
  """Returns the FLOPs of several transforms together.

  What two of them compute, a forward pass of one teacher say, counts once, by the one that needs more of it.
  """
  merged: dict[str, float] = {}
  for part in parts:
    merged |= {name: max(flops, merged.get(name, 0.0)) for name, flops in part.items()}
  return merged


def chain(*transforms: Transform) -> Transform:
  """One transform that runs the given ones from left to right. Its slot is `{name: slot}`, flat, so nesting is free."""
  parts = tuple(p for t in transforms for p in (t.parts if t.name == 'chain' else (t,)))
  names = [p.name for p in parts]
  if len(set(names)) != len(names):
    raise ValueError(f'chain: transform names must differ, got {", ".join(names)}')

  def own(key, p):
    # The key depends on the name and not on the place: another transform leaves this one's randomness alone.
    return jax.random.fold_in(key, zlib.crc32(p.name.encode()))

  def init(key, params):
    return {p.name: p.init(own(key, p), params) for p in parts}

  def extra(key, params):
    each = {p.name: p.extra(own(key, p), params) for p in parts}
    return {name: tree for name, tree in each.items() if jax.tree.leaves(tree)}

  def data(slots, params, batch, context):
    for p in parts:
      batch = p.data(slots[p.name], params, batch, context)
    return batch

  def view(slots, params, context):
    for p in parts:
      params = p.view(slots[p.name], params, context)
    return params

  def token_loss(slots, fn):
    for p in parts:
      fn = p.token_loss(slots[p.name], fn)
    return fn

  def loss(slots, fn):
    for p in parts:
      fn = p.loss(slots[p.name], fn)
    return fn

  def data_weight(context):
    return math.prod(p.data_weight(context) for p in parts)

  def gradients(slots, grads, context):
    for p in parts:
      grads = p.gradients(slots[p.name], grads, context)
    return grads

  def after(slots, state, update):
    slots = dict(slots)
    for p in parts:
      slots[p.name], state = p.after(slots[p.name], state, update)
    return slots, state

  def final(slots, params):
    for p in parts:
      params = p.instead(slots[p.name], params)
    for p in parts:
      params = p.final(slots[p.name], params)
    return {name: tree for name, tree in params.items() if name not in names}

  def judge(slots, params, batch, context):
    each = [p.judge(slots[p.name], params, batch, context._replace(key=own(context.key, p))) for p in parts]
    return {name: term for terms in each for name, term in terms.items()}

  def witnesses():
    return {name: tree for p in parts for name, tree in p.witnesses().items()}

  hparams = {k: v for p in parts for k, v in p.hparams.items()}
  flops = merge_flops(p.flops for p in parts)
  wants = tuple(dict.fromkeys(feature for p in parts for feature in p.wants))
  hooks = Transform('chain', hparams, init, extra, data, view, token_loss, loss, data_weight, gradients, after)
  return hooks._replace(final=final, judge=judge, witnesses=witnesses, flops=flops, wants=wants, parts=parts)


def init_state(key: jax.Array, params: Params, optimizer: Optimizer, transform: Transform = chain()) -> TrainState:
  """The state before the first step. `params` are used as they are; `key` seeds the slots and all later randomness."""
  transform = chain(transform)
  hparams = {k: jnp.float32(v) for k, v in {**optimizer.hparams, **transform.hparams}.items()}
  slot_key, step_key = jax.random.split(key)
  if extra := transform.extra(slot_key, params):
    params = {**params, **extra}
  return TrainState(
    step=jnp.int32(0),
    key=step_key,
    params=params,
    opt_state=optimizer.make(hparams).init(params),
    slots=transform.init(slot_key, params),
    hparams=hparams,
  )


def make_step(
  model: Model,
  optimizer: Optimizer,
  transform: Transform = chain(),
  *,
  accumulate: int = 1,
  z_loss: float = 0.0,
  chunk: int = losses.CHUNK,
  groups: int = 1,
  axis: str | tuple[str, ...] | None = None,
) -> Callable[[TrainState, Batch, Mapping[str, Any]], tuple[TrainState, Metrics]]:
  """Returns the pure function `(state, batch, frozen) -> (state, metrics)`; jit it once, donate the state.

  accumulate: the batch is split into so many parts along B, one after another; every term is normalised by its count
    over the *whole* batch, so the result does not depend on the split, ragged masks included.
  chunk: tokens whose logits exist at the same time; of each group.
  groups, axis: of rows whose gradients are added up once at the end; see `losses.gradient`. `model` sees one group.
  Metrics: sum / count of every term; total (the objective), tokens (that counted in the batch as it came), grad_norm,
  learning_rate.
  """
  transform = chain(transform)

  def terms_of(params, slots, batch, context) -> Terms:
    seen = transform.view(slots, params, context)
    of_tokens = transform.token_loss(slots, losses.cross_entropy(z_loss))

    def token_loss(logits, tokens, context):
      return losses.weigh_data(of_tokens(logits, tokens, context), transform.data_weight(context))

    def base(params, hidden_BTD, batch, context):
      return losses.over_chunks(token_loss, model.head, params, hidden_BTD, batch, context, chunk)

    hidden_BTD, features = model.features(seen, batch, transform.wants)
    return transform.loss(slots, base)(seen, hidden_BTD, batch, context._replace(features=features))

  def step(state, batch, frozen):
    context = Context(state.step, jax.random.fold_in(state.key, state.step), state.hparams, frozen)
    tokens = batch['mask'].sum()  # a hook may turn labels into something else
    batch = transform.data(state.slots, transform.view(state.slots, state.params, context), batch, context)
    terms, grads = losses.gradient(
      lambda params, part: terms_of(params, state.slots, part, context), state.params, batch, accumulate, groups, axis
    )
    used = transform.gradients(state.slots, grads, context)
    updates, opt_state = optimizer.make(state.hparams).update(used, state.opt_state, state.params)
    taken = state._replace(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)
    slots, taken = transform.after(state.slots, taken, Update(grads, terms, batch, context, state.params))
    metrics = losses.means(terms) | {
      'total': losses.objective(terms),
      'tokens': tokens,
      'grad_norm': optax.tree.norm(optax.tree.cast(used, jnp.float32)),
      'learning_rate': optimizer.rate(state.hparams, state.step),
    }
    return taken._replace(slots=slots), metrics

  return step
