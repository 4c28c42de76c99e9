"""A workdir read as a table, whatever state its arms are in."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeTrain, arms_of, experiment

from launch.local import run_arms
from launch.plan import Plan
from slm_jax.ablate import plots, results, table, workdir
from slm_jax.ablate.sweep import product, seeds
from slm_jax.config import ConfigError
from slm_jax.distill.online import Distill

METHODS = [
  {'name': 'teacher', 'model.n_layers': 4},
  {'name': 'scratch'},
  {'name': 'distilled', 'transforms': (Distill('teacher'),)},
]
LOSSES = {'teacher': 1.2, 'scratch': 1.5, 'distilled': 1.4}


def launched(path: Path, sweep=None, train=None, **overrides) -> list:
  """Arms of the three methods with three seeds, recorded and run."""
  module = experiment(sweep=sweep or list(product(seeds(3), METHODS)))
  arms = arms_of(module, **overrides)
  Plan(module, path, arms, [], 'scratch').record()
  run_arms(arms, path, train=train or FakeTrain(LOSSES), say=lambda line: None)
  return arms


def test_rows_hold_what_each_arm_is_and_reached(tmp_path):
  arms = launched(tmp_path)
  rows = results.read(tmp_path)
  assert [row.arm_id for row in rows] == [arm.arm_id for arm in arms]
  for row, arm in zip(rows, arms, strict=True):
    assert (row.name, row.status, row.seeds) == (arm.name, 'done', (arm.config.seed, arm.config.seed))
    assert row.summary['loss'] == LOSSES[arm.name] + 0.01 * arm.config.seed
    assert row.config['model.n_layers'] == arm.config.model.n_layers


def test_csv_has_a_line_an_arm_with_what_differs(tmp_path):
  arms = launched(tmp_path)
  path = results.write_csv(tmp_path, results.read(tmp_path))
  with open(path, newline='') as file:
    lines = list(csv.DictReader(file))
  assert [line['arm_id'] for line in lines] == [arm.arm_id for arm in arms]
  assert [line['model.n_layers'] for line in lines[:3]] == ['4', '2', '2']
  assert float(lines[2]['loss']) == 1.4
  assert lines[2]['transforms'] == '["distill"]'
  assert 'model.d_model' not in lines[0]  # the same everywhere
  assert [p.name for p in tmp_path.iterdir() if 'tmp' in p.name] == []


def test_groups_join_seeds_and_keep_arms_of_one_name_apart(tmp_path):
  launched(tmp_path)
  launched(tmp_path, **{'train.steps': '10'})
  groups = results.groups(results.read(tmp_path))
  assert sorted(len(rows) for rows in groups.values()) == [3] * 6
  assert len({name.split(' (')[0] for name in groups}) == 3


def test_every_status_is_told(tmp_path):
  train = FakeTrain(LOSSES, teacher=1, scratch=RuntimeError('a bug'))
  launched(tmp_path, sweep=[*METHODS, {'name': 'fine', 'train.steps': 7}], train=train)
  rows = results.read(tmp_path)
  assert [row.status for row in rows] == ['nan', 'missing', 'blocked', 'done']
  results.write_csv(tmp_path, rows)
  lines = table.lines(rows, 'scratch')
  assert 'cannot tell: no seed in common' in [line.verdict for line in lines]
  assert '0 of 1' in table.text(lines)


def test_a_damaged_file_hides_no_other_arm(tmp_path):
  arms = launched(tmp_path)
  folder = workdir.folder(tmp_path, arms[0].arm_id)
  (folder / 'run.json').write_text('{"summ')
  (folder / 'samples.json').write_text('[3]')
  rows = results.read(tmp_path)
  assert len(rows) == 9
  assert rows[0].summary == {}
  assert results.samples(tmp_path, rows[0]) == []
  assert results.write_csv(tmp_path, rows).exists()


def test_a_torn_last_line_of_metrics_is_left_out(tmp_path):
  arms = launched(tmp_path)
  row = results.read(tmp_path)[0]
  whole = results.curve(tmp_path, row)
  path = workdir.folder(tmp_path, arms[0].arm_id) / 'metrics.jsonl'
  text = path.read_text()
  path.write_text(text[:-5])
  assert results.curve(tmp_path, row) == whole[:-1] != []


def test_curves_are_in_tokens_and_in_flops_of_the_whole_step(tmp_path):
  launched(tmp_path)
  points = results.curve(tmp_path, results.read(tmp_path)[0])
  assert [(p.tokens, p.flops) for p in points] == [(0, 0), (500, 1e6), (1000, 2e6)]


def test_mean_curve_is_over_the_steps_that_all_seeds_have():
  runs = [[results.Point(s, 10 * s, None, loss + s) for s in steps] for steps, loss in (((0, 1, 2), 1), ((1, 2, 3), 3))]
  xs, means, halves = plots.mean_curve(runs, 'tokens')
  assert (xs, means) == ([10, 20], [3, 4])
  np.testing.assert_allclose(halves, 12.7062, rtol=1e-5)  # t(0.975, 1) * sqrt(2) / sqrt(2)


def test_differences_are_to_the_baselines_same_seed(tmp_path):
  launched(tmp_path)
  by_name = {line.name: line for line in table.lines(results.read(tmp_path), 'scratch')}
  assert by_name['scratch'].difference is None
  assert by_name['distilled'].difference == pytest.approx((-0.1, 0, 0, 3), abs=1e-12)
  assert by_name['distilled'].loss.mean == pytest.approx(1.41)


@pytest.mark.parametrize(
  'text, message',
  [
    ('{"format": 2}', 'format 2, written by a newer version (this one knows 1)'),
    ('{"form', 'cannot be read'),
    ('[]', 'cannot be read'),
    ('{"format": 1, "name": "x"}', 'cannot be read'),
  ],
)
def test_a_foreign_experiment_json_is_one_line(tmp_path, text, message):
  (tmp_path / 'experiment.json').write_text(text)
  with pytest.raises(ConfigError) as error:
    results.read(tmp_path)
  assert message in str(error.value)
  assert str(tmp_path) in str(error.value)
  assert '\n' not in str(error.value)


def test_experiment_json_keeps_everything_and_the_order_of_arms(tmp_path):
  arms = {f'{i:x}': {'name': str(i), 'diff': {'a': [1, None]}} for i in (3, 1, 2)}
  written = workdir.Experiment('e', 'q', 'b', 'a', ('3', '1'), arms)
  workdir.write_experiment(tmp_path, written)
  read = workdir.read_experiment(tmp_path)
  assert read == written
  assert list(read.arms) == list(arms)


def test_short_numbers():
  assert [table.short(x) for x in (0, 999, 1234, 118_000, 4.096e6, 1.64e13, 2e18, None)] == [
    *('0', '999', '1.23K', '118K', '4.1M', '16.4T', '2E', '–')
  ]


def test_json_of_results_is_json(tmp_path):
  arms = launched(tmp_path)
  config = json.loads((workdir.folder(tmp_path, arms[0].arm_id) / 'config.json').read_text())
  assert config['model']['n_layers'] == 4
