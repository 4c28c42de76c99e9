"""Benchmarks refuse what they do not know in one line; the one for a card ends in time and says what is missing."""

import subprocess
import sys

import pytest

from experiments import bench_gpu

WRONG = {
  'bench_step': ('--cases=9b', '9b'),
  'bench_population': ('--sizes=9b', '9b'),
  'bench_kd': ('--chunks=512x', '512x'),
  'bench_parts': ('more', 'more'),
  'bench_gpu': ('--rows=9b', '9b'),
}


@pytest.mark.parametrize('name', WRONG)
def test_a_wrong_argument_is_one_line(name):
  argument, named = WRONG[name]
  done = subprocess.run([sys.executable, '-m', f'experiments.{name}', argument], capture_output=True, text=True)
  assert done.returncode != 0
  (line,) = [line for line in done.stderr.splitlines() if line.startswith('error:')]
  assert named in line
  assert 'Traceback' not in done.stderr


def test_what_takes_too_long_or_fails_is_said_and_the_rest_goes_on(monkeypatch):
  bench_gpu.flags.FLAGS(['bench_gpu', '--smoke'])
  assert bench_gpu.figures('decode', 1.0) == {'error': 'no time was left'}
  monkeypatch.setattr(bench_gpu.importlib.util, 'find_spec', lambda name: None)
  assert bench_gpu.figures('torch-124m', 100.0) == {'error': 'torch is not installed'}

  def hangs(command, timeout, **options):
    raise subprocess.TimeoutExpired(command, timeout)

  monkeypatch.setattr(bench_gpu.subprocess, 'run', hangs)
  assert bench_gpu.figures('1b', 100.0) == {'error': 'took longer than was left'}
  failed = subprocess.CompletedProcess([], 1, '', 'Traceback\nValueError: no card\n')
  monkeypatch.setattr(bench_gpu.subprocess, 'run', lambda *args, **options: failed)
  assert bench_gpu.figures('1b', 100.0) == {'error': 'ValueError: no card'}


def test_decoding_is_measured_anywhere():
  bench_gpu.flags.FLAGS(['bench_gpu', '--smoke'])
  found = bench_gpu.figures('decode', 300.0)
  assert found['tokens_per_second'] > 0
