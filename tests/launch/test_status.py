"""launch.status: the state of arms from the store alone, with real locks; the table; a screen that is drawn over."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes import FakeTrain, arms_of, experiment, summary
from hypothesis import given
from hypothesis import strategies as st

from launch import report, status
from launch.plan import Plan
from slm_jax.ablate import workdir
from slm_jax.files import read_json, write_json

REPO = Path(__file__).parents[2]
SWEEP = [
  {'name': 'teacher'},
  {'name': 'child', 'init.arm': 'teacher'},
  {'name': 'grandchild', 'init.arm': 'child'},
  {'name': 'alone', 'train.steps': 10},
]


@pytest.fixture
def store(tmp_path):
  """A workdir of four arms, none of them started, and the folder of one by its name."""
  module = experiment(sweep=SWEEP)
  module.__file__ = 'x.py'
  plan = Plan(module, tmp_path, arms_of(module), [], 'teacher')
  plan.record()
  folders = {arm.name: workdir.folder(tmp_path, arm.arm_id) for arm in plan.arms}
  return tmp_path, folders


def write(folder, state, **more):
  (folder / 'run.json').write_text(json.dumps({'status': state, 'format': 1, **more}))


def log(folder, *lines):
  with open(folder / 'metrics.jsonl', 'a') as file:
    file.writelines(json.dumps(line) + '\n' for line in lines)


def age(folder, seconds):
  for path in folder.iterdir():
    os.utime(path, (time.time() - seconds,) * 2)


def of(path, name):
  return next(s for s in status.read(path) if s.name == name)


HOLD = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from slm_jax.ablate.workdir import lock
with lock(Path(sys.argv[1])):
  print('held', flush=True)
  time.sleep(60)
"""


@pytest.fixture
def holder():
  """Starts processes that hold an arm's lock."""
  started = []

  def hold(folder):
    env = {**os.environ, 'PYTHONPATH': str(REPO)}
    started.append(
      subprocess.Popen([sys.executable, '-c', HOLD, str(folder)], stdout=subprocess.PIPE, text=True, env=env)
    )
    assert started[-1].stdout.readline() == 'held\n'
    return started[-1]

  yield hold
  for process in started:
    process.kill()
    process.wait()


# ------------------------------------------------------------------------------------------------------------ states


def test_missing_and_blocked_by_whom(store):
  path, folders = store
  assert [(s.name, s.state, s.note) for s in status.read(path)] == [
    ('teacher', 'missing', ''),
    ('child', 'blocked', 'teacher (seed 0) is missing'),
    ('grandchild', 'blocked', 'child (seed 0) is blocked'),
    ('alone', 'missing', ''),
  ]
  write(folders['teacher'], 'diverged', error='step 17: total not finite')
  assert of(path, 'child').note == 'teacher (seed 0) is failed'


@pytest.mark.parametrize('kind', ['failed', 'diverged'])
def test_failed_says_why_in_one_line(store, kind):
  path, folders = store
  write(folders['alone'], kind, error='bad\n  input')
  assert of(path, 'alone')[3:5] == ('failed', 'bad input')


def test_done_and_preempted(store):
  path, folders = store
  assert (
    FakeTrain()(
      next(a.config for a in arms_of(experiment(sweep=SWEEP)) if a.name == 'alone'), path, folders['alone'].name
    )
    == 0
  )
  found = of(path, 'alone')
  assert (found.state, found.step, found.steps, found.loss, found.left) == (
    'done',
    10,
    10,
    pytest.approx(1.5, abs=1e-3),
    None,
  )
  write(folders['teacher'], 'preempted')
  assert of(path, 'teacher').state == 'preempted'


def test_whoever_holds_the_lock_runs_whatever_the_files_say(store, holder):
  path, folders = store
  process = holder(folders['alone'])
  assert of(path, 'alone')[3:5] == ('running', '')  # nothing is written yet
  write(folders['alone'], 'preempted')  # by the life before
  assert of(path, 'alone').state == 'running'
  write(folders['alone'], 'running')
  age(folders['alone'], 3000)
  assert of(path, 'alone')[3:5] == ('running', 'quiet for 50 min')
  process.kill()
  process.wait()
  assert of(path, 'alone')[3:5] == (
    'stalled',
    f'quiet for 50 min, process {process.pid} on {socket.gethostname()} is gone',
  )


def test_a_dead_process_shows_at_once_and_its_number_in_other_hands_does_not_mislead(store, holder):
  path, folders = store
  write(folders['alone'], 'running')
  process = holder(folders['alone'])
  process.kill()
  process.wait()
  assert of(path, 'alone').state == 'stalled'
  text = (folders['alone'] / 'lock').read_text()
  (folders['alone'] / 'lock').write_text(text.replace(str(process.pid), str(os.getpid())))  # lives, and holds no lock
  assert of(path, 'alone').state == 'stalled'


def test_on_another_machine_the_heartbeat_tells(store):
  path, folders = store
  write(folders['alone'], 'running')
  (folders['alone'] / 'lock').write_text('process 12 on elsewhere since today\n')
  log(folders['alone'], {'step': 1, 'kind': 'train', 'loss': 3.0})
  age(folders['alone'], 30)
  assert of(path, 'alone')[3:5] == ('running', 'by its last sign of life, 30 s ago (process 12 on elsewhere)')
  age(folders['alone'], 7200)
  assert of(path, 'alone')[3:5] == ('stalled', 'quiet for 2.0 h, process 12 on elsewhere')
  log(folders['alone'], {'step': 2, 'kind': 'train', 'loss': 2.9})
  assert of(path, 'alone').state == 'running'


def test_without_proc_a_living_process_is_believed(store, holder, monkeypatch):
  path, folders = store
  monkeypatch.setattr(status, '_locks', lambda: None)
  process = holder(folders['alone'])
  assert of(path, 'alone').state == 'running'
  write(folders['alone'], 'running')
  process.kill()
  process.wait()
  assert of(path, 'alone').state == 'stalled'


def test_looking_does_not_disturb_who_wants_the_lock(store):
  """A thousand looks while the lock is taken and given back: none of the takers is refused."""
  path, folders = store
  code = f"""
from pathlib import Path
from types import SimpleNamespace
from slm_jax.ablate.workdir import lock
for _ in range(300):
  with lock(Path({str(folders['alone'])!r})):
    pass
"""
  taker = subprocess.Popen([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': str(REPO)})
  while taker.poll() is None:
    assert of(path, 'alone').state in ('running', 'missing')
  assert taker.returncode == 0


# ----------------------------------------------------------------------------------------------------------- numbers


def test_step_loss_speed_and_time_left(store, holder):
  path, folders = store
  holder(folders['alone'])
  log(
    folders['alone'],
    {'step': 0, 'kind': 'eval', 'loss': 5.0, 'tokens': 0.0},
    {'step': 2, 'kind': 'train', 'loss': 4.0, 'tokens': 200.0, 'tokens_per_second': None},
    {'step': 4, 'kind': 'train', 'loss': 3.5, 'tokens': 400.0, 'tokens_per_second': 50.0},
    {'step': 4, 'kind': 'eval', 'loss': 3.75, 'tokens': 400.0},
  )
  with open(folders['alone'] / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 5, "kin')  # being written
  found = of(path, 'alone')
  assert (found.step, found.steps, found.loss, found.speed, found.left) == (4, 10, 3.75, 50.0, 12.0)
  write(folders['alone'], 'running', population=4)  # books a quarter of the time
  found = of(path, 'alone')
  assert (found.speed, found.left) == (12.5, 48.0)


def test_only_the_end_of_a_long_log_is_read(store, monkeypatch):
  path, folders = store
  log(folders['alone'], *({'step': i, 'kind': 'train', 'loss': 9.0 - i / 1e4} for i in range(5000)))
  monkeypatch.setattr(status, 'TAIL', 1000)
  assert of(path, 'alone').step == 4999
  assert len(status.tail(folders['alone'] / 'metrics.jsonl')) < 30


@pytest.mark.parametrize('text', ['', '{', 'null', '[]', '\x00\xff', '{"step": 1}\n', '3\n', '{"status": "ru'])
def test_damaged_files_hide_no_arm(store, text):
  path, folders = store
  for name in ('metrics.jsonl', 'run.json', 'lock'):
    (folders['alone'] / name).write_bytes(text.encode('latin1'))
  assert [s.name for s in status.read(path)] == ['teacher', 'child', 'grandchild', 'alone']


# --------------------------------------------------------------------------------------------------------------- text


@given(st.lists(st.sampled_from(status.STATES), min_size=1, max_size=60), st.integers(6, 80))
def test_a_table_fits_and_what_matters_most_is_on_it(states, height):
  found = [status.Status(f'{i:012d}', 'x', 0, s, '', i, 100, None, None, None) for i, s in enumerate(states)]
  lines = status.show(found, height).split('\n')
  assert len(lines) <= height
  shown = [line.split()[0] for line in lines[2 : lines.index('')] if not line.startswith('...')]
  left_out = list(states)
  for state in shown:
    left_out.remove(state)
  assert not left_out or max(map(status.STATES.index, shown)) <= min(map(status.STATES.index, left_out))
  assert lines[-1].startswith(f'{len(states)} arms: ')
  counts = dict(reversed(part.split()) for part in re.match(r'\d+ arms: ([^;]*)', lines[-1])[1].split(', '))
  assert counts == {state: str(states.count(state)) for state in set(states)}


@pytest.mark.parametrize(
  'seconds, text', [(0, '0 s'), (99, '99 s'), (101, '2 min'), (6001, '1.7 h'), (172800, '2.0 d'), (1e7, '115.7 d')]
)
def test_durations(seconds, text):
  assert status.duration(seconds) == text


def terminal(text: str) -> list[str]:
  """What a terminal shows after it got `text`."""
  lines, row, column = [''], 0, 0
  for part in re.findall(r'\x1b\[\d*[AJ]|\n|\r|[^\x1b\n\r]+', text):
    if part == '\n':
      row, column = row + 1, 0
      lines += [''] * (row + 1 - len(lines))
    elif part == '\r':
      column = 0
    elif part.endswith('A') and part[0] == '\x1b':
      row -= int(part[2:-1])
    elif part[0] == '\x1b':
      lines[row:] = [lines[row][:column]]
    else:
      lines[row] = lines[row][:column] + part + lines[row][column + len(part) :]
      column += len(part)
  return lines


@given(st.lists(st.one_of(st.lists(st.text('abc', max_size=9), min_size=1), st.text('xyz', min_size=1, max_size=9))))
def test_a_screen_shows_all_events_and_the_last_table_under_them(events):
  out = io.StringIO()
  screen = status.Screen(out)
  for event in events:
    screen.say(event) if isinstance(event, str) else screen.draw('\n'.join(event))
  said = [event for event in events if isinstance(event, str)]
  last = events[-1] if events and not isinstance(events[-1], str) else []
  assert terminal(out.getvalue()) == [*said, *last, '']


# ----------------------------------------------------------------------------------------------------------- command


def test_the_command(store, capsys):
  path, folders = store
  write(folders['teacher'], 'failed', error='no such file')
  assert status.main([str(path)]) == 0
  out = capsys.readouterr().out
  assert re.search(r'^failed +\w{12} +teacher +0 +0/1000 .*no such file$', out, re.MULTILINE)
  assert out.endswith('4 arms: 1 failed, 2 blocked, 1 missing; 0% of all steps\n')


@pytest.mark.parametrize('argv', [[], ['a', 'b'], ['--wach'], ['nowhere']])
def test_refusals_are_one_line(store, argv, capsys):
  assert status.main([str(store[0]) if word == 'STORE' else word for word in argv]) == 1
  error = capsys.readouterr().err
  assert error.startswith('error: ')
  assert error.count('\n') == 1


@pytest.mark.parametrize('where', ['run.json', 'experiment.json'])
def test_a_newer_version_is_one_line(store, where, capsys):
  path, folders = store
  if where == 'run.json':
    write(folders['alone'], 'done')
  file = (folders['alone'] if where == 'run.json' else path) / where
  write_json(file, {**read_json(file)[0], 'format': 99})
  assert status.main([str(path)]) == 1
  error = capsys.readouterr().err
  assert 'format 99, written by a newer version' in error
  assert error.count('\n') == 1


WATCH = """
import signal, sys
from launch import status
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background has it ignored
sys.exit(status.main([sys.argv[1], '--watch']))
"""


@pytest.fixture
def watch(store):
  """`(the process, the terminal that it draws on)`."""
  main, side = os.openpty()
  command, env = [sys.executable, '-c', WATCH, str(store[0])], {**os.environ, 'PYTHONPATH': str(REPO)}
  process = subprocess.Popen(command, stdout=side, stderr=subprocess.PIPE, env=env)
  os.close(side)
  yield process, main
  process.kill()
  process.wait()
  os.close(main)


def test_watch_redraws_until_all_has_ended(store, watch):
  (_, folders), (process, main) = store, watch
  text = ''
  while '2 blocked, 2 missing' not in text:
    text += os.read(main, 4096).decode()
  assert process.poll() is None
  for name in ('alone', 'teacher'):  # what builds on the teacher stays blocked, for good
    write(folders[name], 'done' if name == 'alone' else 'failed', summary=summary(1.5))
  (folders['alone'] / 'DONE').touch()
  while '1 failed, 2 blocked, 1 done' not in text:
    text += os.read(main, 4096).decode()
  assert process.wait(timeout=60) == 0


def test_watch_without_a_terminal_prints_lines_until_all_has_ended(store, monkeypatch, capsys):
  path, folders = store
  monkeypatch.setattr(status, 'PERIOD', 0.0)
  reads = []

  def read(workdir, read=status.read):
    if reads:
      for name in ('alone', 'teacher'):
        write(folders[name], 'done' if name == 'alone' else 'failed', summary=summary(1.5))
      (folders['alone'] / 'DONE').touch()
    reads.append(workdir)
    return read(workdir)

  monkeypatch.setattr(status, 'read', read)
  assert status.main([str(path), '--watch']) == 0
  out = capsys.readouterr().out
  before, after = out.index('2 blocked, 2 missing'), out.index('1 failed, 2 blocked, 1 done')
  assert before < after
  assert '\x1b' not in out, 'nothing is redrawn'


def test_watch_ends_by_ctrl_c(watch):
  process, main = watch
  assert os.read(main, 4096)
  process.send_signal(signal.SIGINT)
  _, error = process.communicate(timeout=60)
  assert (process.returncode, error) == (0, b'')


def test_a_slow_look_does_not_put_off_the_next_for_long(store, monkeypatch):
  """A machine that slept while the files were read."""
  clock = iter([0.0, 3000.0, 3000.0 + status.LONGEST, 9999.0])
  # Only what status.py reads: other threads of this process ask the module for the time as well.
  monkeypatch.setattr(status, 'time', SimpleNamespace(monotonic=lambda: next(clock), time=time.time))
  live = status.Live(status.Screen(io.StringIO()), store[0])
  assert len(live.look()) == 4
  assert len(live.look()) == 4


@pytest.mark.parametrize('command', [status, report])
def test_help_is_shown(command, capsys):
  assert command.main(['--help']) == 0
  assert capsys.readouterr().out == f'{command.USAGE}\n'
