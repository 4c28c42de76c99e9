"""The command line's choice of arms: --only, --exclude, --limit, --seeds, --yes, --why, code drift; and --search."""

import itertools
import json
import math
import shlex
from pathlib import Path

import pytest
from fakes import FakeTrain, experiment

import launch.cli
from slm_jax.ablate import report
from slm_jax.ablate.arms import expand
from slm_jax.ablate.sweep import product, seeds
from slm_jax.ablate.workdir import read_experiment
from slm_jax.distill.logits import Distill
from slm_jax.revision import source

LR = [{'optim.learning_rate': 2e-3}, {'optim.learning_rate': 3e-3}]
METHODS = [
  {'name': 'teacher', 'model.n_layers': 3},
  {'name': 'scratch'},
  {'name': 'distilled', 'transforms': (Distill('teacher'),)},
]
REPEATED = list(product(METHODS, seeds(2)))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


@pytest.fixture
def start(start_with_report, monkeypatch):
  """The same with empty pages for a report, which is not the matter here and takes a second."""

  def publish(workdir):
    for path in report.pages_of(workdir, read_experiment(workdir)):
      path.parent.mkdir(exist_ok=True)
      path.touch()
    return ''

  monkeypatch.setattr(report, 'publish', publish)
  return start_with_report


@pytest.fixture
def start_with_report(capsys):
  """Runs a command line: `(exit code, stdout, stderr)`."""

  def run(module, *argv, train=None):
    with pytest.raises(SystemExit) as end:
      launch.cli.main(module, argv, train=train)
    return end.value.code, *capsys.readouterr()

  return run


def both(*names):
  return [(name, seed) for name in names for seed in (0, 1)]


def tree(path: Path) -> dict:
  return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in path.rglob('*')}


# ------------------------------------------------------------------------------------------------------- refusals


def endless():
  return ({'optim.learning_rate': 1e-9 * i} for i in itertools.count(1))


def many():
  return ({'optim.learning_rate': 1e-9 * i} for i in range(1, 151))


def more():
  return ({'train.steps': i} for i in range(1, 151))


@pytest.mark.parametrize(
  'argv, words',
  [
    (['--sweep=methods', '--only=scrach'], ['--only=scrach', 'teacher, scratch, distilled']),
    (['--sweep=methods', '--exclude=x'], ['--exclude=x', 'teacher, scratch, distilled']),
    (['--sweep=methods', '--exclude=teacher'], ['--exclude=teacher', "'distilled' builds on 'teacher'"]),
    (['--sweep=methods', '--exclude=*'], ['--exclude=*', 'leaves no arm']),
    (['--sweep=methods', '--limit=0'], ['--limit', 'positive']),
    (['--sweep=methods', '--seeds=2'], ['--seeds=2', 'sets seed itself']),
    (['--sweep=lr', '--seeds=0'], ['--seeds', 'positive']),
    (['--sweep=lr', '--why=abcd'], ['--why=abcd', 'two ids']),
    (['--sweep=lr', '--why=abcd,efgh'], ['--why=abcd', 'no such id']),
    (['--sweep=endless'], ["sweep 'endless'", 'more than 10,000 arms', '--yes']),
    (['--sweep=many,more'], ["sweep 'many,more'", '22,500 arms', '--yes']),
    (['--sweep=lr', '--seeds=5001'], ["sweep 'lr'", '10,002 arms', '--yes']),
    (['--sweep=lr', '--seeds=99999999999'], ["sweep 'lr'", '199,999,999,998 arms', '--yes']),
    (['--sweep=lr', '--seeds=99999999999', '--yes'], ["sweep 'lr'", 'at most 1,000,000 can be held']),
    (['--sweep=lr', '--seeds=99999999999', '--dry_run'], ["sweep 'lr'", '199,999,999,998 arms', '--yes']),
    (['--sweep=endless', '--yes'], ["sweep 'endless'", 'more than 1,000,000 arms; at most']),
    (['--search=2', '--search_round=1000000000000'], ['--search_round=1000000000000', 'more than 10,000', '--yes']),
    (['--search=1000000000000', '--yes'], ['--search=1000000000000', 'more than 1,000,000 arms']),
    (['--search=2', '--sweep=lr', '--only=x'], ['--only', '--search']),
    (['--search=2', '--seeds=2'], ['--seeds', '--search']),
    (['--search=2', '--sweep=endless'], ["sweep 'endless'", 'more than 10,000 arms']),
    (['--search=2', '--launch=gke'], ['--launch=gke', '--search', 'local']),
    (['--search=0'], ['--search', 'positive']),
    (['--sweep=lr', '--search=2'], ['--search=2', 'no function search']),
  ],
)
def test_bad_input_is_one_line_and_writes_nothing(start, tmp_path, argv, words):
  if '--search=2' in argv:
    pytest.importorskip('optuna')
  train = FakeTrain()
  module = experiment(sweep_lr=LR, sweep_methods=REPEATED, sweep_endless=endless, sweep_many=many, sweep_more=more)
  if '--sweep=endless' in argv:
    module.search = search
  code, _, error = start(module, *argv, train=train)
  assert code == 1
  assert error.startswith('error: ')
  assert error.count('\n') == 1
  for word in words:
    assert word in error
  assert list(tmp_path.iterdir()) == []
  assert train.called == []


def test_yes_allows_more(monkeypatch):
  monkeypatch.setattr('launch.cli.MANY', 100)
  module = experiment(sweep=many)
  options = launch.cli.parse(['--yes'], 'tiny')
  assert len(launch.cli.arms_of(module, options, {})) == 150
  assert '--yes' in launch.cli.which(options, {})  # a worker's command line must be able to find its arm


# --------------------------------------------------------------------------------------------------------- choices


def test_only_runs_what_is_chosen_and_says_what_comes_along(start):
  module, train = experiment(sweep=REPEATED), FakeTrain()
  code, out, _ = start(module, '--only=distilled', train=train)
  assert code == 0
  assert train.called == both('teacher', 'distilled')
  assert "'teacher': not done, and the chosen arms build on it; 2 more to run" in out
  before = tree(Path('runs/tiny'))
  code, out, _ = start(module, '--only=distilled', train=train)
  assert 'all 4 arms are done; nothing to do' in out
  assert 'not done' not in out
  assert tree(Path('runs/tiny')) == before
  assert start(module, train=train)[0] == 0
  assert train.called == both('teacher', 'distilled', 'scratch')


def test_exclude_and_limit(start):
  module, train = experiment(sweep=REPEATED), FakeTrain()
  assert start(module, '--exclude=teacher,distilled', '--limit=1', train=train)[0] == 0
  assert train.called == [('scratch', 0)]
  assert start(module, '--limit=1', train=train)[0] == 0
  assert train.called == [('scratch', 0), ('teacher', 0)]


def test_the_dry_run_and_its_commands_are_of_the_chosen_arms(start, tmp_path):
  module = experiment(sweep=REPEATED)
  _, out, _ = start(module, '--dry_run', '--only=distilled', '--exclude=seed=1')
  assert [line.split()[2] for line in out.split('\n') if line.startswith('missing')] == ['teacher', 'distilled']
  commands = [shlex.split(line) for line in out.split('\n') if line.startswith('python ')]
  assert len(commands) == 2
  train = FakeTrain()
  for words in commands:
    assert start(module, *words[2:], train=train)[0] == 0
  assert train.called == [('teacher', 0), ('distilled', 0)]


def test_seeds_repeat_a_sweep_and_workers_know_of_it(start):
  module, train = experiment(sweep_lr=LR, sweep_methods=METHODS), FakeTrain()
  assert start(module, '--sweep=methods', '--seeds=2', train=train)[0] == 0
  assert train.called == both('teacher', 'scratch', 'distilled')
  _, out, _ = start(module, '--sweep=none', '--seeds=3', '--workdir=other', '--arms_per_job=1', '--dry_run')
  command = next(line for line in out.split('\n') if line.startswith('python '))
  assert '--seeds=3' in command
  assert start(module, *shlex.split(command)[2:], train=train)[0] == 0
  assert train.called[-1] == ('base', 0)


def test_why_names_the_settings(start, tmp_path):
  module = experiment(sweep=LR)
  first, second = expand(module)
  code, out, _ = start(module, f'--why={first.arm_id[:8]},{second.arm_id}')
  assert code == 0
  assert out.endswith('differ in\n  optim.learning_rate: 0.002 -> 0.003\n')
  assert list(tmp_path.iterdir()) == []


def test_code_drift_is_told(start):
  module = experiment(sweep=LR)
  start(module, train=FakeTrain())
  assert 'other code' not in start(module)[1]
  path = next(Path('runs/tiny/arms').glob('*/run.json'))
  path.write_text(json.dumps({**json.loads(path.read_text()), 'source': {**source(), 'step': 'x'}}))
  assert '1 of 2 arms were made by other code (changed since then: step)' in start(module)[1]
  assert 'other code' in start(module, '--dry_run')[1]


def test_many_merged_arms_are_counted(start):
  sweep = [{'name': f'{name}{i}', 'train.steps': 5 + i} for i in range(30) for name in 'ab']
  _, out, _ = start(experiment(sweep=sweep), '--dry_run')
  assert out.count('same arm, run once') == 4
  assert 'and 26 more arms are the same as others, and run once' in out


# ---------------------------------------------------------------------------------------------------------- search


class Bowl(FakeTrain):
  """Best at a learning rate of 3e-3; diverges above 3e-2, if it is told so."""

  def __init__(self, diverges: float = math.inf, **outcomes):
    super().__init__(**outcomes)
    self.diverges = diverges

  def __call__(self, config, workdir, arm_id):
    rate = config.optim.learning_rate
    self.losses[config.name] = 1 + abs(math.log(rate / 3e-3))
    if rate > self.diverges:
      self.outcomes[config.name] = 1
    return super().__call__(config, workdir, arm_id)


def search(trial):
  return {'optim.learning_rate': trial.suggest_float('lr', 1e-4, 1e-1, log=True)}


def trials(*numbers):
  return [(f'trial {i}', 0) for i in numbers]


@pytest.fixture
def hunt():
  pytest.importorskip('optuna')
  return experiment(search=search)


def test_a_search_runs_reports_and_is_not_run_again(start_with_report, hunt, tmp_path):
  start, train = start_with_report, Bowl()
  code, out, error = start(hunt, '--search=14', train=train)
  assert (code, error) == (0, '')
  assert train.called == trials(*range(14))
  best = min(range(14), key=lambda i: train.losses[f'trial {i}'])
  assert f'best: trial {best}, ' in out
  assert len((tmp_path / 'runs/tiny/results.csv').read_text().strip().split('\n')) == 1 + 14
  before = tree(tmp_path)
  code, out, _ = start(hunt, '--search=14', train=train)
  assert code == 0
  assert 'all 14 arms are done; nothing to do' in out
  assert tree(tmp_path) == before
  assert start(hunt, '--search=16', train=train)[0] == 0
  assert train.called == trials(*range(16))


def test_a_search_finds_its_results_at_home(start, hunt, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  train = Bowl()
  assert start(hunt, '--search=3', '--workdir=~/found', train=train)[0] == 0
  assert train.called == trials(0, 1, 2)


@pytest.mark.parametrize('together', [1, 3])
def test_a_search_that_was_cut_off_asks_for_the_same_arms(start, hunt, tmp_path, together):
  def arms():
    return {path.name for path in tmp_path.glob('*/arms/*')}

  flags = ['--search=13', f'--search_round={together}']
  start(hunt, *flags, '--workdir=whole', train=Bowl())
  whole = arms()
  train = Bowl(**{'trial 11': 42})
  assert start(hunt, *flags, '--workdir=cut', train=train)[0] == 42
  assert train.called == trials(*range(12))
  train = Bowl()
  assert start(hunt, *flags, '--workdir=cut', train=train)[0] == 0
  assert train.called == trials(11, 12)
  assert arms() == whole


def test_a_trial_that_fails_stops_the_search_and_is_tried_again(start, hunt):
  train = Bowl(**{'trial 2': RuntimeError('a bug')})
  code, _, error = start(hunt, '--search=5', train=train)
  assert code == 1
  assert train.called == trials(0, 1, 2)
  train = Bowl()
  assert start(hunt, '--search=5', train=train)[0] == 0
  assert train.called == trials(2, 3, 4)


def test_a_trial_that_diverges_is_a_result(start, hunt):
  train = Bowl(diverges=3e-2)
  code, out, _ = start(hunt, '--search=12', train=train)
  assert code == 0
  assert train.called == trials(*range(12))
  assert 1 in train.outcomes.values()
  assert start(hunt, '--search=12', train=train)[0] == 0
  assert len(train.called) == 12


def test_trials_may_build_on_an_arm_of_a_sweep(start):
  pytest.importorskip('optuna')

  def distilled(trial):
    return {'transforms': (Distill('teacher', weight=trial.suggest_float('weight', 0, 1)),)}

  module, train = experiment(sweep_teacher=METHODS[:1], search=distilled), FakeTrain()
  assert start(module, '--search=3', '--sweep=teacher', train=train)[0] == 0
  assert train.called == [('teacher', 0), *trials(0, 1, 2)]
  train = FakeTrain(teacher=1)
  assert start(module, '--search=3', '--sweep=teacher', '--workdir=other', train=train)[0] == 1
  assert train.called == [('teacher', 0)]
  code, _, error = start(module, '--search=3', '--workdir=none', train=train)
  assert code == 1
  assert 'no arm has that name' in error


def test_a_trial_asked_for_twice_is_one_arm(start):
  pytest.importorskip('optuna')
  module, train = experiment(search=lambda trial: {'train.steps': trial.suggest_int('steps', 5, 6)}), FakeTrain()
  assert start(module, '--search=8', train=train)[0] == 0
  assert len(train.called) == 2


def test_a_search_warns_once_of_each_trial_that_ends_in_its_warm_up(start):
  """Of those of the first round when it is launched, of later ones when they are asked for."""
  module = experiment(search=lambda trial: {'train.steps': 10 * trial.suggest_int('tens', 2, 4) + trial.number})
  _, out, _ = start(module, '--search=6', '--config.optim.warmup=40', train=FakeTrain())
  lines = [line for line in out.split('\n') if line.startswith('warning: ')]
  steps = {int(line.split()[3].strip("'")): int(line.split()[6]) for line in lines}
  assert len(steps) == len(lines) > 2
  assert all(n % 10 == number and n < 40 for number, n in steps.items())


def test_the_dry_run_of_a_search_shows_the_next_round(start, hunt, tmp_path):
  start(hunt, '--search=2', train=Bowl())
  before = tree(tmp_path)
  _, out, _ = start(hunt, '--search=9', '--search_round=2', '--arms_per_job=1', '--dry_run')
  states = [line.split()[0] for line in out.split('\n') if line.startswith(('done ', 'missing '))]
  assert states == ['done', 'done', 'missing', 'missing']
  assert tree(tmp_path) == before
  command = [shlex.split(line) for line in out.split('\n') if line.startswith('python ')][0]
  train = Bowl()
  assert start(hunt, *command[2:], train=train)[0] == 0
  assert train.called == trials(2)
