"""metrics.jsonl: flushed line by line, exact after a restart, never at the mercy of a sink."""

import importlib.machinery
import importlib.util
import json
import math
import sys
import time
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_jax import metrics
from slm_jax.config import ConfigError
from slm_jax.experiment import Config, RunConfig
from slm_jax.files import CHECKSUM, sealed
from slm_jax.metrics import Sink


def open_log(path, step=0, sinks=()):
  warnings = []
  return metrics.MetricLog(path, step, sinks, warnings.append), warnings


def test_every_line_is_on_disk_at_once(tmp_path):
  log, _ = open_log(tmp_path / 'metrics.jsonl')
  log.write(1, 'train', {'loss': 2.5})
  assert list(metrics.read(tmp_path / 'metrics.jsonl')) == [{'step': 1, 'kind': 'train', 'loss': 2.5}]


def test_a_restart_drops_what_comes_after_its_step_and_a_torn_line(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  log, _ = open_log(path)
  for step in range(5):
    log.write(step, 'eval' if step == 2 else 'train', {'loss': float(step)})
  log.close()
  with open(path, 'a') as file:
    file.write('{"step": 3, "ki')
  log, _ = open_log(path, step=2)
  log.write(3, 'train', {'loss': 9.0})
  assert [(line['step'], line['loss']) for line in metrics.read(path)] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 9.0)]
  assert list(log.evaluated) == [2]


def test_damaged_lines_are_told_and_the_others_stay(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  good = [b'{"step": 0, "kind": "eval", "loss": 1.0}\n', b'{"step": 1, "kind": "train", "seconds": 5.0}\n']
  bad = [b'{"step": 1, "ki\n', b'\x00\x00\n', b'\xff\xfe\n', b'[1]\n', b'{"kind": "train"}\n', b'\n']
  path.write_bytes(b''.join([good[0], *bad, good[1]]))
  (tmp_path / metrics.LOST).write_text('{"redone": null, "down": 3.0}')
  log, warnings = open_log(path, step=1)
  assert (list(log.evaluated), log.seconds, log.lost) == ([0], 5.0, {})
  assert list(metrics.read(path)) == [json.loads(line) for line in good]
  assert [f'line {n} is damaged' in text for n, text in enumerate(warnings[:-1], 2)] == [True] * len(bad)
  assert 'lost.json: damaged (redone is null, expected a number)' in warnings[-1]


@pytest.mark.parametrize(
  'line, fault',
  [
    ('{"step": -1, "kind": "train"}', 'step=-1: must not be negative'),
    ('{"step": 1.5, "kind": "train"}', 'step is 1.5, expected an integer'),
    ('{"step": true, "kind": "train"}', 'step is true or false, expected an integer'),
    ('{"step": 1, "kine": "train"}', 'kind is missing'),
    ('{"step": 1, "kind": "trail"}', "kind is 'trail', expected 'train' or 'eval'"),
    ('{"step": 1, "kind": "train", "loss": "3"}', "loss is '3', expected a number"),
    ('{"step": 1, "kind": "train", "loss": 1e999}', 'loss is inf, expected a number'),
    ('{"step": 1, "kind": "train", "loss": NaN}', 'not JSON (NaN is no number)'),
    ('{"step": 1, "kind": "train", "loss": [1]}', 'loss is a list, expected a number'),
    ('{"step": 1, "kind": "eval", "mosc": 1.0}', 'loss is missing'),
    ('[' * 10000, 'not JSON'),
  ],
)
def test_keys_and_types_of_a_line_are_checked(line, fault):
  """Also those of an earlier version, which have no checksum."""
  assert metrics.parse(line)[0] == {}
  assert fault in metrics.parse(line)[1]


NUMBERS = st.none() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)


@given(st.integers(0, 2**31 - 1), st.sampled_from(['train', 'eval']), st.dictionaries(st.text(), NUMBERS))
def test_a_line_is_read_as_it_was_written(step, kind, values):
  record = {**values, 'loss': 1.5, 'step': step, 'kind': kind}
  record.pop(CHECKSUM, None)
  assert metrics.parse(json.dumps(sealed(record))) == (record, '')


@given(st.data())
def test_one_flipped_bit_is_found_wherever_it_is(data):
  """2.2410 for 3.2410 is one bit."""
  record = {'step': 40, 'kind': 'eval', 'loss': 3.2410, 'tokens': 5120.0, 'seconds': 1.25, 'mfu': None}
  raw = bytearray(json.dumps(sealed(record)).encode())
  bit = data.draw(st.integers(0, 8 * len(raw) - 1))
  raw[bit // 8] ^= 1 << bit % 8
  found, fault = metrics.parse(raw.decode(errors='replace'))
  assert found in ({}, record)  # a space may have become another white space
  assert bool(fault) == (found == {})


def test_a_restart_gives_older_lines_their_checksum(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 0, "kind": "eval", "loss": 3.241}\n')
  log, warnings = open_log(path, step=1)
  log.close()
  assert warnings == []
  assert list(metrics.read(path)) == [{'step': 0, 'kind': 'eval', 'loss': 3.241}]
  path.write_text(path.read_text().replace('3.241', '2.241'))
  told = []
  assert list(metrics.read(path, told.append)) == []
  assert told == [f'{path}: line 1 is damaged (its checksum is wrong, so some of it was changed), and left out']


def test_what_is_not_a_number_is_null(tmp_path):
  log, _ = open_log(tmp_path / 'metrics.jsonl')
  log.write(1, 'train', {'loss': math.nan, 'grad_norm': math.inf, 'total': 1.0})
  line = json.loads((tmp_path / 'metrics.jsonl').read_text(), parse_constant=pytest.fail)
  assert (line['loss'], line['grad_norm'], line['total']) == (None, None, 1.0)


def test_a_failing_sink_is_switched_off_and_the_others_go_on(tmp_path):
  seen = []

  def fails(step, kind, values):
    raise ConnectionError('no network')

  log, warnings = open_log(tmp_path / 'metrics.jsonl', sinks=(Sink(fails), Sink(lambda *args: seen.append(args))))
  log.write(1, 'train', {'loss': 1.0})
  log.write(2, 'train', {'loss': 2.0})
  assert len(warnings) == 1
  assert 'no network' in warnings[0]
  assert [step for step, _, _ in seen] == [1, 2]
  assert len(list(metrics.read(tmp_path / 'metrics.jsonl'))) == 2


def test_tensorboard_writes_events(tmp_path):
  pytest.importorskip('tensorboardX')
  log, warnings = open_log(tmp_path / 'metrics.jsonl', sinks=(metrics.tensorboard(tmp_path / 'events'),))
  log.write(1, 'train', {'loss': 1.0})
  assert not warnings
  (event_file,) = (tmp_path / 'events').iterdir()
  deadline = time.monotonic() + 8  # a thread of tensorboardX writes it
  while b'train/loss' not in event_file.read_bytes() and time.monotonic() < deadline:
    time.sleep(0.1)
  assert b'train/loss' in event_file.read_bytes()


class Tracker(types.ModuleType):
  """Stands in for W&B, which has one active run, unless a new one is asked for."""

  def __init__(self, fault: Exception | None = None):
    super().__init__('wandb')
    self.__spec__ = importlib.machinery.ModuleSpec('wandb', None)
    self.runs, self.active, self.fault = {}, None, fault

  def init(self, id, reinit=None, **more):
    if self.fault:
      raise self.fault
    if reinit == 'create_new' or self.active is None:
      self.active = types.SimpleNamespace(
        log=lambda values, step: self.runs[id].append(step), finish=lambda: self.runs[id].append('finished')
      )
      self.runs[id] = []
    return self.active


def logged_by(tmp_path, arm_id, warnings):
  config = Config(name=arm_id, run=RunConfig(wandb=True))
  sinks = metrics.sinks(config, tmp_path, arm_id, warnings.append)
  return metrics.MetricLog(tmp_path / f'{arm_id}.jsonl', 0, sinks, warnings.append)


def test_each_arm_of_a_process_is_a_run_of_its_own(tmp_path, monkeypatch):
  """One after another, and two at once as in a population."""
  tracker, warnings = Tracker(), []
  monkeypatch.setitem(sys.modules, 'wandb', tracker)
  a, b = (logged_by(tmp_path, arm_id, warnings) for arm_id in 'ab')
  for step in (1, 2):
    a.write(step, 'train', {'loss': 1.0})
    b.write(step, 'train', {'loss': 2.0})
  a.close()
  b.close()
  assert tracker.runs == {'a': [1, 2, 'finished'], 'b': [1, 2, 'finished']}
  assert warnings == []


def test_a_tracker_that_does_not_start_stops_no_run(tmp_path, monkeypatch):
  warnings = []
  monkeypatch.setitem(sys.modules, 'wandb', Tracker(ConnectionError('no\nnetwork')))
  log = logged_by(tmp_path, 'a', warnings)
  log.write(1, 'train', {'loss': 1.0})
  log.close()
  assert warnings == ['run.wandb: goes without, since it failed to start: no network']
  assert len(list(metrics.read(tmp_path / 'a.jsonl'))) == 1


@pytest.mark.parametrize('name, package', [('wandb', 'wandb'), ('tensorboard', 'tensorboardX')])
def test_a_sink_that_is_not_installed_names_its_extra(monkeypatch, name, package):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == package else name)
  metrics.check_sinks(RunConfig())
  with pytest.raises(ConfigError, match=rf"run.{name}=True: .*pip install '\.\[{name}\]' in the project's folder"):
    metrics.check_sinks(RunConfig(**{name: True}))
