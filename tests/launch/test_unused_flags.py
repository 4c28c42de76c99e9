"""A flag that was given and that nothing will look at is refused."""

import pytest
from fakes import FakeTrain, experiment

from launch import cli
from slm_jax.config import ConfigError

FLAGS = {
  '--over_budget=trim': 'has no effect without --max_flops or --max_cost or --max_hours',
  '--search_round=3': 'has no effect without --search',
  '--measure': 'has no effect without --dry_run, --max_cost or --max_hours',
  '--device=h100': 'has no effect without --dry_run, --max_cost or --max_hours',
  '--slurm_time=1:00:00': 'has no effect without --launch=slurm',
  '--tpu_vm_zone=z': 'has no effect without --launch=tpu_vm',
  '--gke_queue=q': 'has no effect without --launch=gke',
  '--skypilot_spot': 'has no effect without --launch=skypilot',
  '--launch=slurm --local_workers=2': '--local_workers=2: has no effect without --launch=local',
  '--max_cost=5': '--max_cost: this machine, no price given; give one',
  '--max_cost=5 --dry_run': '--max_cost: this machine, no price given; give one',
}


@pytest.mark.parametrize('words', FLAGS)
def test_a_flag_without_effect_is_refused_before_anything_is_done(words, tmp_path):
  train, workdir = FakeTrain(), tmp_path / 'runs'
  with pytest.raises(ConfigError) as error:
    cli.launch(experiment(), [f'--workdir={workdir}', *words.split()], train)
  assert FLAGS[words] in str(error.value)
  assert not train.called
  assert not workdir.exists()


def test_what_only_some_arms_read_is_a_line(tmp_path, capsys):
  module = experiment(sweep=[{'name': 'dense'}, {'name': 'cut', 'init.arm': 'dense', 'model.n_layers': 1}])
  assert cli.launch(module, [f'--workdir={tmp_path}', '--config.init.by=random'], FakeTrain()) == 0
  assert "init.by='random' has no effect in 1 of 2 arms, without init.arm\n" in capsys.readouterr().out


@pytest.mark.parametrize('words', ['--search_round=1', '--over_budget=refuse', '--local_restarts=3', '--slurm_cpus=1'])
def test_a_default_is_never_refused(words, tmp_path):
  assert cli.launch(experiment(), [f'--workdir={tmp_path}', words], FakeTrain()) == 0
