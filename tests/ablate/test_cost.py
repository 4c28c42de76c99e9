"""Predictions: FLOPs by hand, seconds from paces or from peaks, money from the table."""

import pytest
from fakes import arms_of, experiment

from slm_jax import chips, perf
from slm_jax.ablate import cost, measure
from slm_jax.ablate.measure import Pace
from slm_jax.distill.logits import Distill
from slm_jax.experiment import Config
from slm_jax.model.config import ModelConfig
from slm_jax.model.flops import flops_per_token

CHIP = cost.device('v5e', 4)


def sweep(*changes):
  base = Config(model=ModelConfig(n_layers=2))
  arms = arms_of(experiment(base=base, sweep=list(changes)))
  return {arm.name: arm.arm_id for arm in arms}, {arm.arm_id: arm for arm in arms}


def test_flops_are_three_forward_passes_and_one_of_each_teacher():
  ids, arms = sweep(
    {'name': 'teacher', 'model.n_layers': 5},
    {'name': 'plain'},
    {'name': 'taught', 'transforms': (Distill('teacher'),)},
    {'name': 'cut', 'init.arm': 'teacher'},
  )
  costs = cost.predict(arms, CHIP)
  config = arms[ids['plain']].config
  tokens = config.train.steps * config.data.batch_size * config.data.seq_len
  own, teacher = (flops_per_token(arms[ids[name]].config.model, config.data.seq_len) for name in ('plain', 'teacher'))
  assert costs[ids['plain']].flops == pytest.approx(tokens * own)
  assert costs[ids['taught']].flops == pytest.approx(tokens * (own + teacher / 3))
  assert costs[ids['cut']].flops == costs[ids['plain']].flops  # a parent's training is in its own row


def test_elsewhere_seconds_come_from_the_peak_and_dollars_from_the_table():
  ids, arms = sweep(
    {'name': 'listed'}, {'name': 'spot', 'run.price': 'spot', 'seed': 1}, {'name': 'mine', 'run.price': '2', 'seed': 2}
  )
  costs = cost.predict(arms, CHIP, {measure.shape_key(arm, arms): Pace(1, 1, 1, 1, 1, 1) for arm in arms.values()})
  c = costs[ids['listed']]
  assert not c.measured
  assert c.seconds == pytest.approx(c.flops / (4 * perf.PEAK['TPU v5e'] * cost.UTILISATION))
  assert c.chip_hours == pytest.approx(4 * c.seconds / 3600)
  for name, price in (('listed', 1.20), ('spot', chips.table()['v5e'].prices['spot']), ('mine', 2.0)):
    assert costs[ids[name]].dollars == pytest.approx(price * c.chip_hours)
  assert c.joules == pytest.approx(c.seconds * 4 * chips.table()['v5e'].watts)
  assert 'estimate, 35%' in cost.basis(CHIP, list(costs.values()))


def test_an_unknown_price_is_none_and_not_nothing():
  ids, arms = sweep({'name': 'spot', 'run.price': 'spot'})
  assert cost.predict(arms, cost.device('h200'))[ids['spot']].dollars is None


def test_here_the_first_arm_of_a_program_pays_for_compiling_it():
  pace = Pace(compiling=50.0, starting=1.0, step=0.0, eval_batch=0.0, save=0.0, steps=30)
  ids, arms = sweep(
    {'name': 'a', 'train.steps': 10},
    {'name': 'b', 'train.steps': 10, 'optim.learning_rate': 0.1},
    {'name': 'c', 'train.steps': 20},
    {'name': 'probed', 'train.steps': 30},
    {'name': 'unmeasured', 'model.n_layers': 3},
  )
  on = cost.device()
  paces = {measure.shape_key(arms[ids['a']], arms): pace}
  costs = cost.predict(arms, on, paces)
  assert [costs[ids[name]].seconds for name in ('a', 'b', 'c', 'probed')] == [50, 1, 50, 1]
  assert [c.measured for c in costs.values()] == [True] * 4 + [False]
  words = cost.basis(on, list(costs.values()))
  assert 'measured on this machine' in words
  assert 'for 4 arms; for the others an estimate, 35%' in words


def test_on_part_of_the_cores_an_arm_takes_longer_and_costs_the_same():
  ids, arms = sweep({'name': 'a', 'run.price': '3'})
  (arm,) = arms.values()
  paces = {measure.shape_key(arm, arms): Pace(1.0, 1.0, 0.1, 0.0, 0.0, 1)}
  on = cost.device()
  (alone,), (shared,) = (cost.predict(arms, on._replace(part=part), paces).values() for part in (1.0, 0.5))
  assert shared.seconds == pytest.approx(2 * alone.seconds)
  for field in ('chip_hours', 'dollars', 'joules', 'measured'):
    assert getattr(shared, field) == pytest.approx(getattr(alone, field))
  gpus = cost.Device('NVIDIA H200', 8, 8e15, 'here', here=True)
  assert cost.predict(arms, gpus, paces)[arm.arm_id].measured
  # What all eight do together says nothing of one.
  one = cost.predict(arms, gpus._replace(part=1 / 8), paces)[arm.arm_id]
  assert not one.measured
  assert one.seconds == pytest.approx(one.flops / (1e15 * cost.UTILISATION))
  assert one.chip_hours == pytest.approx(one.seconds / 3600)


def test_hardware_flops_are_those_of_the_traced_step():
  recomputed = {'name': 'remat', 'model.remat': 'full', 'seed': 1}  # remat is no part of an arm's identity
  ids, arms = sweep({'name': 'plain'}, recomputed, {'name': 'long', 'train.steps': 2000})
  costs = cost.predict(arms, CHIP, hardware=True)
  plain, remat, long = (costs[ids[name]] for name in ('plain', 'remat', 'long'))
  assert plain.flops == remat.flops
  assert plain.flops < plain.hardware_flops < remat.hardware_flops
  assert long.hardware_flops == 2 * plain.hardware_flops
