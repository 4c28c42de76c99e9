"""What a run shows of itself where there is no terminal."""

import json

import pytest
import tiny

from slm_jax import progress, train
from slm_jax.progress import PERIOD, Progress


@pytest.fixture
def clock(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
  monkeypatch.setattr(progress.sys.stderr, 'isatty', lambda: False, raising=False)
  return now


def run(clock, seconds_a_step, steps=100, arms=1, **options):
  lines = []
  shown = Progress('arm', steps, 0, arms, say=lines.append, **options)
  for step in range(1, steps + 1):
    clock[0] += 10.0 if step == 1 else seconds_a_step  # the first one compiles
    shown.update(step, 2.5, 1000.0 * step)
  shown.close()
  return lines


def test_a_line_every_15_seconds_says_step_loss_speed_and_time_left(clock):
  lines = run(clock, 1.0)
  assert len(lines) == pytest.approx(109 / PERIOD, abs=1)
  assert lines[0] == 'arm: step 6 of 100, loss 2.500, 1,000 tokens/s, 94 s left'
  assert lines[-1].startswith('arm: step 96 of 100')


def test_a_short_run_says_nothing_on_the_way(clock):
  assert run(clock, 0.01) == []


def test_arms_of_one_program_are_one_line_with_the_tokens_of_all(clock):
  lines = run(clock, 1.0, arms=4)
  assert lines[0].startswith('arm and 3 more: step 6 of 100, loss 2.500, 4,000 tokens/s')


def test_other_processes_are_quiet(clock):
  assert run(clock, 1.0, quiet=True) == []


@pytest.mark.parametrize('step, said', [(0, []), (40, ['arm: goes on from step 40 of 100']), (100, [])])
def test_a_resumed_arm_says_from_where_it_goes_on(clock, step, said):
  lines = []
  Progress('arm', 100, step, say=lines.append)
  assert lines == said


def test_the_loop_of_an_interrupted_arm_says_it(tmp_path, capsys):
  assert train.run(tiny.config(10), tmp_path, 'tiny') == 0
  folder = tiny.arm(tmp_path)
  (folder / 'DONE').unlink()
  assert 'goes on' not in capsys.readouterr().out
  assert train.run(tiny.config(20), tmp_path, 'tiny') == 0
  assert 'tiny: goes on from step 10 of 20' in capsys.readouterr().out
  assert json.loads((folder / 'run.json').read_text())['status'] == 'done'
