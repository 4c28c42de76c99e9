"""Pruning while training, as a transform: exact masks of the layers' matrices on a schedule with a traced target.

What is pruned is decided by a criterion, a pattern (patterns.py), an allocation (allocate.py) and a schedule
(schedules.py); what becomes of it, by a method:

    prune   pruned weights are 0 and stay so: masks are nested, unless the schedule is cyclic
    ste     masks in the forward pass only; the weights below go on, with the gradients of those that took their place
    set     at each refresh a share of those that are left goes as well, and as many come back, at random
    rigl    the same, and those come back whose gradients are the largest
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from slm_jax import sharding
from slm_jax.config import require, setting
from slm_jax.losses import Term
from slm_jax.model.api import Params
from slm_jax.prune import criteria
from slm_jax.prune.allocate import Allocation, allocate
from slm_jax.prune.matrices import SITES, Matrices, full, matrices, sizes
from slm_jax.prune.patterns import Pattern, check_budget, check_shapes, check_sparsity, cut, select
from slm_jax.prune.schedules import Schedule, sparsity_at
from slm_jax.step import Resources, Transform, TransformConfig, Update

Criterion = Literal['magnitude', 'first_order', 'movement', 'random']
Method = Literal['prune', 'ste', 'set', 'rigl']
MEMORY = 0.9  # of the average of |g w| over the steps
DROP = 0.3  # share of the weights that 'set' and 'rigl' exchange at first; it falls to 0 as a cosine (arXiv 1911.11134)


@dataclasses.dataclass(frozen=True)
class Prune(TransformConfig):
  """Set the least important weights of the layers' matrices to zero, more and more of them, and go on training.

  A ticket (arXiv 1803.03635) is an arm whose finished model is sparse: what is zero there is masked here from the
  start. The weights are this arm's own: those it starts from with the ticket's seed (rewound to step 0), with another
  seed (the control), or, by `init.arm`, those of an arm that ended early (rewound to its last step) or of the ticket
  itself (trained on). With a sparsity of 0 no more is pruned than the ticket is; with its own, what it lacks of that by
  this arm's pattern and allocation is, in the end.
  """

  kind: ClassVar[str] = 'prune'
  sparsity: float = setting(0.5, '[0, 1)', traced=True)  # share of the layers' weights that is zero in the end
  criterion: Criterion = 'magnitude'
  pattern: str = 'layer'  # what is compared: 'layer', 'output', n of m inputs as in '2:4', blocks as in '16x16'
  allocation: Allocation = 'uniform'  # of the sparsity over the matrices of the layers
  schedule: Schedule = 'cubic'
  method: Method = 'prune'
  start: float = setting(0.25, '[0, 1]')  # share of the steps before the first pruning
  end: float = setting(0.75, '[0, 1]')  # share of the steps after which the masks stay
  every: int = setting(20, '[1, 2^31)')  # steps between refreshes
  ticket: str = setting('', arm=True)

  def check(self, key: str) -> None:
    require(self.start <= self.end, f'{key}.start={self.start}, end={self.end}: need 0 <= start <= end <= 1')
    check_sparsity(Pattern.parse(self.pattern, f'{key}.pattern'), self.sparsity, self.allocation, key)
    if self.rules.regrows:
      require(
        self.allocation in ('uniform', 'erk'),
        f'{key}.allocation={self.allocation}: where weights come back (method={self.method}, schedule={self.schedule}) '
        'it cannot depend on scores; allowed: uniform, erk',
      )
    require(not self.ticket or self.method != 'ste', f'{key}.method=ste: chooses among all weights; a ticket does not')

  def check_in(self, config: Any, key: str) -> None:
    rule, shapes = Pattern.parse(self.pattern, f'{key}.pattern'), sizes(config.model)
    check_shapes(rule, shapes, f'{key}.pattern')
    check_budget(rule, shapes, 1 - self.sparsity, self.allocation, f'{key}.sparsity', f'{self.sparsity:g}')

  def build(self, resources: Resources) -> tuple[Transform, dict[str, Any]]:
    first, last = int(self.start * resources.steps), max(int(self.end * resources.steps), 1)
    return prune(self.sparsity, first, last, self.every, self.rules, self._masks(resources)), {}

  @property
  def before(self) -> tuple[str, ...]:  # type: ignore[override]  # which of them depends on the settings
    """Names the transforms that must stand after this one: averages of the weights, and gates.

    An average must follow the weights after the masks are applied, where that tells (it does not for `Ema` of weights
    that never come back). Gates on masks in the forward pass only must have the gradient of the masked weights.
    """
    if self.method == 'ste':
      return ('l0',)
    return ('self_distill', 'ema') if self.rules.regrows else ('self_distill',)

  @property
  def rules(self) -> 'Rules':
    return Rules(*(getattr(self, name) for name in Rules._fields))

  def _masks(self, resources: Resources) -> Matrices | None:
    """Of the ticket, whole, on every host; None if there is none, or only its shapes."""
    if not self.ticket:
      return None
    model, params = resources.load(self.ticket)
    theirs, own = (sizes(m.config) for m in (model, resources.model))
    differ = [name for name in own if theirs.get(name) != own[name]]
    require(not differ, f'transforms.prune.ticket={self.ticket}: its model has other shapes of {", ".join(differ)}')
    if isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct):
      return None
    masks = {name: w != 0 for name, w in matrices(sharding.to_host(params)).items()}
    check_ticket(masks, Pattern.parse(self.pattern, 'pattern'), f'transforms.prune.ticket={self.ticket}')
    return masks


def check_ticket(masks: Matrices, rule: Pattern, key: str) -> None:
  """A warning for masks that are none, or that do not fit the pattern: what is left will then be less than meant."""
  if all(bool(mask.all()) for mask in masks.values()):
    logging.warning('%s: it has no zeros, so nothing is masked at the start', key)
  if rule.kind == 'n:m':
    groups = {name: m.reshape(m.shape[0], -1, rule.m, m.shape[2]).sum(2) for name, m in masks.items()}
    less = [name for name, left in groups.items() if bool((left < rule.n).any())]
    if less:
      logging.warning(
        '%s: fewer than %d of some %d inputs are left in %s: sparser than pattern=%d:%d',
        key,
        rule.n,
        rule.m,
        ', '.join(less),
        rule.n,
        rule.m,
      )


class Rules(NamedTuple):
  """What `Prune` says of the masks, but how many and when."""

  criterion: Criterion = 'magnitude'
  pattern: str = 'layer'
  allocation: Allocation = 'uniform'
  schedule: Schedule = 'cubic'
  method: Method = 'prune'

  @property
  def regrows(self) -> bool:
    """Whether pruned weights come back, at 0."""
    return self.method in ('set', 'rigl') or (self.method == 'prune' and self.schedule == 'cyclic')


class Pruned(NamedTuple):
  """The slot."""

  masks: Params  # booleans, like the parameters; True for all that is not a matrix of the layers
  scores: Any  # {'layers': {name: float32}} of a criterion that remembers, else {}


def prune(
  sparsity: float, first: int, last: int, every: int, rules: Rules = Rules(), ticket: Matrices | None = None
) -> Transform:
  """Masked in the forward pass (`view`), projected after the optimiser, so moments and weight decay revive nothing.

  Masks are chosen anew every `every` steps from `first` to `last`, counted in steps taken: so the first step is dense
  in any case, unless a ticket (masks) says otherwise. The target is `hparams['prune.sparsity']`; every matrix (output,
  group) keeps one weight at least. What comes back is 0 and has no moments (`without_moments`); the dense gradients by
  which it is chosen never reach the optimiser. Logs 'density', the share of prunable weights that is left.
  """

  def init(key, params):
    remembers = rules.criterion in ('first_order', 'movement')
    return Pruned(full(params, ticket or {}), {'layers': _zeros(params)} if remembers else {})

  def view(slot, params, context):
    dense_gradients = rules.regrows or rules.method == 'ste'
    return (through if dense_gradients else apply)(slot.masks, params)

  def loss(slot, fn):
    def with_density(params, hidden_BTD, batch, context):
      return {**fn(params, hidden_BTD, batch, context), 'density': density(slot.masks)}

    return with_density

  def gradients(slot, grads, context):
    return apply(slot.masks, grads) if rules.regrows else grads

  def after(slot, state, update):
    step, begin = state.step, max(first, 1)
    slot = slot._replace(scores=_remember(rules.criterion, slot.scores, update))
    due = (step >= begin) & (step <= last) & (((step - begin) % every == 0) | (step == last))

    def refreshed():
      keep = 1 - sparsity_at(rules.schedule, step, first, last, state.hparams['prune.sparsity'])
      masks = full(state.params, _chosen(rules, slot, state.params, update, keep, _exchanged(step, begin, last)))
      if not rules.regrows:
        return masks, ()
      return masks, without_moments(state.opt_state, jax.tree.map(lambda new, old: new & ~old, masks, slot.masks))

    as_it_is = slot.masks, state.opt_state if rules.regrows else ()
    masks, opt_state = jax.lax.cond(due, refreshed, lambda: as_it_is)
    if rules.regrows:
      state = state._replace(opt_state=opt_state)
    if rules.method != 'ste':
      state = state._replace(params=apply(masks, apply(slot.masks, state.params)))
    return slot._replace(masks=masks), state

  def final(slot, params):
    return apply(slot.masks, params)

  hparams = {'prune.sparsity': sparsity}
  return Transform('prune', hparams, init, view=view, loss=loss, gradients=gradients, after=after, final=final)


def _chosen(
  rules: Rules, slot: Pruned, params: Params, update: Update, keep: jax.Array, exchanged: jax.Array
) -> Matrices:
  """The masks of a refresh; `exchanged` is the share that 'set' and 'rigl' replace."""
  scores, alive = _scores(rules.criterion, slot, params, update), matrices(slot.masks)
  if not rules.regrows:
    return select(scores, keep, rules.pattern, rules.allocation, None if rules.method == 'ste' else alive)
  grads = matrices(update.grads)
  if rules.method == 'set':
    growth = criteria.random(grads, jax.random.fold_in(update.context.key, 1))
  else:
    growth = criteria.magnitude(grads)
  counts = allocate(scores, keep, rules.allocation)
  share = exchanged if rules.method in ('set', 'rigl') else jnp.float32(0)
  return exchange(scores, growth, alive, counts, share, Pattern.parse(rules.pattern, 'pattern'))


# ------------------------------------------------------------------------------------------------------------ masks


def apply(masks: Params, params: Params) -> Params:
  """params where the mask is True, else 0 (also where a pruned weight has become infinite or NaN)."""
  return jax.tree.map(lambda m, p: jnp.where(m, p, 0), masks, params)


def through(masks: Params, params: Params) -> Params:
  """p + sg(p m - p): the values of `apply`, and the gradients of the identity (arXiv 1308.3432)."""
  return jax.tree.map(lambda m, p: p + jax.lax.stop_gradient(jnp.where(m, p, 0) - p), masks, params)


def density(masks: Params) -> Term:
  """Share of the weights of the layers' matrices that is left; a metric."""
  each = matrices(masks).values()
  left = jnp.stack([m.sum(dtype=jnp.float32) for m in each]).sum()
  return Term(left, jnp.float32(sum(m.size for m in each)), 0.0)


def exchange(
  scores: Matrices, growth: Matrices, alive: Matrices, counts: Mapping[str, jax.Array], share: Any, rule: Pattern
) -> Matrices:
  """Masks of `counts` weights a matrix: of those alive the best (1 - share) of the counts, then the best by growth.

  share: 0 where weights only come back, because the counts have grown. growth: at least 0.
  """
  stay = {name: jnp.maximum(jnp.round(k * (1 - share)).astype(jnp.int32), 1) for name, k in counts.items()}
  left = cut({name: jnp.where(alive[name], s, -jnp.inf) for name, s in scores.items()}, stay, rule)
  left = {name: m & alive[name] for name, m in left.items()}
  return cut({name: jnp.where(left[name], jnp.inf, g) for name, g in growth.items()}, dict(counts), rule)


def without_moments(opt_state: Any, entries: Params) -> Any:
  """The optimiser's state with zeros at `entries` (booleans like the parameters) of all that is shaped like them.

  By the tree alone: an array belongs to a parameter if its path ends with the parameter's, and the shapes are equal.
  So of Adam's and Muon's moments, of any chain of them; what an optimiser sums over rows and columns (Adafactor's
  factors) has no such entries, and stays.
  """
  table = [(jax.tree_util.keystr(path), m) for path, m in jax.tree_util.tree_leaves_with_path(entries)]

  def clean(path, leaf):
    name = jax.tree_util.keystr(path)
    for its, m in table:
      if name.endswith(its) and leaf.shape == m.shape:
        return jnp.where(m, 0, leaf)
    return leaf

  return jax.tree_util.tree_map_with_path(clean, opt_state)


# ----------------------------------------------------------------------------------------------------------- scores


def _scores(criterion: Criterion, slot: Pruned, params: Params, update: Update) -> Matrices:
  if criterion == 'magnitude':
    return criteria.magnitude(matrices(params))
  if criterion == 'random':
    return criteria.random(matrices(params), jax.random.fold_in(update.context.key, 0))
  return matrices(slot.scores)


def _remember(criterion: Criterion, scores: Any, update: Update) -> Any:
  """first_order: a <- MEMORY a + (1 - MEMORY) |g w|. movement: S <- S - g w (arXiv 2005.07683; there times a rate).

  g and w of the step that was just taken, before it. Without the learning rate late steps weigh as much as early ones.
  """
  if not scores:
    return scores
  layers, before = update.grads['layers'], update.before['layers']
  taylor = {name: layers[name].astype(jnp.float32) * before[name].astype(jnp.float32) for name in scores['layers']}
  if criterion == 'movement':
    return {'layers': {name: s - taylor[name] for name, s in scores['layers'].items()}}
  return {'layers': {name: MEMORY * s + (1 - MEMORY) * jnp.abs(taylor[name]) for name, s in scores['layers'].items()}}


def _exchanged(step: jax.Array, begin: int, last: int) -> jax.Array:
  """DROP/2 (1 + cos(pi p)), p the way from the first refresh, which only prunes, to the last."""
  p = jnp.clip((step - begin) / max(last - begin, 1), 0, 1)
  return jnp.where(step <= begin, 0.0, DROP / 2 * (1 + jnp.cos(jnp.pi * p)))


def _zeros(params: Params) -> Params:
  layers = params['layers']
  return {name: jnp.zeros(layers[name].shape, jnp.float32) for name in SITES if name in layers}
