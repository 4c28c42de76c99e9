"""Distillation by what happens inside: hidden states through learnt projections, and relations between tokens.

    projected(teacher, [(1, 2), (2, 4)], mse, {'features.weight': 1.0, 'features.rate': 1.0})
    related(teacher, (2, 4), ('qq', 'kk', 'vv'), heads=4, weight=1.0)

The teacher's part runs in `data`, outside of the gradient; the student's comes out of the one forward pass that the
step makes anyway (`Transform.wants`). Terms are float32 sums over the tokens of the batch's mask, or of its entry
'taught' where there is one, and are added to the loss of the data, which keeps its weight.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from slm_jax.config import require, setting
from slm_jax.distill.divergences import kl_of_logs
from slm_jax.distill.judge import judge
from slm_jax.distill.teachers import Precision, check_precision, online, restored, stored
from slm_jax.losses import Term
from slm_jax.model.api import Feature, Model
from slm_jax.model.attention import document_starts
from slm_jax.model.config import ModelConfig
from slm_jax.model.flops import flops_per_token
from slm_jax.step import Resources, Transform, TransformConfig

Distance = Callable[[jax.Array, jax.Array], jax.Array]  # (student's, teacher's), both [..., D] -> [...]
Relation = Literal['qq', 'kk', 'vv', 'qk']

SCORES = 2**22  # of a relation that exist at once, over all sequences and heads

# ------------------------------------------------------------------------------------------------------- configuration


@dataclasses.dataclass(frozen=True)
class FromWithin(TransformConfig):
  """What both kinds have: another arm's trained model, and how much its term counts."""

  holds_teacher: ClassVar[bool] = True  # in memory, as `frozen`
  teacher: str = setting('', arm=True)  # name of the arm
  _: dataclasses.KW_ONLY
  weight: float = setting(1.0, '[0, inf)', traced=True)  # of the term; that of the data stays 1
  precision: Precision = 'own'  # of the teacher's parameters in memory

  def check(self, key: str) -> None:
    require(bool(self.teacher), f'{key}.teacher={self.teacher!r}: name the arm to learn from')

  def check_in(self, config: Any, key: str) -> None:
    check_precision(self, config, key)

  def finished(self, made: Transform, teacher: Model, name: str, resources: Resources) -> Transform:
    """With its FLOPs, and judged by the teacher, whose parameters are `frozen[name]`."""
    by_teacher = judge(resources.model, online(teacher, name, resources.vocab), resources)
    flops = self.count_flops(resources.model.config, resources.seq_len, {self.teacher: teacher.config})
    return made._replace(flops=flops, judge=lambda slot, *given: by_teacher((), *given))


@dataclasses.dataclass(frozen=True)
class Features(FromWithin):
  """Hidden states of some layers are to be those of the teacher's, times a matrix that is learnt along.

  At rate 0 the matrices stay as they are drawn.
  """

  kind: ClassVar[str] = 'features'
  layers: tuple[str, ...] = ()  # 'student:teacher'; layer 0 is the embeddings
  distance: Literal['mse', 'cosine'] = 'mse'
  rate: float = setting(1.0, '[0, inf)', traced=True)  # learning rate of the projections, as a multiple of the model's

  def check(self, key: str) -> None:
    super().check(key)
    require(bool(self.layers), f"{key}.layers=(): name pairs of layers, 'student:teacher'")
    for pair in self.layers:
      numbers = pair.split(':')
      good = len(numbers) == 2 and all(n.isascii() and n.isdigit() for n in numbers)
      require(good, f"{key}.layers={pair!r}: expected 'student:teacher', two numbers of layers")
    for whose, layers in zip(('student', 'teacher'), zip(*self.pairs, strict=True), strict=True):
      twice = [n for n in layers if layers.count(n) > 1]
      require(
        not twice, f'{key}.layers={",".join(self.layers)}: layer {(twice + [0])[0]} of the {whose} is there twice'
      )

  def check_in(self, config: Any, key: str) -> None:
    super().check_in(config, key)
    for layer, _ in self.pairs:
      check_layer(f'{key}.layers', layer, 0, config.model.n_layers, 'the student')

  @property
  def pairs(self) -> tuple[tuple[int, int], ...]:
    return tuple((int(s), int(t)) for s, t in (pair.split(':') for pair in self.layers))

  def build(self, resources: Resources) -> tuple[Transform, dict[str, Any]]:
    model, params = resources.load(self.teacher)
    for _, layer in self.pairs:
      check_layer(f'transforms.{self.kind}.layers', layer, 0, model.config.n_layers, f'the teacher {self.teacher}')
    name = f'teacher_{self.teacher}'
    numbers = {'features.weight': self.weight, 'features.rate': self.rate}
    made = projected(model, self.pairs, DISTANCES[self.distance], numbers, name)
    return self.finished(made, model, name, resources), {name: stored(params, self.precision)}

  def count_flops(self, model: ModelConfig, seq_len: int, others: Mapping[str, ModelConfig]) -> dict[str, float]:
    teacher = others[self.teacher]
    layers, projections = max(layer for _, layer in self.pairs), 6 * model.d_model * teacher.d_model * len(self.pairs)
    return {self.teacher: forward_flops(teacher, layers, seq_len), self.kind: projections}


@dataclasses.dataclass(frozen=True)
class Relations(FromWithin):
  """How a layer's tokens relate to each other is to be as in a layer of the teacher; widths and depths are free.

  qq, kk, vv: MiniLM v2 (arXiv 2012.15828). qk, vv, with as many heads as both models have: MiniLM (arXiv 2002.10957).
  """

  kind: ClassVar[str] = 'relations'
  layer: int = setting(0, '[0, 2^31)')  # of the student, 1..L; 0: the last
  teacher_layer: int = setting(0, '[0, 2^31)')  # 0: the last; v2 takes one above the middle of a large teacher
  relations: tuple[Relation, ...] = ('qq', 'kk', 'vv')
  heads: int = setting(4, '[1, 2^31)')  # into which queries, keys and values are split, whatever heads attention has

  def check(self, key: str) -> None:
    super().check(key)
    require(
      0 < len(self.relations) == len(set(self.relations)),
      f'{key}.relations={",".join(self.relations)}: name some of qq, kk, vv, qk, each once',
    )

  def check_in(self, config: Any, key: str) -> None:
    super().check_in(config, key)
    check_layer(f'{key}.layer', self.layer, 0, config.model.n_layers, 'the student')
    check_heads(f'{key}.heads', self.heads, self.relations, config.model, 'the student')

  def build(self, resources: Resources) -> tuple[Transform, dict[str, Any]]:
    model, params = resources.load(self.teacher)
    own, its, key, who = resources.model.config, model.config, f'transforms.{self.kind}', f'the teacher {self.teacher}'
    check_layer(f'{key}.teacher_layer', self.teacher_layer, 0, its.n_layers, who)
    check_heads(f'{key}.heads', self.heads, self.relations, its, who)
    layers = self.layer or own.n_layers, self.teacher_layer or its.n_layers
    name = f'teacher_{self.teacher}'
    made = related(model, own, layers, self.relations, self.heads, self.weight, name)
    return self.finished(made, model, name, resources), {name: stored(params, self.precision)}

  def count_flops(self, model: ModelConfig, seq_len: int, others: Mapping[str, ModelConfig]) -> dict[str, float]:
    teacher = others[self.teacher]
    own, its = (sum(_width(config, relation) for relation in self.relations) for config in (model, teacher))
    layers, scores = self.teacher_layer or teacher.n_layers, (6 * own + 2 * its) * seq_len / 2
    return {self.teacher: forward_flops(teacher, layers, seq_len), self.kind: scores}


def check_layer(key: str, layer: int, first: int, last: int, who: str) -> None:
  require(first <= layer <= last, f'{key}: layer {layer} of {who}: allowed: {first}..{last}')


def check_heads(key: str, heads: int, relations: Sequence[Relation], config: ModelConfig, who: str) -> None:
  for relation in relations:
    width = _width(config, relation)
    require(width % heads == 0, f'{key}={heads}: does not divide the width {width} of {relation} in {who}')


def _width(config: ModelConfig, relation: Relation) -> int:
  return config.head_dim * (config.n_heads if 'q' in relation else config.n_kv_heads)


def forward_flops(config: ModelConfig, layers: int, seq_len: int) -> float:
  """A token, up to that layer: what lies above it, and the head, is not needed."""
  below = dataclasses.replace(config, n_layers=layers)
  return flops_per_token(below, seq_len, backward=False) - 2 * config.d_model * config.vocab_size


# ------------------------------------------------------------------------------------------------------- hidden states


def standardized(x: jax.Array) -> jax.Array:
  """Layer norm without parameters: mean 0, second moment 1, so that no layer or model counts more for its size."""
  x = x - x.mean(-1, keepdims=True)
  return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def mse(student: jax.Array, teacher: jax.Array) -> jax.Array:
  """mean_D (norm(s) - norm(t))^2 (TinyBERT, arXiv 1909.10351, with a norm): 0..4, and 2 if they are unrelated."""
  return ((standardized(student) - standardized(teacher)) ** 2).mean(-1)


def cosine(student: jax.Array, teacher: jax.Array) -> jax.Array:
  """1 - cos(s, t) (DistilBERT, arXiv 1910.01108): 0..2."""

  def unit(x):
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-12)

  return 1 - (unit(student) * unit(teacher)).sum(-1)


DISTANCES: dict[str, Distance] = {'mse': mse, 'cosine': cosine}


def projected(
  teacher: Model,
  pairs: Sequence[tuple[int, int]],
  distance: Distance,
  numbers: Mapping[str, float],
  key: str = 'teacher',
) -> Transform:
  """sum over pairs (s, t) of mean over tokens of distance(h_s W_st, h'_t): the term 'features'.

  numbers: features.weight; features.rate, by which the learning rate of the W is multiplied (slm_jax/optim.py).
  W_st [D, D'] is the identity at the start where D = D', and else random with deviation D^-1/2. The teacher's
  parameters are `frozen[key]`, as `stored` made them.
  """
  names = {pair: f'{pair[0]}_to_{pair[1]}' for pair in pairs}

  def extra(rng, params):
    d, its = params['embed']['tokens'].shape[-1], teacher.config.d_model
    keys = jax.random.split(rng, len(pairs))
    return {
      name: jnp.eye(d) if d == its else jax.random.normal(k, (d, its)) / math.sqrt(d)
      for k, name in zip(keys, names.values(), strict=True)
    }

  def data(slot, params, batch, context):
    wanted = [Feature('hidden', t) for _, t in pairs]
    found = teacher.features(restored(context.frozen[key]), batch, wanted)[1]
    return {**batch, **_entries('features', found)}

  def loss(slot, fn):
    def with_features(params, hidden_BTD, batch, context):
      terms = fn(params, hidden_BTD, _without_entries('features', batch), context)
      mask_BT = batch.get('taught', batch['mask'])
      total_BT = jnp.zeros_like(mask_BT)
      for s, t in pairs:
        x_BTD, w_DE = context.features[Feature('hidden', s)], params['features'][names[s, t]]
        guess_BTE = jnp.einsum('btd,de->bte', x_BTD, w_DE.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
        total_BT += distance(guess_BTE, batch[f'features_hidden_{t}'].astype(jnp.float32))
      term = Term((total_BT * mask_BT).sum(), mask_BT.sum(), context.hparams['features.weight'])
      return {**terms, 'features': term}

    return with_features

  wants = tuple(Feature('hidden', s) for s, _ in pairs)
  return Transform('features', numbers, extra=extra, data=data, loss=loss, wants=wants)


def _entries(name: str, found: Mapping[Feature, jax.Array]) -> dict[str, jax.Array]:
  return {f'{name}_{kind}_{layer}': jax.lax.stop_gradient(x) for (kind, layer), x in found.items()}


def _without_entries(name: str, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """What the other terms are given: they would carry these through their chunks."""
  return {k: x for k, x in batch.items() if not k.startswith(f'{name}_')}


# ----------------------------------------------------------------------------------------------------------- relations


def related(
  teacher: Model,
  student: ModelConfig,
  layers: tuple[int, int],
  relations: Sequence[Relation],
  heads: int,
  weight: float,
  key: str = 'teacher',
) -> Transform:
  """sum over relations of the mean over tokens and heads of KL(teacher's || student's): the term 'relations'.

  Relation ab is softmax(A B^T / sqrt(d)) within each of `heads` equal parts, d wide, of the concatenated heads of a and
  b, over what a token may attend to in a layer without a window: earlier tokens of its own document, and itself.
  Queries and keys are taken after RoPE. qk with attention's own heads is what attention does, its scale included.
  """
  kinds = tuple(dict.fromkeys(''.join(relations)))

  def data(slot, params, batch, context):
    wanted = [Feature(kind, layers[1]) for kind in kinds]  # type: ignore[arg-type]  # letters of a Relation
    found = teacher.features(restored(context.frozen[key]), batch, wanted)[1]
    return {**batch, **_entries('relations', found)}

  def loss(slot, fn):
    def with_relations(params, hidden_BTD, batch, context):
      terms = fn(params, hidden_BTD, _without_entries('relations', batch), context)
      mask_BT = batch.get('taught', batch['mask'])
      own = {kind: context.features[Feature(kind, layers[0])] for kind in kinds}  # type: ignore[arg-type]
      its = {kind: batch[f'relations_{kind}_{layers[1]}'] for kind in kinds}
      segments_BT = batch.get('segments')
      low_BT = jnp.zeros(mask_BT.shape, jnp.int32) if segments_BT is None else document_starts(segments_BT)
      total_BT = jnp.zeros_like(mask_BT)
      for relation in relations:
        ours, theirs = operands(relation, own, student, heads), operands(relation, its, teacher.config, heads)
        total_BT += relation_kl(ours, theirs, low_BT)
      term = Term((total_BT * mask_BT).sum(), mask_BT.sum(), context.hparams['relations.weight'])
      return {**terms, 'relations': term}

    return with_relations

  wants = tuple(Feature(kind, layers[0]) for kind in kinds)  # type: ignore[arg-type]
  return Transform('relations', {'relations.weight': weight}, data=data, loss=loss, wants=wants)


def operands(
  relation: Relation, features: Mapping[str, jax.Array], config: ModelConfig, heads: int
) -> tuple[jax.Array, jax.Array]:
  """A and B, each [B,T,R,d], A with the scale of the scores in it."""
  a, b = (features[kind] for kind in relation)
  if a.shape != b.shape:
    b = jnp.repeat(b, a.shape[2] // b.shape[2], axis=2)  # query heads that share a key
  a, b = (x.reshape(*x.shape[:2], heads, -1) for x in (a, b))
  scale = a.shape[-1] ** -0.5
  if relation == 'qk':
    scale *= config.query_scale * config.head_dim**0.5
  return (a.astype(jnp.float32) * scale).astype(a.dtype), b  # the scale is not rounded to the dtype of a


def relation_kl(
  student: tuple[jax.Array, jax.Array], teacher: tuple[jax.Array, jax.Array], low_BT: jax.Array, scores: int = SCORES
) -> jax.Array:
  """float32 [B,T]: mean over heads of KL of the rows. A few queries at a time, recomputed in the backward pass.

  student, teacher: `operands`; low: the first slot that each token relates to; scores: of B R C T that exist at once.
  """
  (b, t, heads), slots = student[0].shape[:3], jnp.arange(low_BT.shape[1])
  width = max(1, min(t, scores // (b * heads * t)))
  blocks = -(-t // width)

  def log_rows(a_BCRK, b_BSRK, seen_BCS):
    scores_BRCS = jnp.einsum('bcrk,bsrk->brcs', a_BCRK, b_BSRK, preferred_element_type=jnp.float32)
    return jax.nn.log_softmax(jnp.where(seen_BCS[:, None], scores_BRCS, -1e30))

  def block(ours_BSRK, theirs_BSRK, rows):
    own_BCRK, its_BCRK, low_BC, slot_C = rows
    seen_BCS = (low_BC[..., None] <= slots[None, None]) & (slots[None, None] <= slot_C[None, :, None])
    log_q, log_p = log_rows(own_BCRK, ours_BSRK, seen_BCS), log_rows(its_BCRK, theirs_BSRK, seen_BCS)
    return kl_of_logs(log_p, log_q).mean(1)

  if blocks == 1:
    return block(student[1], teacher[1], (student[0], teacher[0], low_BT, slots))

  def cut(x):
    x = jnp.pad(x, [(0, 0), (0, blocks * width - t)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(b, blocks, width, *x.shape[2:]), 1, 0)

  again = jax.checkpoint(block)
  pieces = (cut(student[0]), cut(teacher[0]), cut(low_BT), jnp.arange(blocks * width).reshape(blocks, width))
  _, out = jax.lax.scan(lambda _, rows: (None, again(student[1], teacher[1], rows)), None, pieces)
  return jnp.moveaxis(out, 0, 1).reshape(b, blocks * width)[:, :t]
