"""Joules: counters that wrap, counters that are not there, restarts; measured and estimated never mixed."""

import dataclasses
import itertools
import os
import shutil
import sys
from types import SimpleNamespace

import hypothesis
import jax
import pytest
import tiny
from hypothesis import strategies as st

from slm_jax import chips, energy, ledger, metrics, train
from slm_jax.ablate import budget, workdir
from slm_jax.ablate.measure import stand_in
from slm_jax.energy import Counter, Meter, Usage
from slm_jax.preempt import Preempted, Preemption

WRAPS = 1000.0  # joules


def zone(root, name, label, joules=0.0):
  folder = root / name
  folder.mkdir(parents=True)
  (folder / 'name').write_text(f'{label}\n')
  (folder / 'max_energy_range_uj').write_text(f'{int(WRAPS * 1e6)}\n')
  (folder / 'energy_uj').write_text(f'{int(joules * 1e6)}\n')
  return folder / 'energy_uj'


@pytest.fixture
def powercap(tmp_path):
  """Two packages, the cores of one of them, and a zone for the whole platform."""
  root = tmp_path / 'powercap'
  return root, {
    'one': zone(root, 'intel-rapl:0', 'package-0', 900),
    'two': zone(root, 'intel-rapl:1', 'package-1', 10),
    'cores': zone(root, 'intel-rapl:0:0', 'core', 500),
    'platform': zone(root, 'intel-rapl:2', 'psys', 500),
  }


def test_rapl_adds_up_the_packages_and_nothing_twice(powercap):
  root, files = powercap
  meter = Meter(energy.rapl(root), 'RAPL')
  for name, joules in {'one': 930, 'two': 25, 'cores': 700, 'platform': 800}.items():
    files[name].write_text(str(int(joules * 1e6)))
  assert meter.advance() == pytest.approx(30 + 15)
  assert meter.advance() == 0


def test_a_counter_that_starts_anew_loses_nothing(powercap):
  root, files = powercap
  meter = Meter(energy.rapl(root), 'RAPL')
  files['one'].write_text(str(int(50 * 1e6)))  # 900 -> 1000 = 0 -> 50
  assert meter.advance() == pytest.approx(150)


@hypothesis.given(st.lists(st.floats(0, WRAPS * 0.99), max_size=30))
def test_any_sequence_of_steps_is_recovered_from_the_wrapped_counter(steps):
  true = [0.0]
  meter = Meter([Counter(lambda: true[0] % WRAPS, WRAPS)], 'fake')
  read = 0.0
  for step in steps:
    true[0] += step
    read += meter.advance()
  assert read == pytest.approx(true[0], abs=1e-6)


@pytest.mark.parametrize('lost', ['energy_uj', 'max_energy_range_uj', 'name'])
def test_a_package_that_cannot_be_read_leaves_no_half_measurement(powercap, lost):
  root, files = powercap
  files['two'].with_name(lost).unlink()
  assert energy.rapl(root) == []


def test_no_rapl_no_counters(tmp_path):
  assert energy.rapl(tmp_path / 'nowhere') == []


class FakeNvml:
  """Boards by index and by UUID, each with millijoules."""

  def __init__(self, joules):
    self.joules = joules

  def nvmlInit(self):
    pass

  def nvmlDeviceGetHandleByIndex(self, index):
    return index

  def nvmlDeviceGetHandleByUUID(self, uuid):
    return int(uuid.removeprefix('GPU-'))

  def nvmlDeviceGetTotalEnergyConsumption(self, handle):
    return self.joules[handle] * 1000


@pytest.mark.parametrize('visible, used', [('', [0, 1]), ('2,3', [2, 3]), ('GPU-3,GPU-1', [3, 1])])
def test_nvml_reads_the_boards_that_this_process_sees(monkeypatch, visible, used):
  boards = [100.0, 200.0, 300.0, 400.0]
  monkeypatch.setitem(sys.modules, 'pynvml', FakeNvml(boards))
  monkeypatch.setattr(jax, 'local_devices', lambda: [SimpleNamespace(local_hardware_id=i) for i in range(2)])
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
  meter = Meter(energy.nvml(), 'NVML')
  for i in range(4):
    boards[i] += 10**i
  assert meter.advance() == pytest.approx(sum(10**i for i in used))


def test_without_nvml_nothing_is_measured(monkeypatch):
  monkeypatch.setitem(sys.modules, 'pynvml', None)
  assert energy.nvml() == []


# ------------------------------------------------------------------------------------------------- usage over a run


class Source:
  """A meter in the test's hand."""

  def __init__(self):
    self.total = 0.0
    self.meter = Meter([Counter(lambda: self.total)], 'measured: fake')


NOTHING = Meter([], '')


def test_a_run_and_its_restarts_add_up():
  source = Source()
  first = Usage({}, meter=source.meter)
  source.total = 50.0
  first.start()  # what was used before does not count
  source.total = 80.0
  first.tick(4.0)
  record = first.record()
  assert record['joules'] == 30
  assert record['chip_seconds'] == 4
  source.total = 1000.0
  second = Usage({'tokens': 1, **record}, meter=source.meter)
  second.start()
  source.total = 1005.0
  second.tick(2.0)
  record = second.record()
  assert record['joules'] == 35
  assert record['chip_seconds'] == 6
  assert record['joules_estimated'] == pytest.approx(6 * chips.CORE_WATTS * chips.usable_cores())
  assert record['energy_source'] == 'measured: fake'
  assert second.record() == record  # asking changes nothing


@pytest.mark.parametrize('meters', [(True, False), (False, True), (False, False)])
def test_a_run_that_was_measured_in_part_has_an_estimate_only(meters):
  record = {}
  for measured in meters:
    usage = Usage(record, meter=Source().meter if measured else NOTHING)
    usage.tick(1.0)
    record = usage.record()
  assert record['joules'] is None
  assert record['energy_source'].startswith('estimate: 15 W for each of ')
  assert record['joules_estimated'] == pytest.approx(2 * chips.CORE_WATTS * chips.usable_cores())


def test_arms_that_train_together_share_the_bill():
  source = Source()
  eight = [Usage({}, share=1 / 8, meter=Meter([Counter(lambda: source.total)], 'fake')) for _ in range(8)]
  source.total = 80.0
  for usage in eight:
    usage.tick(16.0)
  records = [usage.record() for usage in eight]
  assert sum(r['joules'] for r in records) == pytest.approx(80)
  assert sum(r['chip_seconds'] for r in records) == pytest.approx(16)


def test_a_worker_of_a_pool_is_charged_for_its_part(monkeypatch):
  monkeypatch.setenv(chips.SHARE, '0.25')
  monkeypatch.setattr(chips, 'usable_cores', lambda: 1)  # of four
  usage = Usage({}, meter=NOTHING)
  usage.tick(8.0)
  record = usage.record()
  assert record['chip_seconds'] == 2
  assert record['joules_estimated'] == 8 * chips.CORE_WATTS


def test_counters_are_read_before_they_can_wrap_twice():
  true = [0.0]
  usage = Usage({}, meter=Meter([Counter(lambda: true[0] % WRAPS, WRAPS)], 'fake'))
  for _ in range(100):  # no record for ten wraps' worth of work
    true[0] += WRAPS / 10
    usage.tick(energy.READ_EVERY + 1)
  assert usage.record()['joules'] == pytest.approx(10 * WRAPS)


def test_a_bill_is_chip_hours_times_the_price():
  usage = Usage({}, meter=NOTHING)
  usage.tick(7200.0)
  assert energy.bill(usage.record(), '0.25')['dollars'] == pytest.approx(0.5)
  free = energy.bill(usage.record(), 'on_demand')
  assert (free['chip_hours'], free['dollars'], free['joules']) == (2.0, 0.0, None)


class StopAt(Preemption):
  """Asks to stop when it has been polled so many times."""

  def __init__(self, polls):
    super().__init__()
    self.left = polls

  def check(self):
    self.left -= 1
    if self.left < 0:
      raise Preempted


def test_a_run_is_billed_for_all_its_lives(tmp_path, monkeypatch):
  """The loop itself, interrupted: chip-hours follow its seconds and starts, a fake counter’s joules are all there."""
  config = dataclasses.replace(tiny.config(12), run=dataclasses.replace(tiny.config().run, price='0.5'))
  readings, used = itertools.count(), [0.0]
  counter = Counter(lambda: used[0] + 1000 * next(readings))  # every reading is 1000 J after the one before
  monkeypatch.setattr(energy, 'of_devices', lambda: Meter([counter], 'measured: fake'))
  job = stand_in(config, {}, tmp_path)
  with pytest.raises(Preempted):
    train.train(job, StopAt(9), 'arm')
  first = [line['seconds'] for line in metrics.read(tmp_path / 'metrics.jsonl')][-1]
  readings, used = itertools.repeat(0), [1e6]  # between its lives others use a lot, and in the second it uses nothing
  summary = train.train(job, Preemption(), 'arm')
  assert summary['seconds'] > first
  paid = summary['seconds'] + summary['seconds_start']
  assert summary['chip_hours'] == pytest.approx(paid / 3600)
  assert summary['dollars'] == pytest.approx(0.5 * paid / 3600)
  assert summary['joules_estimated'] == pytest.approx(paid * chips.watts('cpu')[0])
  assert summary['energy_source'] == 'measured: fake'
  assert 1000 <= summary['joules'] <= 20_000
  assert summary['hardware_flops'] == 12 * train.hardware_flops(job)


def test_what_was_lost_with_processes_stays_in_the_books_and_on_the_bill(tmp_path, monkeypatch):
  """Killed twice between two checkpoints: the first of these losses stands in no checkpoint, and in no log any more."""
  path, clock = tmp_path / 'metrics.jsonl', [100.0]
  monkeypatch.setattr(energy, 'of_devices', lambda: Meter([Counter(lambda: 0.0)], 'measured: fake'))
  monkeypatch.setattr(metrics.time, 'time', lambda: clock[0])
  saved = {'seconds': 5.0, 'chip_seconds': 5.0, 'joules': 1.0, 'spent': {'step': 5.0}}

  def life(record, step, last):
    """Goes on from a checkpoint, and logs a last line before it is killed; what it could have saved at its start."""
    log = metrics.MetricLog(path, step, (), print)
    known = ledger.Ledger(log, tiny.config(12), 1.0, step, record, starting=20.0).record()
    log.write(last, 'train', {'seconds': float(last)})
    log.close()
    os.utime(path, (clock[0],) * 2)
    return known

  assert life({}, 0, 9)['spent']['redone'] == 0
  clock[0] += 100
  second = life(saved, 5, 7)
  clock[0] += 10
  third = life(saved, 5, 6)
  assert second['spent']['redone'] == 4
  assert third['spent']['redone'] == 4 + 2
  assert (second['spent']['start'], third['spent']['start']) == (40, 60)
  assert third['spent']['down'] == second['spent']['down'] == 80  # and then it was there again within its start
  assert third['chip_seconds'] == pytest.approx(5 + 6 + 60, abs=0.5)
  assert third['joules'] is None
  arm = SimpleNamespace(arm_id='x', config=tiny.config(12))
  folder = workdir.folder(tmp_path / 'runs', 'x')
  folder.mkdir(parents=True)
  for file in (path, tmp_path / metrics.LOST):
    shutil.copy(file, folder)
  assert budget.spent(tmp_path / 'runs', arm, lambda arm: 1.0).hours == pytest.approx((6 + 6 + 60) / 3600)
  later = life({**third, 'seconds': 10.0}, 10, 11)  # from a checkpoint of that life, which knows of all this
  assert later['spent']['redone'] == 6
  assert later['chip_seconds'] == pytest.approx(third['chip_seconds'] + 20, abs=0.5)
