"""A workdir read as a table, whatever state its arms are in."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeTrain, arms_of, experiment, noise

from launch.plan import Plan
from launch.worker import run_arms
from slm_jax import metrics
from slm_jax.ablate import plots, results, table, workdir
from slm_jax.ablate.sweep import product, seeds
from slm_jax.config import ConfigError
from slm_jax.distill.logits import Distill

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
    assert row.summary['loss'] == LOSSES[arm.name] + 0.01 * arm.config.seed + noise(arm.config)
    assert row.config['model.n_layers'] == arm.config.model.n_layers


def test_csv_has_a_line_an_arm_with_what_differs(tmp_path):
  arms = launched(tmp_path)
  path = results.write_csv(tmp_path, results.read(tmp_path))
  with open(path, newline='') as file:
    lines = list(csv.DictReader(file))
  assert [line['arm_id'] for line in lines] == [arm.arm_id for arm in arms]
  assert [line['model.n_layers'] for line in lines[:3]] == ['4', '2', '2']
  assert float(lines[2]['loss']) == LOSSES['distilled'] + noise(arms[2].config)
  assert 'loss_at_equal_flops' not in lines[0]  # that is for those who know the curves
  assert lines[2]['transforms'] == '["distill"]'
  assert 'model.d_model' not in lines[0]  # the same everywhere
  assert [p.name for p in tmp_path.iterdir() if 'tmp' in p.name] == []


def test_groups_join_seeds_and_keep_arms_of_one_name_apart(tmp_path):
  launched(tmp_path)
  launched(tmp_path, **{'train.steps': '10'})
  groups = results.groups(results.read(tmp_path))
  assert sorted(len(rows) for rows in groups.values()) == [3] * 6
  assert len({name.split(' (')[0] for name in groups}) == 3


def test_no_run_hides_another_of_the_same_seed(tmp_path):
  teachers = [{'name': f'teacher {i}', 'model.n_layers': 4, 'seed': i, 'data.seed': i} for i in (0, 1)]
  students = [
    {'name': name, 'transforms': (Distill(f'teacher {i}'),)} for i, name in enumerate(['kd', 'kd of another'])
  ]
  launched(tmp_path, [*teachers, *product(students, seeds(2))])
  found = results.groups(results.read(tmp_path))
  assert {name: len(rows) for name, rows in found.items()} == {
    'teacher 0': 1,
    'teacher 1': 1,
    'kd': 2,
    'kd of another': 2,
  }
  assert [line.loss.n for line in table.lines(results.read(tmp_path), 'kd')] == [1, 1, 2, 2]


def test_of_one_name_and_seed_but_parents_of_two_seeds_there_are_two_lines(tmp_path):
  for seed in (0, 1):
    teacher = {**METHODS[0], 'seed': seed, 'data.seed': seed}
    launched(tmp_path, [teacher, *product(METHODS[2:], seeds(2))])
  rows = results.read(tmp_path)
  found = results.groups(rows)
  assert [len(members) for members in found.values()] == [2, 2, 2]
  assert [len({row.parents for row in members}) for members in found.values()] == [1, 1, 1]
  assert [len({row.seeds for row in members}) for members in found.values()] == [2, 2, 2]
  assert [name.split(' (')[0] for name in found] == ['teacher', 'distilled', 'distilled']
  ordinary = [row for row in rows if row.name != 'distilled' or row.seeds[0] == int(row.parents == rows[-1].parents)]
  assert len(results.groups(ordinary)['distilled']) == 2  # one for each seed, each of its own teacher


def test_every_status_is_told(tmp_path):
  train = FakeTrain(LOSSES, teacher=1, scratch=RuntimeError('a bug'))
  launched(tmp_path, sweep=[*METHODS, {'name': 'fine', 'train.steps': 7}], train=train)
  rows = results.read(tmp_path)
  assert [row.status for row in rows] == ['diverged', 'missing', 'blocked', 'done']
  results.write_csv(tmp_path, rows)
  lines = table.lines(rows, 'scratch')
  assert lines[-1].verdict.word == 'cannot tell'
  assert '0 of 1, 1 diverged' in table.text(lines)


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
  assert by_name['distilled'].difference.mean == pytest.approx(-0.1)
  assert by_name['distilled'].difference.n == 3
  assert by_name['distilled'].loss.mean == pytest.approx(1.41)


@pytest.mark.parametrize(
  'text, message',
  [
    ('{"format": 3}', 'format 3, written by a newer version (this one knows 2)'),
    ('{"form', 'damaged (not JSON'),
    ('[]', 'damaged (it is a list, expected an object)'),
    ('{"format": 1, "name": "x"}', 'damaged (arms is null, expected a list)'),
    ('{"format": 1, "name": "x", "arms": [3]}', 'damaged (arms[0] is 3, expected an object)'),
    ('{"format": 1, "name": "x", "arms": [{"arm_id": "../x"}]}', "damaged ('../x' is no id of an arm)"),
    ('{"format": 1, "name": "x", "arms": [], "latest": ["x"]}', "damaged ('x' is no id of an arm)"),
    ('{"format": 2, "name": "x", "arms": [], "launches": [{"key": "a", "arms": ["x"]}]}', "'x' is no id of an arm"),
    ('{"format": 2, "name": "x", "arms": [], "launches": [{"key": "../a"}]}', "'../a' is no key of a launch"),
    ('{"format": 2, "name": "x", "arms": [], "launches": [{"key": "a", "when": 3}]}', 'when is 3, expected a string'),
    ('{"format": 1, "name": "x", "arms": [{"arm_id": "a", "diff": {"k": [1]}}]}', 'diff.k: expected two values'),
    ('{"format": 1, "name": 3, "arms": []}', 'damaged (name is 3, expected a string)'),
    ('{"format": 1, "name": "x", "arms": [], "wings": 2}', 'damaged (wings: unknown)'),
  ],
)
def test_a_foreign_experiment_json_is_one_line(tmp_path, text, message):
  (tmp_path / 'experiment.json').write_text(text)
  with pytest.raises(ConfigError) as error:
    workdir.read_experiment(tmp_path)
  assert message in str(error.value)
  assert str(tmp_path) in str(error.value)
  assert '\n' not in str(error.value)


def test_experiment_json_keeps_everything_and_the_order_of_arms(tmp_path):
  arms = {f'{i:x}': {'name': str(i), 'diff': {'a': [1, None]}} for i in (3, 1, 2)}
  launches = (
    workdir.Launch('one', ('3', '1'), False, '--limit=1', '2026-11-30T12:00:00+00:00', 'q', 'b', 'c0de', 'a'),
    workdir.Launch('two', ('3', '1', '2'), claims=({'what': 'a < b', 'found': '', 'verdict': 'CANNOT TELL'},)),
  )
  written = workdir.Experiment('e', launches, arms)
  workdir.write_experiment(tmp_path, written)
  read = workdir.read_experiment(tmp_path)
  assert read == written
  assert list(read.arms) == list(arms)


# ------------------------------------------------------------------------------------------------ the long table


def test_the_long_table_holds_every_number_of_every_arm(tmp_path):
  pandas = pytest.importorskip('pandas')
  arms = launched(tmp_path)
  found = results.table(tmp_path)
  assert set(found.arm_id) == {arm.arm_id for arm in arms}
  counts = {'train': 2, 'eval': 6, 'final': 12}  # metrics.jsonl: loss and tokens of a step and of three evaluations
  assert found.groupby('kind').size().to_dict() == {kind: n * len(arms) for kind, n in counts.items()}
  assert found.value.dtype == 'float64'
  # against what stands in the files, number by number
  for arm in arms:
    of_arm = found[found.arm_id == arm.arm_id]
    assert set(of_arm.name) == {arm.name}
    assert set(of_arm.seed) == set(of_arm['data.seed']) == {arm.config.seed}
    assert set(of_arm['model.n_layers']) == {arm.config.model.n_layers}
    for line in map(json.loads, (workdir.folder(tmp_path, arm.arm_id) / 'metrics.jsonl').read_text().splitlines()):
      there = of_arm[(of_arm.kind == line['kind']) & (of_arm.step == line['step'])]
      assert dict(zip(there.metric, there.value, strict=True)) == {
        k: v for k, v in line.items() if k not in ('kind', 'step')
      }
  last = found[(found.kind == 'final') & (found.metric == 'loss')]
  by_layers = last.pivot_table('value', 'model.n_layers', aggfunc=['mean', 'count'])
  assert by_layers['count'].value.to_dict() == {2: 6, 4: 3}
  assert isinstance(found, pandas.DataFrame)


def test_the_long_table_of_nothing_and_of_what_is_no_number(tmp_path):
  pytest.importorskip('pandas')
  assert len(results.table(tmp_path)) == 0
  arms = launched(tmp_path)
  folder = workdir.folder(tmp_path, arms[0].arm_id)
  (folder / 'metrics.jsonl').write_text('{"step": 1, "kind": "train", "loss": null}\n')
  found = results.table(tmp_path)
  of_arm = found[(found.arm_id == arms[0].arm_id) & (found.kind == 'train')]
  assert list(of_arm.metric) == ['loss']
  assert of_arm.value.isna().all()


def test_without_pandas_the_extra_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'pandas', None)
  with pytest.raises(ConfigError, match=r"pip install '\.\[tables\]' in the project's folder"):
    results.table(tmp_path)


# --------------------------------------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize('written', [metrics.FORMAT + 1, 99])
def test_results_of_a_newer_version_are_one_line(tmp_path, written):
  arms = launched(tmp_path)
  path = workdir.folder(tmp_path, arms[1].arm_id) / 'run.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), 'format': written}))
  with pytest.raises(ConfigError) as error:
    results.read(tmp_path)
  assert str(error.value) == f'{path}: format {written}, written by a newer version (this one knows {metrics.FORMAT})'


def test_a_run_says_in_which_format_it_writes(tmp_path):
  from slm_jax.record import Record

  Record(tmp_path, 'a', experiment().config())
  assert json.loads((tmp_path / 'run.json').read_text())['format'] == metrics.FORMAT


def test_a_damaged_line_of_metrics_is_told_and_the_others_are_used(tmp_path, caplog):
  arms = launched(tmp_path)
  path = workdir.folder(tmp_path, arms[0].arm_id) / 'metrics.jsonl'
  lines = path.read_text().splitlines(keepends=True)
  path.write_text(''.join([*lines[:2], '{"step": \x00\n', *lines[2:]]))
  row = results.read(tmp_path)[0]
  with caplog.at_level('WARNING'):
    assert results.lines(tmp_path, row) == [json.loads(line) for line in lines]
  assert f'{path}: line 3 is damaged' in caplog.text


def titles(*rows):
  return list(results.name_rows([results.Row(*row, {}, {}) for row in rows]).values())


def test_a_list_of_runs_shows_what_tells_them_apart():
  def row(arm_id, name, seed, data_seed):
    return arm_id, name, 'g', 'done', {'seed': seed, 'data.seed': data_seed}

  assert titles(row('1', 'a', 0, 0), row('2', 'a', 1, 1), row('3', 'b', 0, 0)) == [
    'a, seed 0',
    'a, seed 1',
    'b, seed 0',
  ]
  assert titles(row('1', 'a', 0, 0), row('2', 'a', 0, 1), row('3', 'b', 0, 1)) == [
    'a, seed 0, data.seed 0',
    'a, seed 0, data.seed 1',
    'b, seed 0',
  ]
  found = titles(row('1', 'a', 0, 0), row('2', 'a', 0, 0))  # of two launches, say
  assert found == ['a, seed 0, data.seed 0, 1', 'a, seed 0, data.seed 0, 2']


def test_short_numbers():
  assert [table.short(x) for x in (0, 999, 1234, 118_000, 4.096e6, 1.64e13, 2e18, None)] == [
    *('0', '999', '1.23K', '118K', '4.1M', '16.4T', '2E', '–')
  ]


def test_json_of_results_is_json(tmp_path):
  arms = launched(tmp_path)
  config = json.loads((workdir.folder(tmp_path, arms[0].arm_id) / 'config.json').read_text())
  assert config['model']['n_layers'] == 4
