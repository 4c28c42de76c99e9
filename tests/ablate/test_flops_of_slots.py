"""FLOPs are those of all slots of a batch, and the dry run, run.json, the curves and the budgets agree about them."""

import dataclasses
import importlib
import json
import math
import pkgutil

import pytest
import tiny
from fakes import arms_of, experiment

from slm_jax import distill, prune, train
from slm_jax.ablate import budget, cost, measure, results
from slm_jax.ablate.arms import expand
from slm_jax.data.config import DataConfig
from slm_jax.distill.cached import CachedDistill
from slm_jax.distill.crossed import CrossDistill
from slm_jax.distill.features import Features, Relations
from slm_jax.distill.logits import Distill, SelfDistill
from slm_jax.distill.on_policy import OnPolicy
from slm_jax.distill.sequence import SequenceDistill
from slm_jax.ema import Ema
from slm_jax.experiment import Config
from slm_jax.model.flops import flops_per_token
from slm_jax.preempt import EXIT_DONE
from slm_jax.prune.l0 import L0
from slm_jax.prune.transform import Prune
from slm_jax.step import TransformConfig

PROMPTED = DataConfig(sources=('addition',), documents=200, packing='single', prompt_end='=', seq_len=64, batch_size=8)
PADDED = dataclasses.replace(PROMPTED, packing='whole', prompt_end='')
FEATURES = Features('teacher', layers=('1:2',))
RELATIONS = Relations('teacher', heads=1)
CHAINS = {
  'none': (),
  'ema': (Ema(0.9),),
  'prune': (Prune(0.5),),
  'ticket': (Prune(0.0, ticket='student'),),
  'l0': (L0(channels=0.5),),
  'distill': (Distill('teacher'),),
  'two teachers': (Distill('teacher', co_teachers=('other',)),),
  'top_k': (Distill('teacher', signal='top_k', k=4),),
  'self': (SelfDistill(),),
  'features': (FEATURES,),
  'relations': (RELATIONS,),
  'one teacher for all': (Distill('teacher'), FEATURES, RELATIONS),
  'on_policy': (OnPolicy(cold_start=True, max_new=8), Distill('teacher', divergence='reverse_kl')),
  'cached': (CachedDistill('teacher', k=4),),
  'sequence': (SequenceDistill('teacher', documents=5),),
  'crossed': (CrossDistill('teacher', length=96),),
}
OTHERS = [
  {'name': 'teacher', 'model.n_layers': 4, 'model.d_ff': 48},
  {'name': 'other', 'model.n_layers': 3},
  {'name': 'student'},
]


def base(**changes):
  return dataclasses.replace(tiny.config(6), transforms=(), **changes)


def kinds():
  """Of all transforms in the tree."""
  for package in (distill, prune):
    for module in pkgutil.iter_modules(package.__path__, f'{package.__name__}.'):
      importlib.import_module(module.name)

  def below(cls):
    return [one for sub in cls.__subclasses__() for one in (sub, *below(sub))]

  return {cls.kind for cls in below(TransformConfig) if hasattr(cls, 'kind') and cls.__module__.startswith('slm_jax.')}


def test_every_transform_of_the_tree_is_tried():
  assert {part.kind for chain in CHAINS.values() for part in chain} == kinds()


@pytest.mark.parametrize('changes', [{}, {'train.accumulate': 4}], ids=['whole', 'accumulated'])
@pytest.mark.parametrize('name', CHAINS)
def test_a_dry_run_and_a_run_count_the_same(name, changes, tmp_path):
  config = base(data=PROMPTED) if name == 'on_policy' else base()
  arms = arms_of(
    experiment(base=config, sweep=[*OTHERS, {'name': 'tried', 'transforms': CHAINS[name], 'seed': 1, **changes}])
  )
  (tried,) = (arm for arm in arms if arm.name == 'tried')
  everyone = {arm.arm_id: arm for arm in arms}
  job = measure.stand_in(tried.config, everyone, tmp_path, allocate=False)
  assert cost.model_flops(tried, everyone) == train.model_flops(job) > 0


def test_a_pass_of_one_teacher_for_several_transforms_counts_once():
  found = {}
  for name in ('none', 'distill', 'features', 'relations', 'one teacher for all'):
    arms = arms_of(experiment(base=base(), sweep=[*OTHERS, {'name': 'x', 'seed': 1, 'transforms': CHAINS[name]}]))
    everyone = {arm.arm_id: arm for arm in arms}
    found[name] = next(cost.model_flops(arm, everyone) for arm in arms if arm.name == 'x')
  own, slots, teacher = found['none'], 6 * base().slots, arms[0].config.model
  forward = slots * flops_per_token(teacher, 64, backward=False)
  below = slots * 2 * teacher.d_model * teacher.vocab_size  # relations need all layers and no head
  only_relations = found['relations'] - own - (forward - below)
  only_features = slots * 6 * teacher.d_model**2
  assert found['distill'] == own + forward
  assert found['one teacher for all'] == pytest.approx(own + forward + only_features + only_relations)


@pytest.mark.parametrize(
  'data',
  [
    {'data': PADDED},
    {'data': PROMPTED},
    {'data': PADDED, 'data.batch_size': 16, 'train.accumulate': 2},  # tests have eight devices
  ],
  ids=['padding', 'prompts', 'accumulated'],
)
def test_prompts_and_padding_cost_what_tokens_cost(data, tmp_path):
  module = experiment(base=base(), sweep=[{**data, 'eval.every': 3}])
  (arm,) = expand(module)
  assert train.run(arm.config, tmp_path, arm.arm_id) == EXIT_DONE
  path = tmp_path / 'arms' / arm.arm_id / 'run.json'
  summary = json.loads(path.read_text())['summary']
  config: Config = arm.config
  slots = 6 * config.data.batch_size * config.data.seq_len
  assert summary['tokens'] < 0.95 * slots  # tokens that are predicted
  assert summary['flops'] == slots * flops_per_token(config.model, config.data.seq_len)
  assert summary['flops'] == cost.predict({arm.arm_id: arm}, cost.device('v5e'))[arm.arm_id].flops
  (row,) = results.read(tmp_path)
  points = results.curve(tmp_path, row)
  assert [point.step for point in points] == [0, 3, 6]
  assert [point.flops for point in points] == pytest.approx([0, summary['flops'] / 2, summary['flops']])
  assert points[1].tokens != points[2].tokens / 2

  def a_step(arm):
    return cost.model_flops(arm, {arm.arm_id: arm}) / 6

  assert budget.spent(tmp_path, arm, a_step).flops == summary['flops']
  path.write_text('{"status": "running"}')  # before it was done: what its log says
  assert math.isclose(budget.spent(tmp_path, arm, a_step).flops, summary['flops'])
