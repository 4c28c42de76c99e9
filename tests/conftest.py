"""All tests run on the CPU, on eight fake devices, and treat silent rank promotion as an error."""

import os
import signal

import cheap

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {cheap.flags(8)}'

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from slm_jax import sharding  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts jobs in the background with it ignored

hypothesis.settings.register_profile('untimed', deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile('untimed')


@pytest.fixture(scope='module')
def one_fake_device():
  """Arms of this module train on the first of the fake devices."""
  make = sharding.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      sharding, 'make_mesh', lambda data=0, fsdp=1, tensor=1, devices=None: make(1, 1, 1, jax.devices()[:1])
    )
    yield


@pytest.fixture(autouse=True)
def _no_rank_promotion():
  with jax.numpy_rank_promotion('raise'):
    yield
