"""A worker that does what a test says instead of training, and notes each start in WORKDIR/starts.jsonl.

ACTS='{"b": ["kill", 0]}' in the environment: the first start of arm b ends by SIGKILL, the second and all others are
fine. Others: an exit code; 'bug'; 'second' (a bug, once two arms have started); 'wait' (until SIGTERM, then 42); 'deaf'
(waits, and ignores SIGTERM); 'late' (is killed when all was written).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def starts(workdir):
  path = Path(workdir) / 'starts.jsonl'
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def act(workdir, arm_id, name):
  before = [start['name'] for start in starts(workdir)].count(name)
  acts = json.loads(os.environ['ACTS']).get(name, [0])
  what = acts[min(before, len(acts) - 1)]
  signal.signal(signal.SIGTERM, signal.SIG_IGN if what == 'deaf' else lambda *_: sys.exit(42))
  start = {
    'name': name,
    'process': os.getpid(),
    'cores': sorted(os.sched_getaffinity(0)),
    'gpu': os.environ.get('CUDA_VISIBLE_DEVICES'),
    'time': time.time(),
  }
  with open(workdir / 'starts.jsonl', 'a') as file:
    file.write(json.dumps(start) + '\n')
  if what == 'kill':
    os.kill(os.getpid(), signal.SIGKILL)
  if what in ('wait', 'deaf'):
    time.sleep(60)
  while what == 'second' and len(starts(workdir)) < 2:
    time.sleep(0.01)
  if what in ('bug', 'second'):
    raise RuntimeError('a bug')
  if what not in (0, 'late'):
    end(workdir, arm_id, {'status': 'diverged', 'error': 'not finite'}, what)
  end(workdir, arm_id, {'status': 'done', 'summary': {'loss': 1.5}}, 0)
  if what == 'late':
    os.kill(os.getpid(), signal.SIGKILL)


def end(workdir, arm_id, run, code):
  folder = workdir / 'arms' / arm_id
  (folder / 'run.json').write_text(json.dumps(run))
  if code:
    sys.exit(code)
  (folder / 'DONE').touch()


if __name__ == '__main__':
  given = dict(word.removeprefix('--').split('=') for word in sys.argv[1:])
  workdir = Path(given['workdir'])
  known = {arm['arm_id']: arm['name'] for arm in json.loads((workdir / 'experiment.json').read_text())['arms']}
  for arm_id in given['arm'].split(','):
    act(workdir, arm_id, known[arm_id])
