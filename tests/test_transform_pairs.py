"""Laws of all pairs of transforms: what each takes from the data, and that order matters only where it is declared.

A new transform must enter EXAMPLES. A pair that is refused must be in REFUSED, one whose order is declared in ORDERED.
"""

import dataclasses
import importlib
import itertools
import math
import pkgutil
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import toy_model

import slm_jax
from slm_jax import vocabulary
from slm_jax.config import ConfigError, check
from slm_jax.data import batches
from slm_jax.data.config import DataConfig
from slm_jax.distill.cached import CachedDistill
from slm_jax.distill.crossed import CrossDistill
from slm_jax.distill.features import Features, Relations
from slm_jax.distill.logits import Distill, SelfDistill
from slm_jax.distill.on_policy import OnPolicy
from slm_jax.distill.sequence import SequenceDistill
from slm_jax.ema import Ema
from slm_jax.experiment import Config, InitConfig, TrainConfig
from slm_jax.losses import Auxiliary, Term
from slm_jax.model import decoder
from slm_jax.model.config import ModelConfig
from slm_jax.optim import OptimConfig, optimizer
from slm_jax.prune.l0 import L0
from slm_jax.prune.transform import Prune
from slm_jax.step import Resources, Transform, TransformConfig, chain, init_state, make_step


@dataclasses.dataclass(frozen=True)
class LabelSmoothing(TransformConfig):
  """What a user writes who knows of no other transform: (1 - e) CE + e times the mean over tokens of -log q."""

  kind: ClassVar[str] = 'label_smoothing'
  share: float = 0.2

  def build(self, resources):
    def token_loss(slot, fn):
      def smoothed(logits, tokens, context):
        terms, mask = fn(logits, tokens, context), tokens['mask']
        uniform = vocabulary.log_z(logits) - vocabulary.total(lambda z: z, logits) / logits.shape[-1]
        hard = terms['loss']
        return {
          **terms,
          'loss': hard._replace(weight=hard.weight * (1 - self.share)),
          'smoothing': Term((uniform * mask).sum(), mask.sum(), self.share),
        }

      return smoothed

    return Transform(self.kind, token_loss=token_loss), {}


EXAMPLES = {
  'ema': Ema(0.5),
  'distill': Distill('a', weight=0.3, temperature=2.0),
  'self_distill': SelfDistill(weight=0.4, decay=0.5, divergence='taid'),
  'cached_distill': CachedDistill('a', weight=0.1, k=3),
  'cross_distill': CrossDistill('b', weight=0.6),
  'sequence_distill': SequenceDistill('a'),
  'on_policy': OnPolicy(max_new=2),
  'features': Features('a', layers=('1:1',), weight=0.7),
  'relations': Relations('a', heads=2),
  'prune': Prune(start=0.0, end=1.0, every=1),
  'l0': L0(width=0.5),
  'label_smoothing': LabelSmoothing(),
}
ULD = CrossDistill('b', weight=0.6, divergence='uld')
STE, RIGL = (dataclasses.replace(EXAMPLES['prune'], method=m, allocation='erk') for m in ('ste', 'rigl'))
GATES = L0(channels=0.5, width=0.5)
# Of a kind that comes in more than one way, further pairs.
FURTHER = [
  *((ULD, EXAMPLES[kind]) for kind in ('distill', 'cached_distill', 'label_smoothing')),
  *((method, EXAMPLES[kind]) for method in (STE, RIGL) for kind in ('ema', 'self_distill')),
  (STE, GATES),
  (RIGL, GATES),
]
SHARES = {'distill': 0.3, 'self_distill': 0.4, 'cached_distill': 0.1, 'cross_distill': 0.6}  # taken from the data


def name_of(spec):
  return {id(ULD): 'cross_distill uld', id(STE): 'prune ste', id(RIGL): 'prune rigl'}.get(id(spec), spec.kind)


JUDGES = {'distill', 'self_distill'}
# Pairs without a meaning, in either order.
REFUSED = {
  ('cached_distill', 'on_policy'): 'cached_distill holds what a teacher said of documents, and nothing of rollouts',
  ('cross_distill', 'on_policy'): 'text is aligned before the step, and on_policy writes it in the step',
  ('prune ste', 'self_distill'): 'no model without the masks or gates of prune',
  ('l0', 'self_distill'): 'no model without the masks or gates of l0',
}
# Pairs of which the first must stand before the second.
ORDERED = {
  *(('on_policy', kind) for kind in ('distill', 'self_distill', 'features', 'relations')),
  ('sequence_distill', 'cached_distill'),
  ('prune', 'self_distill'),
  ('prune rigl', 'self_distill'),
  ('prune rigl', 'ema'),
  ('prune ste', 'l0'),
}
PAIRS = [*itertools.combinations(EXAMPLES.values(), 2), *FURTHER]


V, T, STEPS = 8, 8, 3
CONFIG = ModelConfig(
  vocab_size=V, d_model=8, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=4, d_ff=8, max_len=16, init_std=0.5
)
OPTIM = optimizer(OptimConfig(learning_rate=3e-2, warmup=0, schedule='constant'), STEPS)
TOKENIZER = SimpleNamespace(vocab_size=V, check_vocabulary=lambda size: None)


def resources_of(specs):
  """With a toy in place of a model, unless text is written or the layers' channels are gated."""
  if any(spec.kind == 'on_policy' or spec == GATES for spec in specs):
    model, teacher = decoder.build(CONFIG), decoder.build(dataclasses.replace(CONFIG, d_model=12))
  else:
    model, teacher = toy_model(V, 8, 1), toy_model(V, 12, 1)
  a, b = (teacher.init(jax.random.PRNGKey(i)) for i in (1, 2))
  return Resources(
    steps=STEPS,
    seq_len=T,
    vocab=V,
    model=model,
    load={'a': (teacher, a)}.__getitem__,
    folder=Path(),
    load_any={'b': (teacher, b)}.__getitem__,
    tokenizer=TOKENIZER,
    tokenizer_of=lambda arm: TOKENIZER,
  )


class NoText:
  """What `stand_in` asks of a dataset."""

  joins, valid_joins = (), ()

  def _replace(self, **changes):
    new = NoText()
    new.__dict__.update(self.__dict__, **changes)
    return new


def batch_of(specs, resources, seed):
  """Documents with a prompt of three tokens, of different lengths, and what the transforms need beside the text."""
  rng, dataset = np.random.default_rng(seed), NoText()
  sequences = np.zeros((4, 2, T + 1), np.uint32)
  for row, end in zip(sequences, (9, 7, 8, 6), strict=True):
    row[0, :end], row[1, :end] = rng.integers(3, V, end), 1
  for spec in specs:
    dataset = spec.stand_in(dataset, resources)
  batch = batches.batch_of(list(sequences))
  batch['mask'] = batch['mask'] * (np.arange(T) >= 2)
  for join in dataset.joins:
    batch |= join(list(sequences))
  return jax.tree.map(jnp.asarray, batch)


def refusal(specs):
  """The error line of a configuration with these transforms, '' if there is none."""
  data = DataConfig(seq_len=T, batch_size=4, packing='single', prompt_end='=')
  model, train = dataclasses.replace(CONFIG, vocab_size=384), TrainConfig(steps=STEPS)
  try:
    check(Config(model=model, data=data, train=train, init=InitConfig(arm='a'), transforms=tuple(specs)))
  except ConfigError as error:
    return str(error)
  return ''


SPY = Transform('spy', after=lambda slot, state, update: ((update.terms, update.grads), state))


def trained(specs):
  """(terms of each step, gradients of each step, finished parameters)"""
  resources = resources_of(specs)
  built = [spec.build(resources) for spec in specs]
  frozen = {name: tree for _, its in built for name, tree in its.items()}
  transform, history = chain(*(part for part, _ in built), SPY), []
  take = make_step(resources.model, OPTIM, transform, z_loss=0.01)

  @jax.jit
  def step(state, batch, frozen):
    state, _ = take(state, batch, frozen)
    return state._replace(slots={**state.slots, 'spy': ()}), state.slots['spy']

  state = init_state(jax.random.PRNGKey(3), resources.model.init(jax.random.PRNGKey(0)), OPTIM, transform)
  for i in range(STEPS):
    state, seen = step(state, batch_of(specs, resources, i), frozen)
    history.append(seen)
  assert step._cache_size() == 1  # no state is of another type at first, so that all steps are one program
  terms, grads = zip(*history, strict=True)
  return terms, grads, jax.jit(transform.final)(state.slots, state.params)


def with_judge(specs):
  """What the student writes needs one who judges it; a pair without one has distillation as a third."""
  kinds = {spec.kind for spec in specs}
  return (*specs, EXAMPLES['distill']) if 'on_policy' in kinds and not kinds & JUDGES else specs


def weights(specs):
  """Of the data's terms: their own, times the share that each teacher leaves."""
  smoothed = LabelSmoothing.share if any(spec.kind == 'label_smoothing' for spec in specs) else 0.0
  left = math.prod(1 - SHARES.get(spec.kind, 0.0) for spec in specs)
  return {'loss': (1 - smoothed) * left, **({'smoothing': smoothed * left} if smoothed else {})}


def test_all_transforms_are_here():
  for module in pkgutil.walk_packages(slm_jax.__path__, 'slm_jax.'):
    importlib.import_module(module.name)

  def below(cls):
    return {sub for each in cls.__subclasses__() for sub in {each, *below(each)}}

  kinds = {cls.kind for cls in below(TransformConfig) if 'kind' in vars(cls) and cls.__module__.startswith('slm_jax.')}
  assert kinds == EXAMPLES.keys() - {'label_smoothing'}
  assert all(spec.kind == kind for kind, spec in EXAMPLES.items())


@pytest.mark.parametrize('pair', PAIRS, ids=lambda pair: ', '.join(map(name_of, pair)))
def test_the_data_have_what_all_teachers_leave_them_in_any_order(pair):
  """A law of every ordered pair: refused, or with the data's terms multiplied by the product of both shares; and of
  the same objective, gradients and finished model as in the other order, or that order is refused."""
  names = tuple(map(name_of, pair))
  results = []
  for specs, order in ((pair, names), (pair[::-1], names[::-1])):
    specs = with_judge(specs)
    error = refusal(specs)
    if order in REFUSED or order[::-1] in REFUSED:
      assert REFUSED.get(order, REFUSED.get(order[::-1])) in error
      continue
    if order[::-1] in ORDERED:
      assert f'{pair[names.index(order[1])].kind} must stand before {pair[names.index(order[0])].kind}' in error
      continue
    assert not error
    results.append(trained(specs))
    for terms in results[-1][0]:
      found = {name: float(term.weight) for name, term in terms.items() if not isinstance(term, Auxiliary)}
      given = weights(specs)
      assert {name: found.pop(name) for name in given} == pytest.approx(given, rel=1e-6)
      of_loss_hooks = {'features', 'relations', 'cross_distill', 'l0_width_penalty', 'l0_channels_penalty'}
      assert all(weight == 0 for name, weight in found.items() if name not in of_loss_hooks)
      assert terms['z_loss'].weight == np.float32(0.01)
  if len(results) == 2:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *map(sorted_names, results))


def sorted_names(result):
  """A dictionary of terms comes in the order in which they were made."""
  terms, *rest = result
  return [dict(sorted(each.items())) for each in terms], *rest


def test_a_student_that_writes_needs_one_who_judges_it():
  for kind, spec in EXAMPLES.items():
    if kind not in JUDGES | {'on_policy', 'cached_distill', 'cross_distill'}:
      assert 'nobody judges what the student writes' in refusal((EXAMPLES['on_policy'], spec))
