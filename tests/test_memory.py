"""What cannot fit into memory is refused in one line; the bound is below what the compiler says, so never wrongly."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest
import tiny
from fakes import arms_of, experiment

from launch import cli, local, worker
from launch.places import Place
from slm_jax import memory, sharding
from slm_jax.ablate import measure
from slm_jax.ablate.program import bytes_needed
from slm_jax.config import ConfigError, override
from slm_jax.experiment import Config
from slm_jax.model.config import ModelConfig
from slm_jax.model.flops import parameter_count
from slm_jax.train import abstract_batch, jitted


def config(**changes) -> Config:
  base = dataclasses.replace(tiny.config(), transforms=())
  return override(base, {key.replace('__', '.'): value for key, value in changes.items()})


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'optim__name': 'muon'},
    {'optim__name': 'adafactor'},
    {'model__param_dtype': 'bfloat16', 'model__dtype': 'bfloat16'},
    {'train__accumulate': 4, 'data__batch_size': 32},
    {'model__remat': 'full', 'data__batch_size': 64},
    {'model__d_model': 128, 'model__d_ff': 512},
    {'run__fsdp': 4},
    {'run__fsdp': 2, 'run__tensor': 2, 'model__n_kv_heads': 2},
    {'run__spread_optimizer': False},
    {'run__data_parallel': 1},
  ],
)
def test_the_bound_is_below_what_the_compiler_says(changes, tmp_path):
  one = changes.get('run__data_parallel') == 1
  its = config(**changes)
  devices = jax.devices()[:1] if one else jax.devices()
  mesh = sharding.make_mesh(its.run.data_parallel, its.run.fsdp, its.run.tensor, devices)
  job = measure.stand_in(its, {}, tmp_path, allocate=False, mesh=mesh)
  compiled = jitted(job).lower(job.abstract, abstract_batch(job), job.frozen).compile()
  least = memory.of_device(its, len(devices))
  assert 0 < sum(least) <= bytes_needed(compiled)
  if one:  # and not uselessly far below
    assert least.parameters == 4 * parameter_count(its.model)
    assert least.optimizer == 2 * least.parameters


def test_without_steps_there_are_no_gradients():
  assert memory.of_device(config(train__steps=0), 1).gradients == 0


def test_both_numbers_and_the_larger_part_are_named(monkeypatch):
  monkeypatch.setattr(memory, 'of_machine', lambda: 16 * memory.GIB)
  wide = config(model=ModelConfig(d_model=2**15, d_ff=2**15))
  words = r'^model with [\d,]+ parameters: a step needs at least [\d.,]+ GiB \(parameters [\d.,]+, gradients'
  with pytest.raises(ConfigError, match=words) as e:
    memory.check(wide, jax.devices()[:1])
  assert str(e.value).endswith('and this machine has 16.0 GiB')
  with pytest.raises(ConfigError, match='data.batch_size=2000000000, data.seq_len=64: a step needs at least 9,5') as e:
    memory.check(config(data__batch_size=2_000_000_000), jax.devices()[:1])
  assert '\n' not in str(e.value)
  memory.check(config(), jax.devices())


def test_devices_of_one_machine_share_its_memory_and_others_have_their_own(monkeypatch):
  class Gpu:
    process_index, platform, device_kind = 0, 'gpu', 'H100'

    def memory_stats(self):
      return {'bytes_limit': 2 * memory.GIB}

  its = config(model__d_model=2**12, model__d_ff=2**12)  # 0.4 GiB of parameters
  monkeypatch.setattr(memory, 'of_machine', lambda: 2 * memory.GIB)
  memory.check(its, [Gpu()])
  with pytest.raises(ConfigError, match='for each of 8 devices'):
    memory.check(its, jax.devices())
  large = override(its, {'model.d_ff': 2**15})
  with pytest.raises(ConfigError, match=r'a device \(H100\) has 2.0 GiB'):
    memory.check(large, [Gpu()])
  memory.check(override(large, {'run.fsdp': 8}), [Gpu()] * 8)


@pytest.mark.parametrize('more', [[], ['--dry_run']])
@pytest.mark.parametrize('key', ['data.batch_size', 'model.d_model', 'model.vocab_size'])
def test_a_local_launch_is_refused_before_anything_is_written(key, more, tmp_path, capsys):
  with pytest.raises(SystemExit) as ended:
    cli.main(experiment(), [f'--config.{key}=2e9', f'--workdir={tmp_path}/runs', *more])
  error = capsys.readouterr().err
  assert ended.value.code == 1
  assert 'a step needs at least' in error
  assert error.count('\n') == 1
  assert not (tmp_path / 'runs').exists()


def test_what_another_machine_has_is_not_ours_to_say(tmp_path, capsys):
  argv = ['--config.model.d_model=2e6', f'--workdir={tmp_path}/runs', '--dry_run', '--device=h100']
  assert cli.launch(experiment(), argv) == 0
  assert ' arms, 1 to run' in capsys.readouterr().out


def test_devices_that_stand_for_others_are_not_asked(tmp_path, monkeypatch):
  monkeypatch.setattr(memory, 'of_machine', lambda: 1.0)
  arms = arms_of(experiment(base=config()))
  with pytest.raises(ConfigError, match='a step needs at least'):
    worker.preflight(arms, tmp_path)
  asked = []
  dataset = SimpleNamespace(notices=())
  monkeypatch.setattr('slm_jax.train.inputs', lambda config, workdir: (dataset, asked.append(config)))
  worker.preflight(arms, tmp_path, own_devices=False)
  assert len(asked) == 1
  places = [Place((), {}, (name,), 'cuda') for name in '01']
  monkeypatch.setattr(local, 'places_of', lambda plan, options: places)
  monkeypatch.setattr(jax.config, 'update', lambda name, value: None)
  local.ready(SimpleNamespace(arms=arms, workdir=tmp_path), None)
  assert len(asked) == 2


def test_what_is_done_needs_no_memory(tmp_path, monkeypatch):
  monkeypatch.setattr(memory, 'of_machine', lambda: 1.0)
  (arm,) = arms_of(experiment(base=config()))
  (tmp_path / 'arms' / arm.arm_id).mkdir(parents=True)
  (tmp_path / 'arms' / arm.arm_id / 'DONE').touch()
  worker.check_memory([arm], tmp_path)
