"""An experiment file as a process of its own: is it as good as the tests think, and what does it import?"""

import os
import resource
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]

TINY = """
'''Is a real process as good as the tests think?'''
import sys

import launch
from fakes import FakeTrain
from slm_jax.experiment import Config


def config():
  return Config()


def sweep():
  yield {'name': 'one'}
  yield {'name': 'two', 'init.arm': 'one'}


if __name__ == '__main__':
  try:
    launch.main(train=FakeTrain())
  finally:
    heavy = {'matplotlib', 'jinja2', 'transformers', 'torch', 'slm_jax.train'} & sys.modules.keys()
    print('imported:', *sorted(heavy))
"""


def test_an_experiment_file_as_a_process(tmp_path):
  (tmp_path / 'tiny.py').write_text(TINY)
  env = {
    **os.environ,
    'PYTHONPATH': os.pathsep.join([*map(str, (REPO, REPO / 'tests')), os.environ.get('PYTHONPATH', '')]),
  }

  def run(*argv):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=env, cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.returncode, done.stdout, done.stderr, after.ru_utime - before.ru_utime

  code, out, error, _ = run('-m', 'tiny', '--config.sede=3')
  assert code == 1
  assert error.count('\n') == 1
  assert "did you mean 'seed'?" in error
  assert out == 'imported:\n'
  assert not (tmp_path / 'runs').exists()
  code, out, error, _ = run('-m', 'tiny')
  assert (code, error) == (0, '')
  assert (tmp_path / 'runs/tiny/report.html').exists()
  code, out, error, seconds = run('-m', 'tiny')
  assert code == 0
  assert 'all 2 arms are done; nothing to do' in out
  assert out.endswith('imported:\n')
  assert seconds < 10
  code, out, error, _ = run('-m', 'launch.report', 'runs/tiny')
  assert (code, error) == (0, '')
  assert 'two' in out
