"""Interrupted and resumed equals uninterrupted, bit for bit: by kill -9, by SIGTERM in every phase, after damage."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cheap
import jax.numpy as jnp
import pytest
import tiny

from slm_jax import checkpoint, evaluate, losses, metrics, train
from slm_jax.ledger import Ledger
from slm_jax.preempt import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED

TIMES = ('seconds', 'tokens_per_second', 'mfu')  # the only things that may differ


def results(workdir: Path):
  """(metrics without times, the final parameters' checksum)."""
  lines = [
    {k: v for k, v in line.items() if k not in TIMES} for line in metrics.read(tiny.arm(workdir) / 'metrics.jsonl')
  ]
  return lines, json.loads((tiny.arm(workdir) / 'model' / 'model.json').read_text())['checksum']


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('whole')
  assert train.run(tiny.config(), workdir, 'tiny') == EXIT_DONE
  return workdir


def seeded(uninterrupted, tmp_path) -> Path:
  """A new workdir that has the data and the compiled programs already."""
  for name in ('data', 'cache'):
    if (uninterrupted / name).exists():
      shutil.copytree(uninterrupted / name, tmp_path / name)
  return tmp_path


def test_a_finished_arm_is_not_run_again(uninterrupted):
  before = (tiny.arm(uninterrupted) / 'run.json').stat().st_mtime_ns
  assert train.run(tiny.config(), uninterrupted, 'tiny') == EXIT_DONE
  assert (tiny.arm(uninterrupted) / 'run.json').stat().st_mtime_ns == before


def test_kill_9_at_twenty_random_moments(tmp_path):
  """From import to the last write; each life gets a little further, and the end is the same."""
  steps = 60
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'

  def start(workdir):
    command = [sys.executable, str(Path(__file__).parent / 'tiny.py'), str(workdir), str(steps)]
    environment = {**os.environ, 'XLA_FLAGS': cheap.flags(1)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

  assert start(whole).wait(timeout=300) == EXIT_DONE
  shutil.copytree(whole / 'cache', killed / 'cache')  # compiling again each time would test nothing
  began = time.monotonic()
  assert start(killed).wait(timeout=300) == EXIT_DONE
  life = time.monotonic() - began
  assert results(killed) == results(whole)  # compiled here or read from the cache
  shutil.rmtree(tiny.arm(killed))

  rng, kills = random.Random(0), 0
  for _ in range(100):
    began = time.monotonic()
    process = start(killed)
    try:
      process.wait(timeout=rng.uniform(0.02, 0.95) * life)
    except subprocess.TimeoutExpired:
      if kills < 20:
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        continue
      assert process.wait(timeout=300) == EXIT_DONE
    else:
      assert process.returncode == EXIT_DONE
    if kills >= 20:
      break
    life = min(life, time.monotonic() - began)  # a resumed one is shorter
    assert results(killed) == results(whole)
    shutil.rmtree(tiny.arm(killed))  # done too soon: from the start
  assert kills >= 20
  assert results(killed) == results(whole)


def terminate_when(monkeypatch, target, name, nth=1):
  """Sends SIGTERM to this process when `target.name` is called for the n-th time."""
  original, calls = getattr(target, name), []

  def wrapper(*args, **kwargs):
    calls.append(name)
    if len(calls) == nth:
      os.kill(os.getpid(), signal.SIGTERM)
    return original(*args, **kwargs)

  monkeypatch.setattr(target, name, wrapper)


def steps_taken(monkeypatch) -> list[int]:
  """The steps that are taken from here on. A run that starts anew comes to the same end as one that goes on."""
  original, steps = Ledger.add, []

  def add(self, step, measured):
    steps.append(step)
    original(self, step, measured)

  monkeypatch.setattr(Ledger, 'add', add)
  return steps


PHASES = {  # and the step that is saved
  'data': (train, 'open_data', 1, None),
  'compile': (losses, 'gradient', 1, 1),  # called while the step is traced
  'eval': (evaluate, 'evaluate', 2, 10),
  'save': (checkpoint.Checkpoints, 'save', 2, 10),
  'between checkpoints': (Ledger, 'add', 14, 14),
}


@pytest.mark.parametrize('phase', PHASES)
def test_sigterm_in_every_phase_saves_and_exits_42(phase, uninterrupted, tmp_path, monkeypatch):
  workdir, (*when, last) = seeded(uninterrupted, tmp_path), PHASES[phase]
  with monkeypatch.context() as patch:
    terminate_when(patch, *when)
    assert train.run(tiny.config(), workdir, 'tiny') == EXIT_PREEMPTED
  assert json.loads((tiny.arm(workdir) / 'run.json').read_text())['status'] == 'preempted'
  assert not (tiny.arm(workdir) / 'DONE').exists()
  assert max(checkpoint.saved(tiny.arm(workdir) / 'checkpoints'), default=None) == last
  taken = steps_taken(monkeypatch)
  assert train.run(tiny.config(), workdir, 'tiny') == EXIT_DONE
  assert taken == list(range((last or 0) + 1, 41))
  assert results(workdir) == results(uninterrupted)


def test_the_loop_keeps_the_best_beside_the_last(uninterrupted, tmp_path, monkeypatch):
  """Of evaluations with these losses, of which the fourth is interrupted."""
  workdir, left = seeded(uninterrupted, tmp_path), [3.0, 1.0, 2.0, 2.0, 2.0]

  def evaluated(measure, params, batches, poll):
    if len(left) == 2 and not stopped:
      stopped.append(signal.raise_signal(signal.SIGTERM))
    poll()
    return {'loss': left.pop(0)}

  stopped, folder = [], tiny.arm(workdir) / 'checkpoints'
  monkeypatch.setattr(evaluate, 'evaluate', evaluated)
  assert train.run(tiny.config(), workdir, 'tiny') == EXIT_PREEMPTED
  assert checkpoint.saved(folder) == [10, 20, 30]
  assert train.run(tiny.config(), workdir, 'tiny') == EXIT_DONE
  assert checkpoint.saved(folder) == [10, 30, 40]


def test_the_best_is_known_to_the_next_process(tmp_path):
  with checkpoint.Checkpoints(tmp_path, 1, print) as checkpoints:
    for step, loss in ((1, 2.0), (2, 1.0), (3, None)):
      checkpoints.save(step, {'x': jnp.zeros(3)}, {}, loss)
  with checkpoint.Checkpoints(tmp_path, 1, print) as checkpoints:
    for step, loss in ((4, 3.0), (5, None), (6, 3.0)):
      checkpoints.save(step, {'x': jnp.zeros(3)}, {}, loss)
  assert checkpoint.saved(tmp_path) == [2, 6]


def test_the_best_is_kept_whose_evaluation_was_interrupted(tmp_path):
  """It was saved without a loss then, and is saved again with one; what has a loss is not written twice."""
  with checkpoint.Checkpoints(tmp_path, 1, print) as checkpoints:
    checkpoints.save(1, {'x': jnp.zeros(3)}, {}, 2.0)
    checkpoints.save(2, {'x': jnp.ones(3)}, {}, None)
  with checkpoint.Checkpoints(tmp_path, 1, print) as checkpoints:
    checkpoints.save(2, {'x': jnp.ones(3)}, {'again': 1}, 1.0)
    checkpoints.save(2, {'x': jnp.ones(3)}, {'again': 2}, 0.5)
    for step in (3, 4):
      checkpoints.save(step, {'x': jnp.ones(3)}, {}, 3.0)
  with checkpoint.Checkpoints(tmp_path, 1, print) as checkpoints:
    assert checkpoints.steps() == [2, 4]
    assert checkpoints.read(2, {'x': jnp.zeros(3)})[1]['again'] == 1


def test_sigterm_while_the_finished_model_is_written_lets_it_finish_and_nothing_else_begin(
  uninterrupted, tmp_path, monkeypatch
):
  workdir = seeded(uninterrupted, tmp_path)
  with monkeypatch.context() as patch:
    terminate_when(patch, train, 'save_model')
    with pytest.raises(KeyboardInterrupt):  # a worker ends with 42 by it
      train.run(tiny.config(), workdir, 'tiny')
  assert (tiny.arm(workdir) / 'DONE').exists()
  assert results(workdir) == results(uninterrupted)


def stop_at_step(monkeypatch, step):
  """A run that is preempted when it evaluates at `step`."""
  terminate_when(monkeypatch, evaluate, 'evaluate', step // 10 + 1)


@pytest.mark.parametrize('damage', ['truncate', 'flip', 'delete', 'loss'])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(damage, uninterrupted, tmp_path, monkeypatch):
  workdir = seeded(uninterrupted, tmp_path)
  with monkeypatch.context() as patch:
    stop_at_step(patch, 30)
    assert train.run(tiny.config(), workdir, 'tiny') == EXIT_PREEMPTED
  *_, before, last = checkpoint.saved(tiny.arm(workdir) / 'checkpoints')
  newest = tiny.arm(workdir) / 'checkpoints' / str(last)
  if damage == 'loss':
    os.truncate(newest / 'metrics' / 'metrics', 0)
  for path in [p for p in (newest / 'state').rglob('*') if p.is_file()]:
    if damage == 'truncate':
      os.truncate(path, path.stat().st_size // 2)
    elif damage == 'delete':
      path.unlink()
    elif path.parent.name == 'd':  # one bit of the arrays themselves
      data = bytearray(path.read_bytes())
      data[len(data) // 2] ^= 1
      path.write_bytes(data)
  taken = steps_taken(monkeypatch)
  assert train.run(tiny.config(), workdir, 'tiny') == EXIT_DONE
  assert taken[0] == before + 1
  assert (tiny.arm(workdir) / 'damaged' / f'checkpoints-{newest.name}').exists()
  assert results(workdir) == results(uninterrupted)


def test_a_last_evaluation_that_is_not_finite_is_no_result(uninterrupted, tmp_path, monkeypatch):
  workdir, original = seeded(uninterrupted, tmp_path), evaluate.evaluate
  monkeypatch.setattr(evaluate, 'evaluate', lambda *args: {**original(*args), 'loss': math.inf})
  assert train.run(tiny.config(), workdir, 'tiny') == EXIT_FAILED
  record = json.loads((tiny.arm(workdir) / 'run.json').read_text())
  assert (record['status'], 'loss not finite' in record['error']) == ('diverged', True)


def test_nan_stops_the_arm_and_keeps_the_last_good_checkpoint(uninterrupted, tmp_path, monkeypatch):
  workdir = seeded(uninterrupted, tmp_path)
  original = train.make_step

  def explodes(*args, **kwargs):
    step = original(*args, **kwargs)

    def bad(state, batch, frozen):
      state, measured = step(state, batch, frozen)
      return state, {**measured, 'total': jnp.where(state.step == 17, jnp.nan, measured['total'])}

    return bad

  with monkeypatch.context() as patch:
    patch.setattr(train, 'make_step', explodes)
    assert train.run(tiny.config(), workdir, 'tiny') == EXIT_FAILED
  record = json.loads((tiny.arm(workdir) / 'run.json').read_text())
  assert record['status'] == 'diverged'
  assert record['error'].startswith('step 17: total not finite')
  saved = sorted(int(p.name) for p in (tiny.arm(workdir) / 'checkpoints').glob('[0-9]*'))
  assert saved[-1] == 10
  lines = list(metrics.read(tiny.arm(workdir) / 'metrics.jsonl'))
  assert lines[-1]['step'] == 17
  assert lines[-1]['total'] is None


def test_disk_full_is_one_line_and_a_larger_disk_goes_on(uninterrupted, tmp_path, capfd):
  """On a real file system that is too small."""
  disk = tmp_path / 'disk'
  disk.mkdir()
  mount = subprocess.run(
    ['mount', '-t', 'tmpfs', '-o', 'size=1200k', 'none', str(disk)], capture_output=True, check=False
  )
  if mount.returncode:
    pytest.skip('mounting a small file system needs root')
  try:
    shutil.copytree(uninterrupted / 'data', disk / 'data')
    assert train.run(tiny.config(), disk, 'tiny') == EXIT_FAILED
    record = json.loads((tiny.arm(disk) / 'run.json').read_text())
    assert 'disk full' in record['error']
    assert '\n' not in record['error']
    subprocess.run(['mount', '-o', 'remount,size=100m', str(disk)], check=True)
    assert train.run(tiny.config(), disk, 'tiny') == EXIT_DONE
    assert results(disk) == results(uninterrupted)
  finally:
    subprocess.run(['umount', '--lazy', str(disk)], check=True)  # the failed write's threads may hold it
