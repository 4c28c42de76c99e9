"""Budgets on the command line: refused, trimmed, reached; and where predictions are from."""

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes import FakeTrain, experiment

import launch.cli
from launch import cli, gke, skypilot, slurm, tpu_vm
from slm_jax.ablate import estimate, measure
from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.measure import Pace
from slm_jax.ablate.sweep import product, seeds
from slm_jax.experiment import Config, RunConfig
from slm_jax.model.config import ModelConfig

ALONE = Config(model=ModelConfig(n_layers=2), run=RunConfig(population=False))  # a worker for each arm
SWEEP = list(product(seeds(2), [{'name': 'a'}, {'name': 'b', 'optim.learning_rate': 0.1}]))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


@pytest.fixture
def start(capsys):
  def run(*argv, train=None, sweep=SWEEP):
    with pytest.raises(SystemExit) as end:
      launch.cli.main(experiment(base=ALONE, sweep=sweep), argv, train=train)
    return end.value.code, *capsys.readouterr()

  return run


@pytest.fixture
def only_the_pace(monkeypatch):
  monkeypatch.setattr(estimate, 'CPU', estimate.Terms(*[0.0] * len(estimate.Terms._fields)))


@pytest.fixture(scope='module')
def one():
  """Model FLOPs of one arm."""
  from fakes import arms_of

  from slm_jax.ablate import cost

  arms = {arm.arm_id: arm for arm in arms_of(experiment(sweep=SWEEP))}
  return next(iter(cost.predict(arms, cost.device('v5e')).values())).flops


class Metered(FakeTrain):
  """Leaves a summary with so many FLOPs."""

  def __init__(self, flops):
    super().__init__()
    self.flops = flops

  def __call__(self, config, workdir, arm_id):
    code = super().__call__(config, workdir, arm_id)
    path = workdir / 'arms' / arm_id / 'run.json'
    path.write_text(path.read_text().replace('"flops": 2000000.0', f'"flops": {self.flops}'))
    return code


@pytest.mark.parametrize(
  'argv, words',
  [
    (['--max_flops=0'], ['--max_flops=0', 'positive']),
    (['--max_hours=nan'], ['--max_hours=nan', 'positive']),
    (['--max_cost=inf'], ['--max_cost=inf', 'positive']),
    (['--max_flops=many'], ['--max_flops', 'many']),
    (['--max_flops=1e9', '--over_budget=ask'], ['--over_budget=ask', 'refuse|trim']),
    (['--device=v9'], ['--device=v9', 'v5e, ', 'h100']),
    (['--devices=4'], ['--devices=4', '--device=NAME']),
    (['--device=h100', '--measure'], ['--measure', '--device=h100']),
    (['--config.run.price=cheap'], ["run.price='cheap'", 'on_demand, spot']),
    (['--max_cost=5', '--dry_run'], ['--max_cost', '--config.run.price=DOLLARS']),
    (['--max_cost=5', '--dry_run', '--device=h200', '--config.run.price=spot'], ['no spot price', 'chips.toml']),
    (['--max_flops=1e6'], ['--max_flops=1e+06', '0 of its 4 missing arms fit']),
    (['--max_flops=1e6', '--over_budget=trim'], ['--max_flops=1e+06', '0 of its 4 missing arms fit']),
  ],
)
def test_what_cannot_be_meant_is_one_line_and_writes_nothing(start, tmp_path, argv, words):
  train = FakeTrain()
  code, _, error = start(*argv, train=train)
  assert code == 1
  assert error.startswith('error: ')
  assert error.count('\n') == 1
  for word in words:
    assert word in error
  assert list(tmp_path.iterdir()) == []
  assert train.called == []


def test_above_the_limit_is_refused_with_what_would_fit(start, tmp_path, one):
  train = FakeTrain()
  code, _, error = start(f'--max_flops={2.5 * one}', train=train)
  assert code == 1
  assert '2 of its 4 missing arms fit, and --over_budget=trim runs those' in error
  assert train.called == []
  assert list(tmp_path.iterdir()) == []


def test_trimming_says_what_it_drops_and_runs_the_rest_once(start, one):
  flags = (f'--max_flops={2.5 * one}', '--over_budget=trim')
  train = Metered(one)
  code, out, error = start(*flags, train=train)
  assert (code, error) == (0, '')
  assert 'dropped: a (seed 1), b (seed 1)' in out
  assert train.called == [('a', 0), ('b', 0)]
  code, out, _ = start(*flags, train=train)  # nothing more fits: that launch is done
  assert code == 0
  assert len(train.called) == 2
  code, _, error = start(f'--max_flops={2.5 * one}', train=train)
  assert code == 1
  assert '0 of its 2 missing arms fit' in error
  assert start(train=train)[0] == 0
  assert len(train.called) == 4


def test_a_sweep_within_its_limit_runs(start, one):
  train = Metered(one)
  assert start(f'--max_flops={4.01 * one}', train=train)[0] == 0
  assert len(train.called) == 4


def test_a_running_sweep_stops_at_the_limit(start, one):
  """Each arm takes twice what was predicted."""
  train = Metered(2 * one)
  code, out, _ = start(f'--max_flops={4.01 * one}', train=train)
  assert code == 1
  assert len(train.called) == 3
  line = next(line for line in out.split('\n') if 'is reached' in line)
  assert 'not started, --max_flops=' in line
  assert line.endswith('1 arms are left')


def test_a_worker_has_the_limit_too(start, one, tmp_path):
  limit = f'--max_flops={4.01 * one:g}'
  _, out, _ = start(limit, '--dry_run')
  commands = [shlex.split(line) for line in out.split('\n') if line.startswith('python ')]
  assert len(commands) == 4
  train = Metered(5 * one)
  codes = [start(*words[2:], train=train)[0] for words in commands]
  assert codes == [0, 1, 1, 1]
  assert len(train.called) == 1


def test_a_dry_run_shows_the_table_of_all_and_the_commands_of_what_fits(start, one, tmp_path):
  code, out, _ = start(f'--max_flops={2.5 * one}', '--over_budget=trim', '--dry_run')
  assert code == 0
  assert sum(line.startswith('missing') for line in out.split('\n')) == 4
  assert sum(line.startswith('python ') for line in out.split('\n')) == 2
  assert list(tmp_path.iterdir()) == []
  code, out, error = start(f'--max_flops={2.5 * one}', '--dry_run')
  assert code == 1
  assert sum(line.startswith('missing') for line in out.split('\n')) == 4
  assert error.count('\n') == 1


def test_predictions_say_what_they_rest_on(start, tmp_path, monkeypatch, only_the_pace):
  pace = Pace(compiling=1000.0, starting=1000.0, step=1.0, eval_batch=0.0, save=0.0, steps=1000)
  monkeypatch.setattr(measure, 'measure', lambda *args: pace)
  code, out, _ = start('--dry_run')
  assert 'seconds: estimate: products at' in out
  assert list(tmp_path.iterdir()) == []
  code, out, _ = start('--dry_run', '--measure')
  assert 'seconds: measured on this machine' in out
  rows = [line.split() for line in out.split('\n') if line.startswith('missing')]
  assert all('2000' in row for row in rows)
  assert [p.name for p in (tmp_path / 'runs/tiny').rglob('*') if p.is_file()] == ['measured.json']
  code, out, _ = start('--dry_run')  # remembered
  assert 'seconds: measured on this machine' in out
  code, out, _ = start('--dry_run', '--device=v5e', '--devices=8')
  assert '8 x v5e' in out
  assert 'measured on this machine' not in out


def test_a_pool_on_the_cores_of_one_machine_is_no_cheaper(start, monkeypatch, only_the_pace):
  pace = Pace(compiling=1000.0, starting=1000.0, step=1.0, eval_batch=0.0, save=0.0, steps=1000)
  monkeypatch.setattr(measure, 'measure', lambda *args: pace)
  for workers, seconds in (('1', '2000'), ('2', '4000')):
    _, out, _ = start('--dry_run', '--measure', f'--local_workers={workers}')
    assert all(seconds in line.split() for line in out.split('\n') if line.startswith('missing'))
    assert '2.22 chip-hours' in out


def test_limits_on_time_and_money_are_measured_before_they_are_believed(start, tmp_path, monkeypatch, only_the_pace):
  asked = []

  def fake(arm, *rest):
    asked.append(arm.name)
    return Pace(compiling=1800.0, starting=1800.0, step=1.8, eval_batch=0.0, save=0.0, steps=1000)

  monkeypatch.setattr(measure, 'measure', fake)
  train = FakeTrain()
  code, _, error = start('--max_hours=3.5', train=train)
  assert code == 1
  assert 'the sweep would take 4 hours' in error
  assert '2 of its 4 missing arms fit' in error
  assert asked == ['a']  # one program for all of them
  first = launch.cli.expand(experiment(base=ALONE, sweep=SWEEP))[0]
  lost = workdirs.folder(Path('runs/tiny'), first.arm_id) / 'lost.json'
  lost.parent.mkdir(parents=True)
  lost.write_text('{"redone": 3600.0}')
  code, _, error = start('--max_hours=4.5', train=train)
  assert 'the sweep would take 5 hours, 1 hours of it spent' in error
  lost.unlink()
  code, _, error = start('--max_cost=1.5', '--config.run.price=0.5', train=train)
  assert code == 1
  assert 'the sweep would take $2' in error
  code, out, _ = start('--max_cost=1.5', '--config.run.price=0.5', '--over_budget=trim', train=train)
  assert code == 0
  assert train.called == [('a', 0), ('b', 0)]


@pytest.mark.parametrize(
  'engine, name, chip, count',
  [
    (tpu_vm, 'v6e-4', 'v6e', 4),
    (tpu_vm, 'v5p-16', 'v5p', 8),
    (gke, 'v5litepod-16', 'v5e', 16),
    (gke, 'tpu7x-8', '', 1),  # of which the table knows nothing
    (skypilot, 'H100:8', 'h100', 8),
    (skypilot, 'A100', 'a100-40gb', 1),
    (skypilot, 'tpu-v6e-8', 'v6e', 8),
    (slurm, 'h200:4', 'h200', 4),
    (slurm, '4', '', 1),
  ],
)
def test_a_slice_is_predicted_as_what_it_is(engine, name, chip, count, monkeypatch):
  monkeypatch.setattr(engine.cloud, 'check_share', lambda *given: None)
  monkeypatch.setattr(engine.cloud, 'check_devices', lambda *given: None)
  short = engine.__name__.split('.')[-1]
  flag, needed = {
    'tpu_vm': ('type', ['zone=z', 'share=10.0.0.2:/v']),
    'gke': ('type', ['image=i', 'pvc=p']),
    'skypilot': ('accelerators', ['bucket=gs://bucket']),
    'slurm': ('gpus', []),
  }[short]
  asked, plan = [f'--{short}_{one}' for one in (f'{flag}={name}', *needed)], SimpleNamespace(workdir=Path('/w'))
  options = cli.parse([f'--launch={short}', *asked], 'tiny')
  engine.check(plan, options)
  assert (options.device, options.devices) == (chip, count)
  options = cli.parse([*asked, '--device=v4'], 'tiny')
  engine.check(plan, options)
  assert (options.device, options.devices) == ('v4', 1)  # as the user said


SLICE = ['--launch=tpu_vm', '--tpu_vm_type=v6e-16', '--tpu_vm_zone=z', '--tpu_vm_share=10.0.0.2:/v']


def test_a_small_sweep_on_a_slice_takes_minutes_and_dollars(start):
  """Not nothing, as its FLOPs alone would say."""
  code, out, error = start('--dry_run', '--workdir=/mnt/slm/tiny', *SLICE)
  assert (code, error) == (0, '')
  (line,) = (line for line in out.split('\n') if line.startswith('4 arms, 4 to run'))
  minutes = float(line.partition(' about ')[2].split()[0])
  dollars = float(line.partition('$')[2].split(',')[0])
  its = estimate.ACCELERATOR
  least = 4 * (its.process + its.program + its.finish) / 60  # a process for each arm
  assert least < minutes < 4 * least
  assert dollars == pytest.approx(16 * minutes / 60 * 2.7, rel=0.1)
  assert 'without the start of machines' in out
  assert '20 s to start a process' in out


def test_one_process_for_all_arms_starts_once(start, monkeypatch):
  """A limit that leaves room for one start is not refused as if every arm had its own."""
  nothing = estimate.Terms(*[0.0] * len(estimate.Terms._fields))
  monkeypatch.setattr(estimate, 'CPU', nothing._replace(process=3600.0))
  monkeypatch.setattr(measure, 'measure', lambda *given: Pace(0.0, 0.0, 0.001, 0.0, 0.0, 1000))
  train = FakeTrain()
  assert start('--max_hours=1.1', train=train)[0] == 0
  assert len(train.called) == 4
  code, _, error = start('--max_hours=2', '--local_workers=4', '--workdir=other', '--dry_run', '--measure')
  assert code == 1
  assert 'the sweep would take 4 hours' in error
