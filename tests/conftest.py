"""All tests run on the CPU, on eight fake devices, and treat silent rank promotion as an error."""

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
import pytest  # noqa: E402

from slm_jax import sharding  # noqa: E402

sys.path.append(str(Path(sys.prefix, 'aot')))  # libtpu (Makefile); after JAX, which would take it for a TPU

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
  config.option.loadscopereorder = False  # xdist would begin with the files of many tests, which are short ones


def pytest_collection_modifyitems(items):
  order = {name: i for i, name in enumerate(LONGEST)}
  items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


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
