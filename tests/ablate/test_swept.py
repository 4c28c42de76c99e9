"""What a sweep varies is found, and drawn against the loss: one line for each setting of everything else."""

import pytest
from fakes import arms_of, experiment, fill, summary

from launch.plan import Plan
from slm_jax.ablate import plots, results, swept, table, workdir
from slm_jax.ablate.sweep import product, seeds
from slm_jax.config import to_dict
from slm_jax.distill.logits import Distill
from slm_jax.files import write_json

RATES = [{'optim.learning_rate': rate} for rate in (1e-3, 2e-3, 4e-3, 8e-3)]
WIDTHS = [{'model.d_model': d, 'model.d_ff': 3 * d, 'model.n_heads': d // 8} for d in (32, 64, 128)]


def lines_of(path, sweep, loss=lambda config: 1.5, nan=lambda config: False):
  """The table of a sweep whose losses are given by a function of the configuration."""
  module = experiment(sweep=list(sweep))
  arms = arms_of(module)
  Plan(module, path, arms, [], arms[0].name).record()
  for arm in arms:
    folder = workdir.folder(path, arm.arm_id)
    run = {'status': 'diverged'} if nan(arm.config) else {'status': 'done', 'summary': summary(loss(arm.config))}
    write_json(folder / 'run.json', run)
    write_json(folder / 'config.json', to_dict(arm.config))
    if run['status'] == 'done':
      fill(folder, run['summary']['loss'], arm.config.train.steps)
      (folder / 'DONE').touch()
  return table.lines(results.read(path), arms[0].name)


def test_learning_rate_by_width_has_a_line_a_width_and_the_best_rate_of_each(tmp_path):
  best = {32: 4e-3, 64: 2e-3, 128: 1e-3}

  def loss(config):
    return 1.0 + abs(config.optim.learning_rate - best[config.model.d_model]) + 0.01 * config.seed

  by_rate, by_width = swept.swept(lines_of(tmp_path, product(WIDTHS, RATES, seeds(2)), loss))
  assert (by_rate.key, by_rate.by, by_rate.moving) == ('optim.learning_rate', ('model.d_model',), ())
  assert [label for label, _ in by_rate.lines] == ['d_model=32', 'd_model=64', 'd_model=128']
  for (_, points), rate in zip(by_rate.lines, best.values(), strict=True):
    assert [x for x, _ in points] == [1e-3, 2e-3, 4e-3, 8e-3]
    assert {line.loss.n for _, line in points} == {2}
    assert swept.best(points)[0] == rate
  assert (by_width.key, by_width.by) == ('model.d_model', ('optim.learning_rate',))
  assert set(by_width.moving) == {'model.d_ff', 'model.n_heads'}  # they are the same sweep, shown once
  assert len(by_width.lines) == 4


@pytest.mark.parametrize(
  'sweep',
  [
    list(seeds(5)),
    list(product(RATES[:2], seeds(3))),  # two values make no line
    [{'train.accumulate': 1, 'model.tied': b} for b in (True, False)],
    # drawn at random in two directions: no line holds three of them
    [
      {'optim.learning_rate': r, 'optim.weight_decay': w} for r, w in ((1e-3, 0.3), (2e-3, 0.1), (3e-3, 0.2), (4e-3, 0))
    ],
    [{'name': name, 'train.steps': 100 * (i + 1), 'run.log_every': i + 1} for i, name in enumerate('ab')],
  ],
)
def test_what_is_no_line_is_not_drawn(tmp_path, sweep):
  assert swept.swept(lines_of(tmp_path, sweep)) == []


def test_what_follows_the_number_of_steps_is_named_after_it(tmp_path):
  sweep = [{'name': f'a{n}', 'train.steps': 100 * n, 'optim.warmup': 20 * n} for n in (1, 2, 3)]
  (found,) = swept.swept(lines_of(tmp_path, sweep))
  assert (found.key, found.moving) == ('train.steps', ('optim.warmup',))


def test_an_arm_apart_does_not_disturb_the_lines_of_the_others(tmp_path):
  teacher = {'name': 'teacher', 'model.n_layers': 4, 'transforms': (), 'optim.learning_rate': 2e-3}
  weights = [
    {'name': 'student', 'transforms': (Distill('teacher', weight=w, temperature=t),)}
    for w in (0.25, 0.5, 0.75)
    for t in (1.0, 2.0)
  ]
  (found,) = swept.swept(lines_of(tmp_path, [teacher, *weights]))
  assert found.key == 'transforms.distill.weight'
  assert [label for label, _ in found.lines] == ['temperature=1', 'temperature=2']


def test_the_plot_is_made_by_itself_and_says_what_it_shows(tmp_path):
  lines = lines_of(
    tmp_path,
    product(WIDTHS, RATES, seeds(2)),
    lambda config: 1.0 + config.optim.learning_rate + 0.01 * config.seed,
    nan=lambda config: config.optim.learning_rate > 5e-3 and config.model.d_model == 128,
  )
  drawn = {plot.name: plot for plot in plots.save(tmp_path / 'plots', plots.pictures_of_sweeps(lines, [1.0]))}
  plot = drawn['loss_by_optim_learning_rate']
  assert 'one line for each model.d_model' in plot.title
  assert '×: a run that diverged' in plot.title
  for text in ('d_model=128', 'entropy of the data', 'optim.learning_rate', '0.008'):
    assert text in plot.svg
  assert not plot.by_arm
  assert (tmp_path / 'plots/loss_by_optim_learning_rate.svg').exists()
  assert 'model.n_heads, model.d_ff change with it' in drawn['loss_by_model_d_model'].title


def test_a_loss_that_went_astray_does_not_flatten_the_others(tmp_path):
  from matplotlib.figure import Figure

  lines = lines_of(tmp_path, RATES, lambda config: 50.0 if config.optim.learning_rate > 5e-3 else 1.0 + config.seed)
  lines = [line._replace(loss=line.loss._replace(mean=line.loss.mean + 0.1 * i)) for i, line in enumerate(lines)]
  (found,) = swept.swept(lines)
  ax = Figure().subplots()
  plots._swept(found, ax)
  assert ax.get_ylim()[1] < 3


def test_many_lines_are_cut_and_that_is_said(tmp_path):
  sweep = product(RATES, [{'optim.warmup': w} for w in range(20)])
  pictures = plots.pictures_of_sweeps(lines_of(tmp_path, sweep), [])
  titles = [picture.title for picture in pictures]
  assert any('(the first 12 of 20)' in title for title in titles)
