"""Steps compiled for TPUs that are not here: what is printed is of the program that training would run.

Most of it needs the package libtpu, which `make test` installs on Linux x86_64: it is skipped where that is not.
"""

import importlib.util
import math

import jax
import pytest
from fakes import arms_of, experiment

from launch import aot, aot_slice, aot_step
from slm_jax import chips, sharding
from slm_jax.config import ConfigError
from slm_jax.data.config import DataConfig
from slm_jax.distill.logits import Distill
from slm_jax.experiment import Config, TrainConfig
from slm_jax.model.config import ModelConfig
from slm_jax.model.flops import parameter_count
from slm_jax.prune.transform import Prune

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason="libtpu is not installed: pip install '.[aot]'"
)
aot_slice.prepare()

# A head size of 24 is padded to 128, a sequence of 96 tokens to 128.
MODEL = ModelConfig(
  vocab_size=256, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=24, d_ff=128, max_len=128, unroll=1
)
BASE = Config(
  model=MODEL,
  data=DataConfig(tokenizer='sentencepiece', vocab_size=256, seq_len=96, batch_size=16),
  train=TrainConfig(steps=20),
)
SWEEP = [
  {'name': 'teacher', 'model.d_ff': 256},
  {'name': 'plain'},
  {'name': 'distilled', 'transforms': (Distill('teacher', precision='bfloat16'),)},
  {'name': 'pruned', 'transforms': (Prune(0.5),)},
  {'name': 'local', 'model.window': 16, 'model.global_every': 2},
  *({'name': f'lr {rate}', 'optim.learning_rate': rate, 'model.d_ff': 96} for rate in (1e-3, 2e-3, 4e-3)),
]


def arms():
  found = arms_of(experiment(base=BASE, sweep=SWEEP))
  return {arm.name: arm for arm in found}, {arm.arm_id: arm for arm in found}


def compiled(name, topology='v5e:2x2', slices=1, shape=(0, 1, 1), **options):
  by_name, everyone = arms()
  devices, chip = aot_slice.devices(topology, slices)
  mesh = sharding.make_mesh(*shape, devices=devices)
  return aot_step.facts(by_name[name], everyone, mesh, chip, **options)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
  'topology, slices, message',
  [
    ('', 1, r'--topology=\(not given\): expected one of v4:SHAPE, v5e:SHAPE'),
    ('v9:2x2', 1, 'expected one of v4:SHAPE'),
    ('v5e', 1, 'v5e has no slice without a shape; there is: 1x1, 2x2'),
    ('v5e:3x3', 1, 'v5e has no slice 3x3; there is: 1x1, 2x2'),
    ('v5p:4x4', 1, 'v5p has no slice 4x4; there is: 2x2x1'),
    ('v5e:2x2', 0, '--num_slices=0: must be positive'),
  ],
)
def test_a_slice_that_does_not_exist_is_one_line(topology, slices, message):
  with pytest.raises(ConfigError, match=message) as error:
    aot_slice.check(topology, slices)
  assert '\n' not in str(error.value)


def ended(capsys, *argv):
  with pytest.raises(SystemExit) as end:
    aot.main(argv)
  out, err = capsys.readouterr()
  return end.value.code, out, err


def test_without_libtpu_the_extra_is_named(monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  code, _, err = ended(capsys, '--experiment=experiments/shrink.py', '--topology=v5e:2x2')
  assert code == 1
  assert err == (
    'error: --topology=v5e:2x2: needs the package libtpu, which is not installed: '
    "pip install '.[aot]' in the project's folder\n"
  )


@needs_libtpu
@pytest.mark.parametrize(
  'argv, message',
  [
    (['--experiment=experiments/nowhere.py'], '--experiment=experiments/nowhere.py: no such file'),
    (['--experiment=experiments.nowhere'], "No module named 'experiments.nowhere'"),
    (['--experiment=experiments/shrink.py', '--arm=nobody'], '--arm=nobody: no such arm; there is: teacher, scratch'),
    (
      ['--experiment=experiments/shrink.py', '--config.run.fsdp=3'],
      'run.fsdp=3, run.tensor=1: 3 does not divide the 4',
    ),
    (['--experiment=experiments/shrink.py', '--config.run.tensor=4'], "'kv_heads' of size 2 does not split over 4"),
    (['--experiment=experiments/shrink.py', '--config.data.batch_size=6'], 'data.batch_size=6: not divisible'),
    (['--experiment=experiments/shrink.py', '--num_slices=2', '--config.run.fsdp=8'], 'not split over the 2 slices'),
    (['--experiment=experiments/shrink.py', '--sweep_mesh', '--meshes=4x1'], '--meshes=4x1: expected data x fsdp x'),
    (['--experiment=experiments/shrink.py', 'stray'], "'stray': not a flag"),
    (['--experiment=experiments/shrink.py', '--json=/nowhere/x.json'], '/nowhere/x.json: No such file or directory'),
  ],
)
def test_bad_input_is_one_line(argv, message, capsys):
  code, _, err = ended(capsys, '--topology=v5e:2x2', *argv)
  assert code == 1
  assert message in err
  assert err.count('\n') == 1


# ------------------------------------------------------------------------------------------------------- the steps


@needs_libtpu
@pytest.mark.parametrize('topology', ['v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'])
def test_a_plain_step_on_every_kind(topology):
  its = compiled('plain', topology)
  assert its.chips == 4
  assert its.fits
  assert its.parts['parameters'] == 4 * parameter_count(MODEL)
  assert its.parts['optimiser'] == pytest.approx(8 * parameter_count(MODEL) / 4, rel=0.01), 'a share each'
  assert its.parts['teacher'] == its.parts['transforms'] == 0
  assert its.kernels.keys() == {'splash'}
  assert its.limit > 0.9 * chips.table()[topology.split(':')[0]].hbm
  gradient = 4 * parameter_count(MODEL)
  reduced = [one for one in its.collectives if one.kind in ('all-reduce', 'reduce-scatter')]
  assert {(one.group, one.slices) for one in reduced} == {(4, 1)}, 'one group of all'
  assert sum(one.bytes for one in reduced) == pytest.approx(gradient, rel=0.1), 'every gradient once'
  gathered = sum(one.bytes for one in its.collectives if one.kind == 'all-gather')
  assert gathered == pytest.approx(gradient, rel=0.01), 'and every parameter, which one device has updated'
  assert its.flops > its.model_flops


@needs_libtpu
def test_a_distilling_step_has_its_teacher_beside_it():
  its, (by_name, _) = compiled('distilled'), arms()
  assert its.parts['teacher'] == 2 * parameter_count(by_name['teacher'].config.model)
  assert its.model_flops > compiled('plain').model_flops


@needs_libtpu
def test_a_pruning_step_has_its_masks():
  its = compiled('pruned')
  assert its.fits
  assert its.parts['transforms'] > 0


@needs_libtpu
def test_local_layers_and_a_sharded_state_on_two_slices():
  its = compiled('local', slices=2, shape=(2, 2, 2))
  assert its.kernels.keys() == {'splash'}
  assert its.parts['parameters'] < 4 * parameter_count(MODEL) / 2
  across = [one for one in its.collectives if one.slices == 2]
  assert 'all-reduce' in {one.kind for one in across}, 'gradients cross'
  assert {one.kind for one in its.collectives if one.slices == 1} >= {'all-gather'}
  assert all(roof > 0 for roof in its.roofs(chips.table()['v5e']).values())


@needs_libtpu
def test_a_population_is_one_program_on_one_chip():
  by_name, everyone = arms()
  group = [arm.config for name, arm in by_name.items() if name.startswith('lr')]
  devices, chip = aot_slice.devices('v5e:1x1')
  its = aot_step.facts(by_name['lr 0.001'], everyone, sharding.make_mesh(devices=devices), chip, group)
  assert its.parts['parameters'] == 3 * 4 * parameter_count(by_name['lr 0.001'].config.model)
  assert its.tokens == 3 * 16 * 96
  assert not its.collectives


@needs_libtpu
def test_what_is_printed(capsys, tmp_path):
  argv = ['--experiment=experiments/shrink.py', '--topology=v5e:2x2', '--arm=scratch', '--config.model.n_layers=1']
  small = ['--config.model.unroll=1', '--config.model.d_ff=64', f'--json={tmp_path / "facts.jsonl"}']
  code, out, err = ended(capsys, *argv, *small, '--sweep_mesh', '--meshes=4x1x1,1x1x4')
  assert (code, err) == (0, '')
  assert '4x1x1' in out
  assert "'kv_heads' of size 2 does not split" in out
  assert (tmp_path / 'facts.jsonl').read_text().count('\n') == 1


# ------------------------------------------------------------------------------------------------------ the search


def made_up(batch, fits, needed, activations, limit=100.0):
  parts = {'parameters': needed - activations, 'activations': activations, 'batch': 0.0}
  return aot_step.Facts((4, 1, 1), batch, 0, fits, needed, limit, parts, 0, 0, 0, (), {}, 0)


@pytest.mark.parametrize('truth', [1, 3, 7, 17, 100])
@pytest.mark.parametrize('start', [1, 8, 64])
@pytest.mark.parametrize('bend', [1.0, 0.8])
def test_the_largest_batch_is_found_in_a_few_compilations(truth, start, bend):
  """Activations that grow linearly, or slower, as where the compiler recomputes more."""
  asked = []

  def of(batch):
    asked.append(batch)
    n = batch // 4
    activations = 60 * (n / truth) ** bend
    return made_up(batch, n <= truth, 40 + activations, activations)

  good, bad = aot_step.largest(of(4 * start), 4, of)
  assert len(asked) <= 1 + aot_step.TRIES
  assert good <= 4 * truth
  assert good >= 0.5 * 4 * truth
  assert not bad or bad > 4 * truth


def test_of_a_small_model_the_largest_batch_is_not_guessed_from_next_to_nothing():
  """Where the first guess is ten times too large, as what stands beside the batch shrinks with it."""

  def of(batch):
    activations = 60 * batch / 400_000 + (0 if batch < 100 else 1e-4 * batch)
    return made_up(batch, activations <= 60, 40 + activations, activations)

  good, bad = aot_step.largest(of(4), 4, of)
  assert 0.5 * 240_000 < good <= 240_000 < bad


def test_nothing_fits():
  assert aot_step.largest(made_up(4, False, 300, 60), 4, lambda batch: made_up(batch, False, 300, 60)) == (0, 4)


def test_meshes_are_of_all_devices_and_never_cut_a_slice():
  for devices, slices in ((1, 1), (8, 1), (256, 1), (32, 2)):
    found = list(aot_step.meshes(devices, slices))
    assert len(set(found)) == len(found) > 0
    for data, fsdp, tensor in found:
      assert data * fsdp * tensor == devices
      assert data % slices == 0


def test_a_bound_is_the_highest_roof():
  chip = chips.table()['v5e']
  its = made_up(4, True, 50, 10)._replace(flops=4 * 197e12, traffic=2 * 819e9, model_flops=2 * 197e12)
  assert its.bound(chip) == (2.0, 'memory')
  assert its.mfu(chip) == pytest.approx(0.25)
  assert math.isclose(its.roofs(chip)['compute'], 1.0)
  assert jax.default_backend() == 'cpu'


@needs_libtpu
@pytest.mark.parametrize('most, hint', [(8, 'the largest that fits is 32'), (0, 'not even 4 fit; try run.fsdp')])
def test_what_is_too_large_is_refused_with_what_fits(most, hint, monkeypatch, capsys):
  """Of made-up memory, so that nothing is compiled."""

  def facts(arm, everyone, mesh, chip, group, batch=0):
    n = (batch or arm.config.data.batch_size) // 4
    return made_up(4 * n, n <= most, (40 + n) * 2**30, n * 2**30, limit=(40 + most) * 2**30)

  monkeypatch.setattr(aot_step, 'facts', facts)
  argv = ['--experiment=experiments/shrink.py', '--topology=v5e:2x2', '--arm=scratch', '--config.data.batch_size=256']
  code, out, err = ended(capsys, *argv)
  assert code == 1
  assert 'DOES NOT FIT' in out
  assert 'scratch: data.batch_size=256: needs 104.0 of' in err
  assert hint in err
  assert err.count('\n') == 1
