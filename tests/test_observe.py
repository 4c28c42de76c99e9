"""What a run shows of itself: where its time went, over restarts; a trace, the compiled step, its memory."""

import dataclasses
import json
import os
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import tiny

from slm_jax import ledger, metrics, observe, perf, train
from slm_jax.ablate.alike import groups
from slm_jax.config import ConfigError, check, override
from slm_jax.data.batches import Prefetch
from slm_jax.ledger import Ledger, goodput
from slm_jax.preempt import EXIT_DONE, EXIT_PREEMPTED

pytestmark = pytest.mark.usefixtures('one_fake_device')
SMALL = override(tiny.config(8), {'eval.every': 8, 'run.checkpoint_every': 4})


def summary_of(workdir):
  return json.loads((workdir / 'arms' / 'tiny' / 'run.json').read_text())['summary']


def slow(function, seconds=0.1):
  def slowly(*args):
    time.sleep(seconds)
    return function(*args)

  return slowly


def test_all_seconds_have_gone_somewhere(tmp_path, monkeypatch):
  """A run that was stopped and, some seconds later, started again, with data that are slow to open and to come."""
  take, polls = Ledger.add, []
  for target, name in ((train, 'open_data'), (Prefetch, '__next__')):
    monkeypatch.setattr(target, name, slow(getattr(target, name)))

  def add(self, step, values):
    take(self, step, values)
    if step == 4 and not polls:
      polls.append(step)
      os.kill(os.getpid(), 15)

  monkeypatch.setattr(Ledger, 'add', add)
  began = time.perf_counter()
  assert train.run(SMALL, tmp_path, 'tiny') == EXIT_PREEMPTED
  stopped = time.perf_counter()
  time.sleep(1.5)
  idle = time.perf_counter() - stopped
  assert train.run(SMALL, tmp_path, 'tiny') == EXIT_DONE
  wall, summary = time.perf_counter() - began, summary_of(tmp_path)
  spent = {name.removeprefix('seconds_'): x for name, x in summary.items() if name.startswith('seconds_')}
  assert set(spent) == {'compile', 'step', 'data', 'eval', 'checkpoint', 'start', 'redone', 'down'}
  assert min(spent.values()) >= 0
  within = sum(spent[name] for name in ('compile', 'step', 'data', 'eval', 'checkpoint'))
  assert within == pytest.approx(summary['seconds'], abs=1.0)  # the last line is older than the books
  assert spent['down'] >= 0.9 * idle
  assert spent['start'] >= 2 * 0.1
  assert spent['data'] >= SMALL.train.steps * 0.1
  assert sum(spent.values()) <= wall
  assert summary['goodput'] == pytest.approx(spent['step'] / sum(spent.values()))
  assert summary['peak_bytes'] > 2**20


def test_steps_that_are_taken_again_are_lost(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  log = metrics.MetricLog(path, 0, (), print)
  log.write(9, 'train', {'seconds': 9.0})
  log.close()
  os.utime(path, (time.time() - 100, time.time() - 100))
  again = metrics.MetricLog(path, 5, (), print)
  books = Ledger(again, SMALL, 1.0, 5, {'seconds': 4.0, 'spent': {'step': 3.0, 'redone': 1.0}}, starting=20.0)
  spent = books.record()['spent']
  assert spent['redone'] == 6.0  # 1, and what came after 4 of 9
  assert spent['start'] == 20.0
  assert spent['down'] == pytest.approx(80, abs=5)  # since the last line, but for the start of this process
  assert goodput({'spent': {'step': 3.0, 'redone': 1.0}})['goodput'] == 0.75


@pytest.mark.parametrize('share', [1.0, 0.25])
def test_phases_add_up_and_only_steps_and_data_count_for_the_speed(share, tmp_path, monkeypatch):
  """Of one of four arms in a program, a quarter of the time."""
  clock = [0.0]
  monkeypatch.setattr(ledger, 'time', SimpleNamespace(perf_counter=lambda: clock[0]))
  log = metrics.MetricLog(tmp_path / 'metrics.jsonl', 0, (), print)
  books = Ledger(log, SMALL, 1e6, 0, {}, share, starting=8.0)
  loss = {name: jnp.float32(1) for name in ('loss', 'total', 'grad_norm')} | {'tokens': jnp.float32(60)}

  def passes(seconds):
    clock[0] += seconds

  with books:
    with books.phase('data'):
      passes(1)
    passes(5)  # compilation
    books.add(1, loss)
    with books.phase('data'):  # before the first result is asked for
      passes(1)
    books.settle()
    for step in (2, 3):
      with books.phase('data'):
        passes(1)
      passes(2)
      books.add(step, loss)
      books.settle()
      with books.phase('eval'):
        passes(7)
    with books.phase('checkpoint'):
      passes(11)
  record = books.record()
  assert {name: x / share for name, x in record['spent'].items() if x} == {
    'compile': 5, 'data': 4, 'step': 4, 'eval': 14, 'checkpoint': 11, 'start': 8
  }  # fmt: skip
  assert record['seconds'] == share * 38  # but for the start
  line = list(metrics.read(tmp_path / 'metrics.jsonl'))[-1]
  assert line['tokens_per_second'] == pytest.approx(60 / (3 * share))
  slots = SMALL.data.batch_size * SMALL.data.seq_len  # more than tokens: the device computes all of them
  assert line['mfu'] == pytest.approx(slots / (3 * share) * 1e6 / perf.peak_flops()[0])


def test_a_trace_and_the_compiled_step(tmp_path):
  assert train.run(SMALL, tmp_path / 'plain', 'tiny') == EXIT_DONE
  asked = override(SMALL, {'run.profile': (3, 4), 'run.dump': True})
  assert train.run(asked, tmp_path, 'tiny') == EXIT_DONE
  assert summary_of(tmp_path)['loss'] == summary_of(tmp_path / 'plain')['loss']
  folder = tmp_path / 'arms' / 'tiny'
  (trace,) = folder.glob('profile/**/*.xplane.pb')
  assert trace.stat().st_size > 1000
  assert 'stablehlo.dot_general' in (folder / 'hlo' / 'step.stablehlo.mlir').read_text()
  assert 'ENTRY' in (folder / 'hlo' / 'step.hlo.txt').read_text()
  cost = json.loads((folder / 'hlo' / 'cost.json').read_text())
  assert cost['matmul_flops'] > 0
  assert cost['argument_bytes'] > 4 * summary_of(tmp_path)['parameters']
  assert not (tmp_path / 'plain' / 'arms' / 'tiny' / 'profile').exists()


def test_a_trace_begins_and_ends_where_it_is_told_to(tmp_path, monkeypatch):
  done = []
  monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: done.append('start'))
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: done.append('stop'))
  for steps, begin, expected in (((2, 3), 0, [1, 3]), ((1, 1), 0, [0, 1]), ((4, 9), 0, [3, 6]), ((2, 3), 2, [])):
    seen = []
    with observe.Trace(tmp_path, steps) as trace:
      for at in range(begin, 6):
        before = len(done)
        trace.at(at, ())
        seen += [at] * (len(done) - before)
    assert done == ['start', 'stop'][: len(expected)]  # the last one by leaving, where the run ends before
    assert seen == [at for at in expected if at < 6]
    done.clear()


def test_a_traced_arm_trains_alone_and_wrong_steps_are_refused():
  traced = dataclasses.replace(SMALL, run=dataclasses.replace(SMALL.run, profile=(1, 2)))
  assert len(groups({'a': SMALL, 'b': dataclasses.replace(SMALL, seed=1)})) == 1
  assert len(groups({'a': traced, 'b': dataclasses.replace(traced, seed=1)})) == 2
  for steps in ((3,), (0, 2), (5, 4), (1, 2, 3)):
    with pytest.raises(
      ConfigError, match=r'run\.profile=\(.*must be (positive|the first and the last step of a trace)'
    ):
      check(dataclasses.replace(SMALL, run=dataclasses.replace(SMALL.run, profile=steps)))
