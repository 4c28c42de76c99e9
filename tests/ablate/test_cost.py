"""Predictions: FLOPs by hand, seconds from paces or in stated terms, money from the table."""

import dataclasses

import pytest
from fakes import arms_of, experiment

from slm_jax import chips, perf
from slm_jax.ablate import cost, estimate, measure
from slm_jax.ablate.measure import Pace
from slm_jax.data.config import DataConfig
from slm_jax.distill.logits import Distill
from slm_jax.experiment import Config, RunConfig
from slm_jax.model.config import ModelConfig
from slm_jax.model.flops import flops_per_token

CHIP = cost.device('v5e', 4)
NOTHING = estimate.Terms(*[0.0] * len(estimate.Terms._fields))


@pytest.fixture
def only_the_pace(monkeypatch):
  monkeypatch.setattr(estimate, 'CPU', NOTHING)
  monkeypatch.setattr(estimate, 'ACCELERATOR', NOTHING)


@pytest.fixture
def slow_cpu(monkeypatch):
  """Products at 1 GFLOP/s, but for those of attention, and 1G numbers/s."""
  monkeypatch.setattr(perf, 'measured_products', lambda n, dtype: 1e9)
  monkeypatch.setattr(perf, 'measured_elementwise', lambda: 1e9)
  return cost.Device('cpu', 1, 1e9 / estimate.ATTENTION, 'here', here=True)


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


def test_elsewhere_seconds_come_from_the_peak_and_dollars_from_the_table(only_the_pace):
  ids, arms = sweep(
    {'name': 'listed'}, {'name': 'spot', 'run.price': 'spot', 'seed': 1}, {'name': 'mine', 'run.price': '2', 'seed': 2}
  )
  costs = cost.predict(arms, CHIP, {measure.shape_key(arm, arms): Pace(1, 1, 1, 1, 1, 1) for arm in arms.values()})
  c = costs[ids['listed']]
  assert not c.measured
  config = arms[ids['listed']].config
  own = max(estimate.FLOOR, c.flops / config.train.steps / (4 * perf.PEAK['TPU v5e'] * estimate.UTILISATION))
  forward = max(estimate.FLOOR, own / 3)
  evaluations, checkpoints = 6, 6  # at 0, 200, ... 1000; those at 0 and 500 are others
  size = 12 * c.parameters / estimate.DISK
  batches = 16  # of 65,536 bytes, in 32 sequences of 128
  expected = config.train.steps * own + evaluations * batches * forward + (checkpoints + 1) * size
  assert c.seconds == pytest.approx(expected)
  assert c.chip_hours == pytest.approx(4 * c.seconds / 3600)
  for name, price in (('listed', 1.20), ('spot', chips.table()['v5e'].prices['spot']), ('mine', 2.0)):
    assert costs[ids[name]].dollars == pytest.approx(price * c.chip_hours)
  assert c.joules == pytest.approx(c.seconds * 4 * chips.table()['v5e'].watts)
  assert 'estimate: 40% of' in cost.basis(CHIP, costs, arms)


def test_an_unknown_price_is_none_and_not_nothing():
  ids, arms = sweep({'name': 'spot', 'run.price': 'spot'})
  assert cost.predict(arms, cost.device('h200'))[ids['spot']].dollars is None


def test_here_the_first_arm_of_a_program_pays_for_compiling_it(only_the_pace):
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
  words = cost.basis(on, costs, arms)
  assert 'measured on this machine' in words
  assert 'for 4 arms; for the others an estimate: products at' in words


def test_on_part_of_the_cores_an_arm_takes_longer_and_costs_the_same(only_the_pace):
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
  alone = cost.Device('NVIDIA H200', 1, 1e15, 'here', here=True)
  assert one.seconds == cost.predict(arms, alone)[arm.arm_id].seconds
  assert one.chip_hours == pytest.approx(one.seconds / 3600)


def test_hardware_flops_are_those_of_the_traced_step():
  recomputed = {'name': 'remat', 'model.remat': 'full', 'seed': 1}  # remat is no part of an arm's identity
  ids, arms = sweep({'name': 'plain'}, recomputed, {'name': 'long', 'train.steps': 2000})
  costs = cost.predict(arms, CHIP, hardware=True)
  plain, remat, long = (costs[ids[name]] for name in ('plain', 'remat', 'long'))
  assert plain.flops == remat.flops
  assert plain.flops < plain.hardware_flops < remat.hardware_flops
  assert long.hardware_flops == 2 * plain.hardware_flops


# ------------------------------------------------------------------------------------- what was not measured


def test_a_tiny_arm_on_many_chips_takes_time_and_money():
  """For starting, compiling, the host's part of each step, evaluations, checkpoints."""
  ids, arms = sweep({'name': 'tiny', 'train.steps': 100, 'eval.every': 50}, {'name': 'none', 'train.steps': 0})
  on = cost.device('v6e', 16)
  costs = cost.predict(arms, on, processes=[[[arm_id]] for arm_id in arms])
  its = estimate.ACCELERATOR
  least = its.process + its.program + its.finish
  assert costs[ids['none']].seconds >= least + its.evaluation
  compiling = its.evaluation + its.step + 2 * its.layer
  assert costs[ids['tiny']].seconds == pytest.approx(
    least + compiling + (100 + 3 * 8) * estimate.FLOOR + 3 * its.save, rel=0.01
  )
  assert costs[ids['tiny']].dollars == pytest.approx(16 * costs[ids['tiny']].seconds / 3600 * 2.7)


def test_a_step_on_a_cpu_by_hand(slow_cpu, only_the_pace):
  model = ModelConfig(vocab_size=512, d_model=64, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=32, d_ff=128)
  data = DataConfig(seq_len=64, batch_size=4)
  (arm,) = arms_of(experiment(base=Config(model=model, data=data)))
  arms, slots, keys = {arm.arm_id: arm}, 4 * 64, 2 * 65 / 2  # keys of both layers
  products = flops_per_token(model, 64, backward=False) / 1e9
  numbers = (2 * (4 * 64 + 128) + 2 * keys + 512) / 1e9
  forward = slots * (products + 5 * numbers) + 2 * estimate.LAYER
  assert estimate.evaluation_seconds(arm, slow_cpu) == pytest.approx(forward)
  parameters = cost.predict(arms, slow_cpu)[arm.arm_id].parameters
  assert estimate.step_seconds(arm, arms, slow_cpu) == pytest.approx(3 * forward + 5 * parameters / 1e9)


def test_rates_lie_between_those_that_were_measured(monkeypatch):
  monkeypatch.setattr(perf, 'measured_products', lambda n, dtype: float(n))
  for n, expected in ((1, 32), (32, 32), (48, 48), (90, 90), (1024, 1024), (10**6, 1024)):
    assert estimate.rate(n, 'float32') == pytest.approx(expected)


def test_gradients_are_exchanged_among_chips():
  large = ModelConfig(d_model=1024, n_layers=24, n_heads=16, n_kv_heads=16, head_dim=64, d_ff=4096)
  short = DataConfig(seq_len=8, batch_size=256)
  (arm,) = arms_of(experiment(base=Config(model=large, data=short)))
  arms, on = {arm.arm_id: arm}, cost.device('v5e', 256)
  sent = 2 * 4 * cost.predict(arms, on)[arm.arm_id].parameters * 255 / 256
  assert estimate.step_seconds(arm, arms, on) == pytest.approx(sent / 200e9)
  sharded = dataclasses.replace(arm.config, run=RunConfig(fsdp=256))
  assert estimate.step_seconds(arm._replace(config=sharded), arms, on) == pytest.approx(1.5 * sent / 200e9)


# ----------------------------------------------------------------------------------------- several in one program

TEACHER = {'name': 'teacher', 'model.n_layers': 8, 'transforms': ()}
FAMILY = [
  TEACHER,
  *(
    {'name': 'taught', 'transforms': (Distill('teacher'),), 'optim.learning_rate': rate, 'data.seed': seed}
    for rate in (0.1, 0.2, 0.3)
    for seed in (0, 1)
  ),
]


def test_arms_of_one_program_start_and_compile_once_and_share_their_teacher(slow_cpu, only_the_pace):
  arms = {arm.arm_id: arm for arm in arms_of(experiment(base=Config(model=ModelConfig(n_layers=2)), sweep=FAMILY))}
  teacher, *taught = arms
  pace = Pace(compiling=50.0, starting=0.0, step=1.0, eval_batch=0.0, save=0.0, steps=1)
  paces = {measure.shape_key(arms[taught[0]], arms): pace}
  alone = cost.predict(arms, slow_cpu, paces)
  together = cost.predict(arms, slow_cpu, paces, processes=[[[teacher], taught]])
  assert alone[taught[0]].seconds == 50 + 1000
  assert sum(alone[arm].seconds for arm in taught) == 50 + 6 * 1000
  first = arms[taught[0]]
  shared = estimate.step_seconds(first, arms, slow_cpu) - estimate.step_seconds(
    first._replace(config=dataclasses.replace(first.config, transforms=()), parents={}), arms, slow_cpu
  )
  share = shared / estimate.step_seconds(first, arms, slow_cpu)  # of a step, for the teacher
  assert 0.2 < share < 0.8
  expected = 50 + 1000 * (6 * (1 - share) + 2 * share)  # two orders of the data
  assert sum(together[arm].seconds for arm in taught) == pytest.approx(expected)
  assert len({together[arm].seconds for arm in taught}) == 1
  assert all(together[arm].measured for arm in taught)
  assert together[teacher].seconds == alone[teacher].seconds
  assert all(together[arm].flops == alone[arm].flops for arm in arms)


def test_one_process_starts_once_whatever_it_runs(monkeypatch):
  monkeypatch.setattr(estimate, 'ACCELERATOR', NOTHING._replace(process=60.0, program=7.0))
  ids, arms = sweep({'name': 'a'}, {'name': 'b', 'model.n_layers': 3}, {'name': 'c', 'optim.learning_rate': 0.1})
  a, b, c = (ids[name] for name in 'abc')

  def besides(processes):
    costs, bare = cost.predict(arms, CHIP, processes=processes), cost.predict(arms, CHIP)
    return sum(costs[i].seconds - bare[i].seconds for i in arms) + 7.0 * 3

  assert besides([[[a], [b], [c]]]) == pytest.approx(60 + 3 * 7)
  assert besides([[[a]], [[b]], [[c]]]) == pytest.approx(3 * 60 + 3 * 7)
  assert besides([[[a, c], [b]]]) < 60 + 3 * 7  # which a worker does on one chip


@pytest.mark.parametrize(
  'on, run, expected',
  [
    (cost.device('v5e', 1), RunConfig(), [['a', 'c'], ['b']]),
    (cost.device('v5e', 4), RunConfig(), [['a'], ['b'], ['c']]),  # each over all chips
    (cost.device('v5e', 4), RunConfig(data_parallel=1), [['a', 'c'], ['b']]),
    (cost.device('v5e', 4)._replace(part=0.25), RunConfig(), [['a', 'c'], ['b']]),
    (cost.device('v5e', 1), RunConfig(population=False), [['a'], ['b'], ['c']]),
  ],
)
def test_arms_train_together_where_a_worker_would_do_that(on, run, expected):
  base = Config(model=ModelConfig(n_layers=2), run=run)
  arms = arms_of(
    experiment(
      base=base,
      sweep=[{'name': 'a'}, {'name': 'b', 'model.n_layers': 3}, {'name': 'c', 'optim.learning_rate': 0.1}],
    )
  )
  names = {arm.arm_id: arm.name for arm in arms}
  found = cost.programs(arms, on)
  assert sorted([names[i] for i in program] for program in found) == expected


def test_arms_of_one_kind_wait_for_each_other_only_if_one_is_not_ready():
  """As in the quickstart: what starts from a teacher shares its program with what starts from nothing."""
  students = [{'name': 'scratch'}, {'name': 'cut', 'init.arm': 'teacher'}, {'name': 'late', 'init.arm': 'cut'}]
  arms = arms_of(experiment(base=Config(model=ModelConfig(n_layers=2)), sweep=[TEACHER, *students]))
  found = cost.programs(arms, cost.device('v5e', 1))
  names = {arm.arm_id: arm.name for arm in arms}
  assert [[names[i] for i in program] for program in found] == [['teacher'], ['scratch', 'cut'], ['late']]
