"""What processes agree on: laws of slm_jax.distributed, with threads in place of processes."""

import math
import os
import random
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax import distributed
from slm_jax.config import ConfigError
from slm_jax.distributed import Group


class Store:
  """The coordination service's key-value store, in memory."""

  def __init__(self):
    self._values, self._changed = {}, threading.Condition()

  def key_value_set(self, key, value):
    with self._changed:
      if key in self._values:
        raise RuntimeError(f'ALREADY_EXISTS: {key}')
      self._values[key] = value
      self._changed.notify_all()

  def blocking_key_value_get(self, key, timeout_in_ms):
    with self._changed:
      if not self._changed.wait_for(lambda: key in self._values, timeout_in_ms / 1000):
        raise RuntimeError(f'DEADLINE_EXCEEDED: {key}')
      return self._values[key]


class OfThisThread:
  """Stands for the module's `_group`: each thread is a process."""

  def __init__(self):
    self.__dict__['local'] = threading.local()

  def __getattr__(self, name):
    return getattr(self.local.group, name)

  def __setattr__(self, name, value):
    setattr(self.local.group, name, value)


def together(count, function):
  """What function(index) returns, or the error that it raises, in `count` threads that are processes."""
  store, groups, ends = Store(), OfThisThread(), [None] * count

  def run(index):
    groups.local.group = group = Group(store, index, count)
    threading.Thread(target=lambda: group.agree_to_stop(group.hear('stop')), daemon=True).start()
    try:
      ends[index] = function(index)
    except Exception as error:
      ends[index] = error

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(distributed, '_group', groups)
    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(timeout=30)
      assert not thread.is_alive(), 'one waits for ever'
  return ends


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.data())
def test_all_stop_at_the_same_check_however_far_each_has_come(count, data):
  """They may be apart by what a collective allows: here, one check. Any number of them is asked, at any moment."""
  asked = data.draw(st.dictionaries(st.integers(0, count - 1), st.integers(1, 20), min_size=1))
  pace = data.draw(st.lists(st.floats(0, 0.002), min_size=count, max_size=count))
  steps = [threading.Barrier(count) for _ in range(200)]  # a step, which none ends before all have begun it

  def loop(index):
    for i, step in enumerate(steps, 1):
      time.sleep(pace[index] * random.random())
      if distributed.stop_agreed(asked.get(index, math.inf) <= i):
        return i
      step.wait(timeout=20)
    return None

  ends = together(count, loop)
  assert len(set(ends)) == 1, ends
  assert ends[0] is not None
  assert ends[0] > min(asked.values())


def test_nobody_stops_unasked():
  assert together(3, lambda index: [distributed.stop_agreed(False) for _ in range(50)]) == [[False] * 50] * 3


def test_what_process_0_finds_is_told_to_all():
  def process(index):
    found = distributed.on_main(lambda: {'a': [index, None]})
    with pytest.raises(ConfigError, match='full'):
      distributed.on_main(complain, 'full')
    return found, distributed.on_main(lambda: index), distributed.first_of('x' * index)

  assert together(3, process) == [({'a': [0, None]}, 0, 'x')] * 3


def complain(text):
  raise ConfigError(text)


@pytest.mark.parametrize('wrong', [None, 0, 2])
def test_main_first_then_the_others_and_an_error_of_one_is_an_error_of_all(wrong):
  order = []

  def make(index):
    time.sleep(0.05 if index == 0 else 0)
    order.append(index)
    return complain(f'disk of {index}') if index == wrong else index

  ends = together(3, lambda index: distributed.main_first(lambda: make(index)))
  assert order[0] == 0
  if wrong is None:
    assert ends == [0, 1, 2]
  else:
    assert [str(end) for end in ends] == [f'disk of {wrong}'] * 3
  assert len(order) == (1 if wrong == 0 else 3)  # what cannot be built is not tried by all


def test_failing_together_and_alone(monkeypatch):
  monkeypatch.setattr(distributed, 'HEARTBEAT', 0.2)
  assert together(3, lambda index: (distributed.failed_together(), distributed.failed_together())) == [(True, True)] * 3
  assert together(3, lambda index: index == 1 or distributed.failed_together()) == [False, True, False]


# ----------------------------------------------------------------------------------------------- finding each other


@pytest.mark.parametrize(
  'mode,message',
  [
    ('here', '--distributed=here: allowed: auto, on, off, ADDRESS:PORT,COUNT,INDEX'),
    ('10.0.0.2:8476,2', 'expected ADDRESS:PORT,COUNT,INDEX, as in 10.0.0.2:8476,4,0'),
    ('10.0.0.2,2,0', 'expected ADDRESS:PORT,COUNT,INDEX'),
    ('10.0.0.2:http,2,0', 'expected ADDRESS:PORT,COUNT,INDEX'),
    ('10.0.0.2:8476,2,-1', 'expected ADDRESS:PORT,COUNT,INDEX'),
    ('10.0.0.2:8476,2,2', 'numbered from 0 to 1'),
    ('on', 'a single process .no cluster is detected.'),
  ],
)
def test_a_wrong_mode_is_one_line(mode, message):
  with pytest.raises(ConfigError, match=message) as error:
    distributed.start(mode)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('mode', ['auto', 'off', 'localhost:1,1,0'])
def test_a_single_process_is_left_alone(mode):
  distributed.start(mode)
  assert distributed.is_main()
  distributed.leave(1)


BATCH = {'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '0', 'SLURM_LOCALID': '0'}
STEP = {**BATCH, 'SLURM_STEP_NODELIST': 'n[1-2]', 'SLURM_STEP_NUM_TASKS': '4', 'SLURM_STEP_NUM_NODES': '2'}
ALL = {'num_processes': 4, 'local_device_ids': []}


@pytest.mark.parametrize(
  'environment,expected',
  [
    (BATCH, None),  # a batch script of a job of four tasks, which srun has yet to start
    ({**STEP, 'SLURM_STEP_NUM_TASKS': '1'}, None),  # srun --pty bash
    (STEP, {'num_processes': 4}),  # two tasks share a node's GPUs: JAX gives each one
    ({**STEP, 'CUDA_VISIBLE_DEVICES': '0,1'}, {'num_processes': 4}),
    ({**STEP, 'CUDA_VISIBLE_DEVICES': '1'}, ALL),  # --gpus-per-task=1: each sees one
    ({**STEP, 'SLURM_STEP_NUM_NODES': '4', 'CUDA_VISIBLE_DEVICES': '0,1,2,3'}, ALL),  # a node to itself
    ({**STEP, 'SLURM_STEP_NUM_NODES': '4', 'JAX_LOCAL_DEVICE_IDS': '0,1'}, {'num_processes': 4}),
  ],
)
def test_slurm_counts_what_srun_started(environment, expected, monkeypatch):
  for name in [name for name in os.environ if name.startswith(('SLURM_', 'CUDA_VISIBLE', 'JAX_LOCAL'))]:
    monkeypatch.delenv(name)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  assert distributed.detected('auto') == expected
