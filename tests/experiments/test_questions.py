"""The experiments that come with the code: they expand, they can be launched, and their verdicts follow the numbers."""

import numpy as np
import pytest
from fakes import arms_of, summary, verdicts_of
from hypothesis import given
from hypothesis import strategies as st

from experiments import kd_weight, low_precision, lr_and_width, tokens_vs_parameters
from launch import cli
from slm_jax.ablate import population
from slm_jax.ablate.results import Row
from slm_jax.ablate.scaling import Chinchilla
from slm_jax.config import flatten
from slm_jax.model.flops import parameter_count

QUESTIONS = (lr_and_width, kd_weight, low_precision, tokens_vs_parameters)


def rows_of(module, loss, **more):
  """What a workdir would hold if `loss(config, rng)` were what every arm came to."""
  rows = []
  for i, arm in enumerate(arms_of(module)):
    config, rng = arm.config, np.random.default_rng(i)
    tokens = config.train.steps * config.data.batch_size * config.data.seq_len
    known = {'parameters': parameter_count(config.model), 'tokens': tokens, **more}
    its = summary(loss(config, rng), **known)
    rows.append(Row(arm.arm_id, arm.name, arm.group, 'done', flatten(config), its, {}))
  return rows


def verdicts(module, loss, **more):
  return verdicts_of(module.report(rows_of(module, loss, **more)))


# ---------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize(
  'module,sizes', [(lr_and_width, [21] * 7), (kd_weight, [1, 39]), (tokens_vs_parameters, [2] * 20)]
)
def test_arms_that_differ_in_numbers_and_seeds_only_are_one_population(module, sizes):
  arms = arms_of(module)
  assert len({arm.arm_id for arm in arms}) == sum(sizes)
  assert len({arm.name for arm in arms}) == len({arm.group for arm in arms})
  groups = population.groups({arm.arm_id: arm.config for arm in arms})
  assert sorted(map(len, groups)) == sorted(sizes)


@pytest.mark.parametrize('module', QUESTIONS)
def test_a_launch_can_be_shown_and_wrong_settings_are_refused(module, tmp_path, capsys):
  workdir = tmp_path / 'runs'
  assert cli.launch(module, ['--dry_run', f'--workdir={workdir}']) == 0
  shown = capsys.readouterr().out
  assert all(arm_id in shown for arm_id in (arm.arm_id for arm in cli.expand(module)))
  assert not workdir.exists()
  with pytest.raises(SystemExit) as ended:
    cli.main(module, ['--config.optim.name=muon', '--config.model.mup_base_width=16', f'--workdir={workdir}'])
  assert ended.value.code == 1
  error = capsys.readouterr().err
  assert error.count('\n') == 1
  assert 'has no muP' in error


@pytest.mark.parametrize('module', QUESTIONS)
def test_the_expectation_stands_in_the_docstring(module):
  assert 'Expected, written before the run' in module.__doc__


# --------------------------------------------------------------------------------------------------- lr_and_width


def valley(plain, mup, jitter=0.0, centre=-4.5):
  """Losses that are parabolas in log2 of the rate; the best one moves by so many octaves with each octave of width."""

  def loss(config, rng):
    octaves = np.log2(config.model.d_model / 16)
    at = centre + octaves * (mup if config.model.mup_base_width else plain)
    at += jitter * np.random.default_rng([config.seed, config.model.d_model, config.model.mup_base_width]).normal()
    return 1 + 0.1 * (np.log2(config.optim.learning_rate) - at) ** 2

  return loss


@pytest.mark.parametrize(
  'loss,expected',
  [
    (valley(-0.8, 0.0, jitter=0.05), ['REPRODUCED', 'REPRODUCED']),
    (valley(0.0, -0.8, jitter=0.05), ['NOT REPRODUCED', 'NOT REPRODUCED']),
    (valley(-0.5, -0.25, jitter=0.3), ['CANNOT TELL', 'CANNOT TELL']),
    (valley(-0.8, 0.0, centre=-1.0), ['CANNOT TELL', 'CANNOT TELL']),  # beyond the largest rate
  ],
)
def test_learning_rate_transfer(loss, expected):
  assert verdicts(lr_and_width, loss) == expected


def test_the_drift_is_found_exactly_where_there_is_no_noise():
  rates, losses = lr_and_width.read(rows_of(lr_and_width, valley(-0.7, 0.1)))
  assert lr_and_width.drift(rates, losses['plain']) == pytest.approx(-0.7)
  assert lr_and_width.drift(rates, losses['muP']) == pytest.approx(0.1)
  assert 'beyond' not in str(lr_and_width.report(rows_of(lr_and_width, valley(-0.7, 0.1))))
  assert 'beyond' in str(lr_and_width.report(rows_of(lr_and_width, valley(-0.7, 0.1, centre=-1.0))))


@given(
  at=st.floats(-6, -4),
  curvature=st.floats(0.01, 10),
  low=st.floats(-5, 5),
  gaps=st.lists(st.floats(0.5, 2), min_size=6),
)
def test_the_vertex_of_any_parabola_whatever_the_rates(at, curvature, low, gaps):
  rates = -8 + np.cumsum(gaps)
  losses = low + curvature * (rates - at) ** 2
  found = lr_and_width.best(rates, losses[None])
  if found.inside:
    assert found.rate == pytest.approx(at, abs=1e-4)
    assert found.loss == pytest.approx(low, abs=1e-4)
  else:
    assert found.rate in (rates[0], rates[-1])


# ------------------------------------------------------------------------------------------------------ kd_weight


def listening(by_weight, by_temperature, noise=0.0):
  """Losses with noise; where no setting makes a difference, their means over the seeds are equal."""

  def loss(config, rng):
    if not config.transforms:
      return 0.5
    distill = config.transforms[0]
    pull = by_weight * distill.weight + by_temperature * distill.weight * np.log2(distill.temperature)
    if by_weight == by_temperature == 0:
      swing = np.cos(2 * np.pi * config.seed / kd_weight.SEEDS)
      return 2 + 0.3 * config.seed + noise * swing * distill.weight * distill.temperature
    return 2 + pull + 0.3 * config.seed + noise * rng.normal()

  return loss


@pytest.mark.parametrize(
  'loss,expected',
  [
    (listening(-0.2, 0.05, 0.001), 'REPRODUCED'),
    (listening(0.2, -0.05, 0.001), 'NOT REPRODUCED'),
    (listening(0.0, 0.0, 0.1), 'CANNOT TELL'),
  ],
)
def test_the_best_weight_and_temperature(loss, expected):
  """Losses differ between seeds by more than between settings: only pairs can tell."""
  assert verdicts(kd_weight, loss) == [expected] * 5  # four comparisons, and that all of them hold


# ------------------------------------------------------------------------------------------ tokens_vs_parameters


def law(noise, **changes):
  true = Chinchilla(**{'E': 0.28, 'A': 300.0, 'B': 300.0, 'alpha': 0.5, 'beta': 0.5, **changes})

  def loss(config, rng):
    tokens = config.train.steps * config.data.batch_size * config.data.seq_len
    return float(true.loss(parameter_count(config.model), tokens)) * (1 + noise * rng.normal())

  return loss


@pytest.mark.parametrize(
  'loss,floor,expected',
  [
    (law(1e-3), 0.28, ['REPRODUCED', 'REPRODUCED']),
    (law(1e-3, alpha=0.25, A=10.0, beta=0.75, B=9000.0), 0.1, ['NOT REPRODUCED', 'NOT REPRODUCED']),
    (law(0.05), 0.28, ['CANNOT TELL', 'CANNOT TELL']),
  ],
)
def test_scaling_law(loss, floor, expected):
  assert verdicts(tokens_vs_parameters, loss, floor=floor) == expected


def test_one_learning_rate_rule_for_all_widths():
  rates = {a.config.model.d_model: a.config.optim.learning_rate for a in arms_of(tokens_vs_parameters)}
  slopes = np.diff(np.log(list(rates.values()))) / np.diff(np.log(list(rates)))
  assert np.ptp(slopes) == pytest.approx(0, abs=1e-9)
  assert slopes[0] < 0


# --------------------------------------------------------------------------------------------------- low_precision


@pytest.mark.parametrize(
  'low,all_low,expected',
  [
    (1.001, 1.05, ['REPRODUCED', 'REPRODUCED']),
    (1.05, 1.001, ['NOT REPRODUCED', 'NOT REPRODUCED']),
  ],
)
def test_what_low_precision_costs_is_read_off_the_losses(low, all_low, expected):
  def loss(config, rng):
    at = {('float32', 'float32'): 1.0, ('bfloat16', 'float32'): low, ('bfloat16', 'bfloat16'): all_low}
    return at[config.model.dtype, config.model.param_dtype] + 1e-4 * rng.normal()

  assert verdicts(low_precision, loss) == expected
