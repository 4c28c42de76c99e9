"""All tests run on the CPU, on eight fake devices, and treat silent rank promotion as an error.

SLM_TESTS_SEEDS=1000 adds that number to every seed that a test gives to JAX and NumPy: what holds of one draw by luck
fails then (`make rounding`). Tests of numbers that are written down are marked `as_written`, and skip.
"""

import logging
import os
import signal
import sys
from pathlib import Path

import cheap

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {cheap.flags(8)}'

import absl.logging  # noqa: E402
import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from slm_jax import sharding  # noqa: E402

sys.path.append(str(Path(sys.prefix, 'aot')))  # libtpu (Makefile); after JAX, which would take it for a TPU

SEEDS = int(os.environ.get('SLM_TESTS_SEEDS', '0'))

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts jobs in the background with it ignored

# Whole files go to a worker (--dist loadfile): none of these is to be left for the end. The first of them often waits.
LONGEST = [
  'test_slurm_real.py',
  'test_survival.py',
  'test_multiprocess.py',
  'test_resume.py',
  'test_population.py',
  'test_train.py',
]

hypothesis.settings.register_profile('untimed', deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile('untimed')


def pytest_configure(config):
  config.addinivalue_line('markers', 'as_written: compares with numbers of one draw that are written down')
  if SEEDS:
    _shift_seeds(SEEDS)
  config.option.loadscopereorder = False  # xdist would begin with the files of many tests, which are short ones


def pytest_collection_modifyitems(items):
  order = {name: i for i, name in enumerate(LONGEST)}
  items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))
  for item in items if SEEDS else ():
    if item.get_closest_marker('as_written'):
      item.add_marker(pytest.mark.skip(reason=f'SLM_TESTS_SEEDS={SEEDS}'))


def _shift_seeds(by):
  key, legacy, generator = jax.random.key, jax.random.PRNGKey, np.random.default_rng
  jax.random.key = lambda seed, **more: key(seed + by, **more)
  jax.random.PRNGKey = lambda seed, **more: legacy(seed + by, **more)
  np.random.default_rng = lambda seed=None: generator(seed + by if isinstance(seed, int) else seed)


@pytest.fixture(scope='module')
def one_fake_device():
  """Arms of this module train on the first of the fake devices."""
  make = sharding.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      sharding, 'make_mesh', lambda data=0, fsdp=1, tensor=1, devices=None: make(1, 1, 1, jax.devices()[:1])
    )
    yield


@pytest.fixture(autouse=True, scope='module')
def _programs_end_with_their_module():
  """A process that keeps those of all modules comes to 5 GB and more, and is slower for it."""
  yield
  jax.clear_caches()


@pytest.fixture(autouse=True)
def _no_rank_promotion():
  with jax.numpy_rank_promotion('raise'):
    yield


@pytest.fixture(autouse=True)
def _logging_as_it_was():
  """What a command that runs inside of a test says of logging ends with the test."""
  verbosity, handler = absl.logging.get_verbosity(), absl.logging.get_absl_handler()
  there = handler in logging.root.handlers
  yield
  absl.logging.set_verbosity(verbosity)
  if not there:
    logging.root.removeHandler(handler)
