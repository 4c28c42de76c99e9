"""What a machine has, found without JAX, and how it is dealt out."""

import os

import pytest
from fakes import arms_of, experiment
from hypothesis import given
from hypothesis import strategies as st

from launch import cli, local, places
from launch.plan import Plan
from slm_jax import chips
from slm_jax.config import ConfigError

CORES = sorted(os.sched_getaffinity(0))


@pytest.fixture
def machine(tmp_path, monkeypatch):
  """A machine with given GPUs or chips: an nvidia-smi on the PATH, device files, and JAX's plugin for them."""

  def make(gpus=0, chips='', plugin=''):
    if gpus:
      tool = tmp_path / 'nvidia-smi'
      listed = ''.join(
        f'GPU {i}: NVIDIA H100 80GB HBM3 (UUID: GPU-{i})\\n  MIG 1g.10gb Device 0: x\\n' for i in range(gpus)
      )
      tool.write_text(f'#!/bin/sh\n[ "$1" = -L ] && printf "{listed}"\n')
      tool.chmod(0o755)
    for i in range(4):
      if chips:
        path = tmp_path / 'dev' / f'{chips}{i}'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    if plugin:
      (tmp_path / plugin).mkdir()
      (tmp_path / plugin / '__init__.py').write_text('raise ImportError("must not be imported")')
      monkeypatch.syspath_prepend(tmp_path)
    return {'PATH': f'{tmp_path}:{os.environ["PATH"]}'}, tmp_path / 'dev'

  return make


def test_gpus_are_those_that_jax_would_use(machine):
  env, dev = machine(gpus=2, plugin='jax_cuda13_plugin')
  assert places.accelerators(env, dev) == ('cuda', ['0', '1'])
  assert places.accelerators({**env, 'CUDA_VISIBLE_DEVICES': '5,GPU-7'}, dev) == ('cuda', ['5', 'GPU-7'])
  for given_ in ({'CUDA_VISIBLE_DEVICES': ''}, {'JAX_PLATFORMS': 'cpu'}, {'JAX_PLATFORMS': 'tpu,cpu'}):
    assert places.accelerators({**env, **given_}, dev) == ('', [])
  for name in ('cuda', 'gpu', 'cpu,gpu'):
    assert places.accelerators({**env, 'JAX_PLATFORMS': name}, dev)[1] == ['0', '1']


def test_gpus_without_the_plugin_are_none(machine):
  assert places.accelerators(*machine(gpus=2)) == ('', [])


def test_a_plugin_without_gpus_is_none(machine):
  assert places.accelerators(*machine(plugin='jax_cuda12_plugin')) == ('', [])


@pytest.mark.parametrize('chips', ['accel', 'vfio/'])
def test_chips_by_their_device_files(machine, chips):
  env, dev = machine(chips=chips, plugin='libtpu')
  (dev / 'vfio').mkdir(exist_ok=True)
  (dev / 'vfio' / 'vfio').touch()
  assert places.accelerators(env, dev) == ('tpu', ['0', '1', '2', '3'])
  assert places.accelerators({**env, 'TPU_VISIBLE_CHIPS': '2'}, dev) == ('tpu', ['2'])


@given(st.integers(1, 40), st.integers(0, 16))
def test_equal_shares_and_nothing_twice_where_there_is_enough(n, gpus):
  found = places.split(n, 'cuda' if gpus else '', [str(i) for i in range(gpus)], {})
  assert len(found) == n
  for things, of in ((CORES, 'cores'), (range(gpus), 'devices')):
    shares = [getattr(place, of) for place in found]
    assert len({len(share) for share in shares}) == 1
    used = [thing for share in shares for thing in share]
    if len(things) >= n:
      assert len(set(used)) == len(used) == n * (len(things) // n)
    elif things:  # shared, as evenly as can be
      counts = [used.count(thing) for thing in set(used)]
      assert len(counts) == len(things)
      assert max(counts) - min(counts) <= 1
      if of == 'devices':
        fractions = [float(place.env['XLA_PYTHON_CLIENT_MEM_FRACTION']) for place in found]
        for thing in set(used):
          its = [f for f, share in zip(fractions, shares, strict=True) if thing in share]
          assert 0 < sum(its) <= places.GPU_MEMORY + 1e-9
  for place in found:
    assert place.env.get('CUDA_VISIBLE_DEVICES', '') == ','.join(place.devices)
  # All are charged for no more than the chips that there are.
  charged = sum(max(len(place.devices), 1) * float(place.env.get(chips.SHARE, 1)) for place in found)
  assert charged <= max(gpus, 1) + 1e-9


def test_what_the_user_said_of_gpu_memory_stays():
  for name in ('XLA_PYTHON_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_PREALLOCATE'):
    for place in places.split(3, 'cuda', ['0'], {name: 'x'}):
      assert place.env.keys() == {'CUDA_VISIBLE_DEVICES', chips.SHARE}


def test_a_chip_for_each_process():
  found = places.split(2, 'tpu', ['0', '1', '2', '3'], {})
  assert [place.env['TPU_VISIBLE_CHIPS'] for place in found] == ['0', '1']
  assert len({place.env['TPU_PROCESS_PORT'] for place in found}) == 2
  assert {place.env['TPU_CHIPS_PER_PROCESS_BOUNDS'] for place in found} == {'1,1,1'}
  with pytest.raises(ConfigError, match='--local_workers=5: this machine has 4 TPU chips'):
    places.split(5, 'tpu', ['0', '1', '2', '3'], {})


@pytest.mark.parametrize(
  'cores, devices, text',
  [
    ((), (), 'this machine'),
    ((3,), (), 'core 3'),
    ((0, 1, 2, 3), ('1',), 'cores 0-3, GPU 1'),
    ((0, 2), ('2', '3'), 'cores 0,2, GPUs 2-3'),
    ((0,), ('GPU-a', 'GPU-b'), 'core 0, GPUs GPU-a,GPU-b'),
  ],
)
def test_a_place_says_what_it_is(cores, devices, text):
  assert str(places.Place(cores, {}, devices, 'cuda')) == text


def test_an_arm_that_is_split_over_tpu_chips_has_all_of_them_in_this_process(monkeypatch, tmp_path):
  monkeypatch.setattr(places, 'accelerators', lambda: ('tpu', [str(i) for i in range(8)]))
  module = experiment(sweep=[{'seed': i, 'run.fsdp': 4} for i in range(3)])
  plan = Plan(module, tmp_path, arms_of(module), [], 'base')
  assert len(local.places_of(plan, cli.parse([], 'tiny'))) == 1
  with pytest.raises(ConfigError, match='--local_workers=2: each has one TPU chip, and an arm is split over 4'):
    local.places_of(plan, cli.parse(['--local_workers=2'], 'tiny'))
