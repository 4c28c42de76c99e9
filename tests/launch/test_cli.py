"""The command line: what is refused, what is shown, what is written, and what is not."""

import os
import shlex
from pathlib import Path

import pytest
import tiny
from fakes import FakeTrain, experiment

import launch.cli
from launch import report as report_command
from slm_jax import perf
from slm_jax.ablate import workdir
from slm_jax.ablate.arms import expand
from slm_jax.ablate.sweep import product, seeds
from slm_jax.config import override
from slm_jax.distill.logits import Distill

REPO = Path(__file__).parents[2]
LR = [{'optim.learning_rate': 2e-3}, {'optim.learning_rate': 3e-3}]
METHODS = list(
  product(
    seeds(2),
    [
      {'name': 'teacher', 'model.n_layers': 3},
      {'name': 'scratch'},
      {'name': 'distilled', 'transforms': (Distill('teacher'),)},
    ],
  )
)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


@pytest.fixture
def start(capsys):
  """Runs a command line: `(exit code, stdout, stderr)`."""

  def run(module, *argv, train=None):
    with pytest.raises(SystemExit) as end:
      launch.cli.main(module, argv, train=train)
    return end.value.code, *capsys.readouterr()

  return run


def tree(path: Path) -> dict:
  return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in path.rglob('*')}


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
  'argv, words',
  [
    (['--lunch=local'], ['lunch', 'launch']),
    (['--sweep'], ['sweep']),
    (['--launch=cloud'], ['--launch=cloud', 'local']),
    (['--dry_run=maybe'], ['--dry_run=maybe']),
    (['stray'], ["'stray'", '--config.KEY=VALUE']),
    (['--config.optim.lr=1'], ['--config.optim.lr', 'unknown key', 'learning_rate']),
    (['--config.seed=x'], ["--config.seed='x'", 'expected int']),
    (['--config.seed'], ['--config.seed', 'needs a value']),
    (['--config.seed', '--dry_run'], ['--config.seed', 'needs a value']),
    (['--sweep=lr', '--config.model.n_kv_heads=3'], ['config.model.n_heads=4', 'n_kv_heads=3']),
    (['--sweep=lr', '--config.data.seq_len=9999'], ['config.data.seq_len=9999', 'max_len']),
    (['--config.model=gtp2'], ["--config.model='gtp2'", 'gpt2']),
    (['--sweep=lr', '--config.data.sources=nowhere.txt'], ['data.sources', 'nowhere.txt']),
    (['--sweep=other'], ['--sweep=other', 'lr, methods, none']),
    ([], ['--sweep', 'lr, methods']),
    (['--sweep=methods', '--arm=123'], ['--arm=123', '6 arms']),
    (['--sweep=lr', '--workdir=gs://bucket/x'], ['--workdir=gs:/', 'local']),
    (['--sweep=lr', '--workdir=a_file'], ['--workdir=a_file', 'not a folder']),
    (['--sweep=lr', '--workdir=of_another'], ['--workdir=of_another', "'another'", "'tiny'"]),
    (['--sweep=lr', '--workdir=a_file/below'], ['a_file']),
    (['--sweep=lr', '--workdir='], ['--workdir: needs a value']),
    (['--sweep=lr', '--only='], ['--only: needs a value']),
    (['--sweep=lr', '--arm='], ['--arm: needs a value']),
  ],
)
def test_bad_input_is_one_line_and_writes_nothing(start, tmp_path, argv, words):
  (tmp_path / 'a_file').touch()
  (tmp_path / 'of_another').mkdir()
  workdir.write_experiment(tmp_path / 'of_another', workdir.Experiment('another'))
  before, train = tree(tmp_path), FakeTrain()
  code, _, error = start(experiment(sweep_lr=LR, sweep_methods=METHODS), *argv, train=train)
  assert code == 1
  assert error.startswith('error: ')
  assert error.count('\n') == 1
  assert error.endswith('\n')
  for word in words:
    assert word in error
  assert tree(tmp_path) == before
  assert train.called == []


@pytest.mark.parametrize('where', ['/proc/nowhere', 'a_file/below'])
@pytest.mark.parametrize('more', [(), ('--local_workers=2',), ('--dry_run', '--measure')])
def test_a_place_that_cannot_be_written_is_one_line(start, tmp_path, monkeypatch, where, more):
  monkeypatch.setattr(perf, 'cache_compilations', lambda folder: None)  # there, for all tests that follow
  (tmp_path / 'a_file').touch()
  module = experiment(base=tiny.config(), sweep=[{'name': 'a'}, {'name': 'b', 'seed': 1}])
  code, _, error = start(module, f'--workdir={where}', *more)  # what really trains
  assert code == 1
  assert error.startswith(f'error: {where}')
  assert error.count('\n') == 1


def test_home_is_where_it_is_in_a_shell(start, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  assert start(experiment(sweep=LR), '--workdir=~/runs', train=FakeTrain())[0] == 0
  assert [p.name for p in tmp_path.iterdir()] == ['home']


def test_an_arm_whose_parent_is_missing_is_refused(start, tmp_path):
  module, train = experiment(sweep=METHODS), FakeTrain()
  child = next(arm for arm in expand(module) if arm.parents)
  (parent,) = child.parents.values()
  code, _, error = start(module, f'--arm={child.arm_id}', train=train)
  assert code == 1
  assert f'builds on {parent}, which is not done' in error
  assert error.count('\n') == 1
  assert list(tmp_path.iterdir()) == []
  assert train.called == []


def test_a_bug_in_an_experiment_is_a_traceback(start):
  def sweep():
    raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    launch.cli.main(experiment(sweep=sweep), [])


def test_a_disk_that_refuses_is_one_line(start, tmp_path, monkeypatch):
  def full(*args, **kwargs):
    raise OSError(28, 'No space left on device', 'runs/tiny/experiment.json')

  monkeypatch.setattr('slm_jax.ablate.workdir.write_json', full)
  code, _, error = start(experiment(sweep=LR), train=FakeTrain())
  assert (code, error) == (1, 'error: runs/tiny/experiment.json: No space left on device\n')


# ---------------------------------------------------------------------------------------------------- what is shown


@pytest.mark.parametrize('done', [False, True])
def test_dry_run_shows_all_and_writes_nothing(start, tmp_path, done):
  module, train = experiment(sweep=METHODS), FakeTrain()
  if done:
    start(module, train=train)
  before, trained = tree(tmp_path), len(train.called)
  code, out, error = start(module, '--dry_run', '--config.run.log_every=3', train=train)
  assert (code, error) == (0, '')
  assert tree(tmp_path) == before
  assert len(train.called) == trained
  rows = [line for line in out.split('\n') if line.startswith('done' if done else 'missing')]
  assert len(rows) == 6
  assert 'model.n_layers=3' in rows[0]
  assert 'teacher' in rows[2].split()
  assert 'estimate' in out
  assert f'6 arms, {0 if done else 6} to run' in out
  commands = [shlex.split(line) for line in out.split('\n') if line.startswith('python ')]
  ids = [arm_id for words in commands for arm_id in words[-1].removeprefix('--arm=').split(',')]
  assert sorted(ids) == sorted(arm.arm_id for arm in ([] if done else expand(module)))
  assert all('--config.run.log_every=3' in words for words in commands)


def test_help_names_question_flags_sweeps_and_settings(start, tmp_path):
  code, out, _ = start(experiment(doc='Is it so?', sweep_lr=LR), '--help')
  assert code == 0
  assert out.startswith('Is it so?')
  for text in ('--dry_run', '--workdir', 'runs/tiny', '\n  lr\n', '--config.optim.learning_rate=0.001'):
    assert text in out
  assert list(tmp_path.iterdir()) == []


def test_the_settings_that_help_shows_can_be_given_back(start):
  module = experiment()
  _, out, _ = start(module, '--help')
  settings = [line.strip() for line in out[out.index('Settings:') :].splitlines()[1:]]
  assert len(settings) > 50
  given, _ = launch.cli.split_overrides(settings)
  (plain,), (same,) = (
    launch.cli.arms_of(module, launch.cli.parse(['--sweep=none'], 'tiny'), overrides) for overrides in ({}, given)
  )
  assert same.arm_id == plain.arm_id


@pytest.mark.parametrize(
  'argv, remark',
  [
    (['--sweep=lr', '--config.optim.learning_rate=9'], '--config.optim.learning_rate has no effect'),
    (['--sweep=lr'], "BASELINE 'scratch' is not in this sweep; the others are compared with 'learning_rate=0.002'"),
    (['--sweep=twice'], "'one' and 'two' are the same arm, run once"),
  ],
)
def test_surprises_are_told(start, argv, remark):
  twice = [{'name': 'one', 'train.steps': 3}, {'name': 'two', 'train.steps': 3}]
  code, out, _ = start(experiment(sweep_lr=LR, sweep_twice=twice, BASELINE='scratch'), *argv, '--dry_run')
  assert code == 0
  assert remark in out


LENGTHS = {'dense': 20, 'wide': 20, 'even': 30, 'long': 40, 'none': 0}
SHORT = [{'name': name, 'train.steps': n, 'model.d_ff': 8 * len(name)} for name, n in LENGTHS.items()]
DENSE = "warning: run 'dense' trains for 20 steps but warms up for 30, so it never reaches its peak learning rate"
EVEN = (
  "warning: run 'even' trains for 30 steps but warms up for 30, so only its last step reaches its peak learning rate"
)
ALL = [f'{DENSE} (1 more run does the same)', EVEN]
TWICE = [f'{DENSE} (3 more runs do the same)', f'{EVEN} (1 more run does the same)']


def warnings(text):
  return [line for line in text.split('\n') if line.startswith('warning: ')]


@pytest.mark.parametrize(
  'argv, expected',
  [
    ([], ALL),
    (['--dry_run'], ALL),
    (['--dry_run', '--launch=slurm'], ALL),
    (['--arms_per_job=2'], ALL),
    (['--seeds=2'], TWICE),
    (['--only=long'], []),  # of what is not chosen, nothing is said
    (['--only=dense,long'], [DENSE]),
    (['--limit=1'], [DENSE]),
    (['--sweep=none', '--config.train.steps=1'], [DENSE.replace('dense', 'tiny').replace('20 steps', '1 step')]),
    (['--config.optim.warmup=5'], []),
  ],
)
def test_a_warm_up_that_is_longer_than_the_run_is_warned_of(start, argv, expected):
  base = override(tiny.config(100), {'optim.warmup': 30})
  code, out, error = start(experiment(base=base, sweep=SHORT), *argv, train=FakeTrain())
  assert (code, error) == (0, '')
  assert warnings(out) == expected


def test_a_worker_warns_of_its_own_arms(start):
  base = override(tiny.config(100), {'optim.warmup': 30})
  module = experiment(base=base, sweep=SHORT)
  ids = {arm.name: arm.arm_id for arm in expand(module)}
  assert warnings(start(module, f'--arm={ids["even"]},{ids["long"]}', train=FakeTrain())[1]) == [EVEN]
  assert warnings(start(module, f'--arm={ids["long"]}', train=FakeTrain())[1]) == []


def test_both_forms_of_an_override(start):
  found = launch.cli.split_overrides(['--config.a.b=1=2', '--x', '--config.c', '-3', '-config.d=', '--y=config.z'])
  assert found == ({'a.b': '1=2', 'c': '-3', 'd': ''}, ['--x', '--y=config.z'])


# --------------------------------------------------------------------------------------------------------- launches


def test_a_launch_runs_reports_and_is_not_run_again(start, tmp_path):
  module, train = experiment(sweep=METHODS, BASELINE='scratch'), FakeTrain({'distilled': 1.2})
  code, out, error = start(module, train=train)
  assert (code, error) == (0, '')
  assert len(train.called) == 6
  assert '−0.3000' in out
  assert 'better*' in out
  assert 'baseline' in out
  where = tmp_path / 'runs/tiny'
  assert {'results.csv', 'report.html', 'experiment.json'} <= {p.name for p in where.iterdir()}
  before = tree(where)
  code, out, _ = start(module, train=train)
  assert code == 0
  assert 'all 6 arms are done; nothing to do' in out
  assert '−0.3000' in out
  assert 'better*' in out
  assert tree(where) == before
  assert len(train.called) == 6


def test_a_failed_arm_gives_exit_code_1_and_a_report_of_the_others(start, tmp_path):
  code, out, _ = start(experiment(sweep=METHODS), train=FakeTrain(teacher=1))
  assert code == 1
  assert 'blocked' in out
  assert (tmp_path / 'runs/tiny/report.html').exists()


def test_a_preempted_launch_exits_42_and_the_next_one_goes_on(start):
  module = experiment(sweep=METHODS)
  assert start(module, train=FakeTrain(scratch=42))[0] == 42
  train = FakeTrain()
  code, out, _ = start(module, train=train)
  assert code == 0
  assert len(train.called) == 5
  assert '6 arms in runs/tiny, 1 done, 5 to run' in out


def test_a_report_that_was_cut_off_is_made_by_the_next_launch(start, tmp_path):
  module, train = experiment(sweep=LR), FakeTrain()
  start(module, train=train)
  (tmp_path / 'runs/tiny/report.html').unlink()
  assert start(module, train=train)[0] == 0
  assert (tmp_path / 'runs/tiny/report.html').exists()
  assert len(train.called) == 2


def test_another_sweep_of_the_workdir_gets_its_own_report_and_the_csv_has_both(start, tmp_path):
  module = experiment(sweep_lr=LR, sweep_methods=METHODS)
  start(module, '--sweep=lr', train=FakeTrain())
  _, out, _ = start(module, '--sweep=methods', train=FakeTrain())
  assert 'and 2 arms of earlier launches in results.csv' in out
  assert len((tmp_path / 'runs/tiny/results.csv').read_text().strip().split('\n')) == 1 + 8
  page = (tmp_path / 'runs/tiny/report.html').read_text()
  assert 'distilled' in page
  assert 'learning_rate=0.002' not in page


def test_the_experiments_own_words_are_the_answer(start, tmp_path):
  def report(rows):
    return f'{len(rows)} arms, best {min(rows, key=lambda row: row.summary["loss"]).name}'

  module = experiment(sweep=METHODS, report=report)
  _, out, _ = start(module, train=FakeTrain({'distilled': 1.2}))
  assert '6 arms, best distilled' in out
  assert '6 arms, best distilled' in (tmp_path / 'runs/tiny/report.html').read_text()
  assert '6 arms, best distilled' in start(module)[1]


def test_a_bug_in_those_words_loses_nothing(start, tmp_path):
  module = experiment(sweep=LR, report=lambda rows: rows[0].summary['no such metric'])
  with pytest.raises(KeyError):
    launch.cli.main(module, [], train=FakeTrain())
  assert (tmp_path / 'runs/tiny/results.csv').exists()
  assert (tmp_path / 'runs/tiny/report.html').exists()
  module.report = lambda rows: 'mended'
  assert 'mended' in start(module)[1]


def test_an_answer_is_to_the_arms_of_its_own_launch(start, tmp_path):
  module = experiment(sweep=METHODS, report=lambda rows: f'of {rows[0].config["train.steps"]} steps')
  assert 'of 9 steps' in start(module, '--config.train.steps=9', train=FakeTrain())[1]
  # The next launch is cut off after its arms, and its report is made by another command.
  monkey = FakeTrain(scratch=42)
  assert start(module, '--config.train.steps=7', train=monkey)[0] == 42
  ids = [arm.arm_id for arm in expand(module, None, {'train.steps': '7'})]
  assert start(module, '--config.train.steps=7', f'--arm={",".join(ids)}', train=FakeTrain())[0] == 0
  assert report_command.main(['runs/tiny']) == 0
  assert 'of 9 steps' not in (tmp_path / 'runs/tiny/report.html').read_text()
  out = start(module, '--config.train.steps=7')[1]
  assert 'of 7 steps' in out
  assert 'of 9 steps' not in out


@pytest.mark.parametrize('part', ['--only=scratch', '--limit=1', '--sweep=none'])
def test_a_part_of_the_sweep_is_reported_without_the_experiments_words(start, tmp_path, part):
  module = experiment(sweep=METHODS, report=lambda rows: {row.name: row for row in rows}['distilled'].name)
  code, out, error = start(module, part, train=FakeTrain())
  assert (code, error) == (0, '')
  assert "the experiment's own report is of a whole sweep, and left out" in out
  before = tree(tmp_path)
  code, out, _ = start(module, part)
  assert code == 0
  assert 'nothing to do' in out
  assert tree(tmp_path) == before


def test_an_arm_can_be_run_by_itself_with_the_command_that_is_shown(start, tmp_path):
  module, train = experiment(sweep=METHODS), FakeTrain()
  _, out, _ = start(module, '--dry_run', '--arms_per_job=1', '--config.train.steps=9')
  for command in [line for line in out.split('\n') if line.startswith('python ')][:3]:
    assert start(module, *shlex.split(command)[2:], train=train)[0] == 0
  assert len(set(train.called)) == len(train.called) == 3
  code, out, _ = start(module, '--config.train.steps=9', train=train)
  assert code == 0
  assert '6 arms in runs/tiny, 3 done, 3 to run' in out


def test_two_launches_at_once_are_refused_by_one_line(start, tmp_path):
  where = tmp_path / 'runs/tiny'
  with workdir.lock(where):
    code, _, error = start(experiment(sweep=LR), train=FakeTrain())
  assert code == 1
  assert f'process {os.getpid()}' in error
  assert error.count('\n') == 1
  assert not (where / 'arms').exists()


# ---------------------------------------------------------------------------------------------------- launch.report


def test_report_command_makes_the_page_anew(start, tmp_path, capsys):
  module = experiment(sweep_lr=LR, sweep_methods=METHODS)
  for sweep in ('lr', 'methods'):
    start(module, f'--sweep={sweep}', train=FakeTrain())
  page = tmp_path / 'runs/tiny/report.html'
  page.unlink()
  assert report_command.main(['runs/tiny']) == 0
  assert 'learning_rate=0.002' not in page.read_text()
  assert report_command.main(['runs/tiny', '--all']) == 0
  assert 'learning_rate=0.002' not in page.read_text()
  assert 'learning_rate=0.002' in (tmp_path / 'runs/tiny/reports/all.html').read_text()
  assert 'runs/tiny/reports/all.html' in capsys.readouterr().out


@pytest.mark.parametrize('argv', [[], ['a', 'b'], ['--al'], ['nowhere']])
def test_report_command_refuses_in_one_line(argv, capsys):
  assert report_command.main(argv) == 1
  error = capsys.readouterr().err
  assert error.startswith('error: ')
  assert error.count('\n') == 1


# ---------------------------------------------------------------------------------------------------------- remarks

FILE = '''"""Which?"""

from slm_jax.experiment import Config


def config():
  return Config()


def {name}():
  yield {{'name': 'a'}}


def research():
  return 1


ONCE = research()
'''


@pytest.mark.parametrize(
  'name, told',
  [('sweepp', 'sweep'), ('swep', 'sweep'), ('reports', 'report'), ('sweep', ''), ('sweep_lr', ''), ('helper', '')],
)
def test_a_misspelt_function_is_remarked_on(start, tmp_path, monkeypatch, name, told):
  import importlib.util

  (tmp_path / 'mine.py').write_text(FILE.format(name=name))
  spec = importlib.util.spec_from_file_location('mine', tmp_path / 'mine.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  _, out, _ = start(module, '--dry_run')
  assert (f'warning: {name}() is never called; did you mean {told}()?' in out) == bool(told)
  assert 'research' not in out
