"""Comparisons at equal cost: curves whose values at any budget are known."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_jax.ablate import controls, table
from slm_jax.ablate.results import Point, Row


def row(name, seed=0, parent_flops=0.0, loss=1.0, **summary):
  config = {'seed': seed, 'data.seed': seed}
  used = {'loss': loss, 'parent_flops': parent_flops, **summary}
  return Row(f'{name}{seed}', name, name, 'done', config, used, {})


def curve(until, a_token=10.0, slope=0.1, start=5.0, n=5):
  """loss = start - slope * ln(tokens), evaluated at n equal steps, and before the first."""
  at = [until * i / n for i in range(n + 1)]
  return [Point(i, x, a_token * x, start - slope * math.log(x) if x else 9.0) for i, x in enumerate(at)]


def read(unit, rows, curves):
  found = {control.unit: control for control in controls.controls(rows, curves)}
  return found[unit].budget, found[unit].losses


ROWS = [row('short'), row('long'), row('child', parent_flops=4000.0)]
CURVES = {'short0': curve(1000), 'long0': curve(8000), 'child0': curve(1000, a_token=20.0)}


def test_at_equal_tokens():
  budget, losses = read('tokens', ROWS, CURVES)
  assert budget == 1000
  # between 0 and 1600 tokens there is no evaluation of 'long'; a curve straight in ln tokens is read exactly
  assert losses == pytest.approx({'short0': 5 - 0.1 * math.log(1000), 'child0': 5 - 0.1 * math.log(1000)})


def test_at_equal_flops_an_arm_with_a_teacher_has_seen_fewer_tokens():
  curves = {**CURVES, 'long0': curve(8000, n=40)}
  budget, losses = read('flops', ROWS, curves)
  assert budget == 10_000
  wanted = {'short0': 5 - 0.1 * math.log(1000), 'long0': 5 - 0.1 * math.log(1000), 'child0': 5 - 0.1 * math.log(500)}
  assert losses == pytest.approx(wanted, abs=2e-3)  # straight between evaluations of a line that is straight


def test_at_equal_pipeline_flops_the_parents_come_first():
  curves = {**CURVES, 'long0': curve(8000, n=40)}
  budget, losses = read('pipeline', ROWS, curves)
  assert budget == 10_000
  assert losses['short0'] == pytest.approx(5 - 0.1 * math.log(1000))
  # 6000 of the 10,000 are its own: 300 tokens, between evaluations at 200 (8000 in all) and 400 (12,000 in all)
  low, high = (5 - 0.1 * math.log(tokens) for tokens in (200, 400))
  share = math.log(10_000 / 8000) / math.log(12_000 / 8000)
  assert losses['child0'] == pytest.approx(low + share * (high - low))


def test_an_arm_whose_parents_took_more_has_no_loss():
  rows = [row('short'), row('child', parent_flops=10_001.0)]
  _, losses = read('pipeline', rows, {'short0': CURVES['short0'], 'child0': CURVES['child0']})
  assert set(losses) == {'short0'}


@given(st.floats(100, 1e6), st.floats(0.01, 1), st.integers(2, 50))
def test_reading_a_curve_at_its_points_gives_its_losses_and_between_them_what_lies_between(until, slope, n):
  points = curve(until, slope=slope, n=n)
  xs, losses = [p.tokens for p in points], [p.loss for p in points]
  for x, loss in zip(xs[1:], losses[1:], strict=True):
    assert controls.read_off(xs, losses, x) == pytest.approx(loss, abs=0.011 * slope)  # near the end, at the end
  for i in range(1, n):
    between = controls.read_off(xs, losses, math.sqrt(xs[i] * xs[i + 1]))
    assert losses[i + 1] <= between <= losses[i]
  assert controls.read_off(xs, losses, 0.5 * xs[1]) is None
  assert controls.read_off(xs, losses, 2 * until) == losses[-1]


def test_seeds_that_differ_by_a_few_tokens_are_read_at_their_ends():
  rows = [row('a', seed) for seed in range(3)]
  curves = {f'a{seed}': curve(1000 + seed) for seed in range(3)}
  _, losses = read('tokens', rows, curves)
  assert losses == {arm: points[-1].loss for arm, points in curves.items()}


def test_runs_without_a_curve_or_a_result_are_not_compared():
  rows = [*ROWS, row('none'), row('failed')._replace(summary={})]
  curves = {**CURVES, 'failed0': curve(1)}
  assert read('tokens', rows, curves)[0] == 1000
  untrained = [Point(0, 0.0, None, 9.0)]  # of --config.train.steps=0: measured as it starts
  budget, losses = read('tokens', [*ROWS, row('as it starts')], {**CURVES, 'as it starts0': untrained})
  assert (budget, losses) == read('tokens', ROWS, CURVES)
  assert controls.controls([row('none')], {}) == []


def test_a_unit_that_is_not_known_of_all_runs_is_left_out():
  curves = {**CURVES, 'short0': [p._replace(flops=None) for p in CURVES['short0']]}
  assert [c.unit for c in controls.controls(ROWS, curves)] == ['tokens']
  rows = [ROWS[0], ROWS[1]._replace(summary={'loss': 1.0})]
  assert [c.unit for c in controls.controls(rows, CURVES)] == ['tokens', 'flops']


def test_the_table_pairs_them_by_seed_and_explains_each_column():
  rows = [row(name, seed, p) for seed in range(3) for name, p in (('base', 0.0), ('child', 4000.0))]
  curves = {
    f'{name}{seed}': curve(1000, a_token=a, start=5 + 0.1 * seed + up)
    for seed in range(3)
    for name, a, up in (('base', 10.0, 0.0), ('child', 20.0, 0.5))
  }
  base, child = table.lines(rows, 'base', curves)
  assert list(child.at_equal) == ['tokens', 'flops', 'pipeline']
  assert base.at_equal['flops'].difference is None
  assert child.at_equal['tokens'].difference == pytest.approx((0.5, 0, 0, 3), abs=1e-9)
  assert child.at_equal['flops'].difference.mean == pytest.approx(0.5 + 0.1 * math.log(2), abs=0.01)
  assert child.at_equal['pipeline'].difference.mean > child.at_equal['flops'].difference.mean
  text = table.text([base, child])
  for words in ('at equal tokens', 'At equal FLOPs: when its own training had taken 10K', 'At equal pipeline FLOPs'):
    assert words in text


def test_where_all_used_the_same_there_is_a_sentence_and_no_table():
  points = [curve(1000, start=5.0), curve(1000, start=4.0)]
  rows = [row('base', loss=points[0][-1].loss), row('other', loss=points[1][-1].loss)]
  lines = table.lines(rows, 'base', {'base0': points[0], 'other0': points[1]})
  assert table.units(lines) == []
  assert 'no arm used more than another. No arm builds on another, so that pipeline FLOPs' in table.text(lines)
  assert 'at equal tokens  ' not in table.text(lines)
  assert 'equal' not in table.text(table.lines(rows, 'base'))  # without curves there is nothing to say


def test_what_was_not_evaluated_early_enough_has_no_row_and_that_is_said():
  points = {'small': curve(1000, a_token=1.0), 'wide': curve(1000, a_token=2.0), 'wider': curve(1000, a_token=3.0)}
  late = {name: its if name == 'small' else its[-1:] for name, its in points.items()}  # one evaluation, at the end
  rows = [row(name, loss=its[-1].loss) for name, its in points.items()]

  def text(curves):
    return table.text(table.lines(rows, 'small', {f'{name}0': its for name, its in curves.items()}))

  assert 'at equal FLOPs  ' in text(points)
  assert 'left out' not in text(points)
  assert 'at equal FLOPs  ' not in text(late)  # all arms but one would be dashes
  assert 'No comparison at equal FLOPs: too few arms were evaluated so early.' in text(late)
  in_part = text({**late, 'wide': points['wide']})
  assert 'Arms that were not evaluated so early are left out.' in in_part
  below = in_part.partition('at equal FLOPs  ')[2]
  assert '\nwide  ' in below
  assert '\nwider  ' not in below
