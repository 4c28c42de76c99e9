"""Several processes that train an arm together: how they find each other, agree, and end.

All run the same program in the same order, so most of the code need not know. What it must know is here:

- files are written by process 0 (`is_main`), and what one of them reads from a disk is told to all (`on_main`);
- an error that stops one process stops all of them with the same code, and none waits for one that is gone;
- a SIGTERM that one of them hears makes all of them save the same step (`stop_agreed`).

They talk through the key-value store of JAX's coordination service, which runs in process 0: no step waits for it, and
it is there before the devices are. One process alone needs none of this, and then every function here does nothing.
"""

import ctypes
import io
import itertools
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from slm_jax.config import ConfigError, require
from slm_jax.preempt import EXIT_DONE, EXIT_PREEMPTED

T = TypeVar('T')

HEARTBEAT = 30  # seconds without a sign of life after which a process is dead
CONNECT = 300  # seconds in which all processes must have started
GRACE = 15.0  # seconds to end by itself, for a process that is told that another one has ended
SHARED = 90.0  # seconds until a file that another machine wrote must be seen


class Group:
  """The processes, and this one's place among them."""

  def __init__(self, client: Any, index: int, count: int):
    self.client, self.index, self.count = client, index, count
    self.turns, self.failures = itertools.count(), itertools.count()  # equal everywhere: all make the same calls
    self.waiting: list[threading.Thread] = []
    self.alone = False  # this process failed, and the others did not
    self.told: int | None = None  # the code that a process has ended with
    self.lock = threading.Lock()  # of the three below
    self.asked = False  # this process, to stop
    self.checks = 0  # calls of `stop_agreed`
    self.last_check = math.inf  # the one at which all stop

  def say(self, key: str, value: Any) -> None:
    self.client.key_value_set(f'slm_jax/{key}', json.dumps(value))

  def hear(self, key: str, end: float = math.inf, poll: float = 1.0) -> Any:
    """What was, or will be, said. TimeoutError if nothing is until `end`, in seconds of time.monotonic().

    poll: seconds, at most, until a signal that comes meanwhile is handled.
    """
    while True:
      try:
        return json.loads(self.client.blocking_key_value_get(f'slm_jax/{key}', int(1000 * poll)))
      except RuntimeError as error:  # of jaxlib
        if 'DEADLINE_EXCEEDED' not in str(error):
          raise
        if time.monotonic() > end:
          raise TimeoutError(key) from None

  def say_first(self, key: str, value: Any) -> None:
    """Says it unless it, or something else, was said before."""
    try:
      self.say(key, value)
    except RuntimeError as error:
      if 'ALREADY_EXISTS' not in str(error):
        raise

  def gather(self, key: str, value: Any, end: float = math.inf) -> list[Any]:
    """The values of all processes, in order."""
    self.say(f'{key}/{self.index}', value)
    return [self.hear(f'{key}/{i}', end) for i in range(self.count)]

  def when(self, key: str, then: Callable[[Any], object]) -> None:
    """Calls `then`, in a thread, with what will be said."""

    def wait() -> None:
      try:
        said = self.hear(key, poll=3600.0)
      except RuntimeError:
        return  # the service is gone, and this process about to be
      then(said)

    thread = threading.Thread(target=wait, name=f'wait for {key}', daemon=True)
    self.waiting.append(thread)
    thread.start()

  def agree_to_stop(self, _: Any) -> None:
    """In a thread, when some process was asked to stop. Whoever comes to `stop_agreed` meanwhile waits for the lock.

    The threads agree, and not the callers: those may hang in a collective that another one has yet to come to.
    """
    with self.lock:
      self.last_check = max(self.gather('checks', self.checks)) + 1

  def end_as_told(self, code: int) -> NoReturn:
    """In a thread, when some process has ended badly: this one may wait for it, and has GRACE to end by itself."""
    self.told = code
    self.say_first(f'heard/{self.index}', True)
    time.sleep(GRACE)
    os.write(2, b'another process of this run has ended, and so does this one\n')
    os._exit(code)


_group: Group | None = None  # set once, by `start`: as much a fact of this process as JAX's own


# ----------------------------------------------------------------------------------------------- finding each other


def start(mode: str) -> None:
  """Joins the other processes, if there are any; to be called before anything is computed.

  mode: 'auto' (if JAX detects a cluster with more than one process: a Slurm step, a TPU pod, Open MPI, Kubernetes),
  'on' (the same, and ConfigError if not), 'off', or 'ADDRESS:PORT,COUNT,INDEX', where process 0 runs at ADDRESS.
  ConfigError if it cannot be meant or does not work. If not all processes come in time, this one exits with 42.
  """
  global _group
  arguments = None if mode == 'off' else explicit(mode) if ',' in mode else detected(mode)
  if arguments is None:
    return
  import jax
  from jax._src.distributed import global_state  # nothing public gives the client

  from slm_jax import perf

  perf.keep_freed_memory()  # before there are threads
  ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)
  try:
    jax.distributed.initialize(**arguments, initialization_timeout=CONNECT, heartbeat_timeout_seconds=HEARTBEAT)
  except Exception as error:  # each cluster has its own
    raise ConfigError(f'--distributed={mode}: {" ".join(str(error).split())[:300]}') from error
  _group = Group(global_state.client, global_state.process_id, global_state.num_processes)
  _group.when('stop', _group.agree_to_stop)
  _group.when('end', _group.end_as_told)
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(line_buffering=True)  # nothing is lost when this process ends at once


def explicit(mode: str) -> Mapping[str, Any] | None:
  """Arguments of `jax.distributed.initialize` from 'ADDRESS:PORT,COUNT,INDEX'; None for a single process."""
  address, *numbers = mode.split(',')
  good = len(numbers) == 2 and all(n.isdecimal() for n in numbers) and address.rpartition(':')[2].isdecimal()
  require(good and ':' in address, f'--distributed={mode}: expected ADDRESS:PORT,COUNT,INDEX, as in 10.0.0.2:8476,4,0')
  count, index = map(int, numbers)
  require(index < count, f'--distributed={mode}: the processes are numbered from 0 to {count - 1}')
  if count == 1:
    return None
  alone = {'cluster_detection_method': 'deactivate'}
  return {'coordinator_address': address, 'num_processes': count, 'process_id': index, **alone}


def detected(mode: str) -> Mapping[str, Any] | None:
  """Arguments of `jax.distributed.initialize` in the cluster that this process finds itself in; None if alone."""
  require(mode in ('auto', 'on'), f'--distributed={mode}: allowed: auto, on, off, ADDRESS:PORT,COUNT,INDEX')
  from jax._src.clusters import ClusterEnv  # its table of clusters, so that both always agree

  try:
    known = [cluster for cluster in ClusterEnv._cluster_types if not cluster.opt_in_only_method]
    cluster = next((cluster for cluster in known if cluster.is_env_present()), None)
    slurm = cluster is not None and cluster.name == 'slurm'
    # The variables of a batch script speak of the job; those of a step are of what srun started.
    count = int(os.environ.get('SLURM_STEP_NUM_TASKS', 1)) if slurm else cluster.get_process_count() if cluster else 1
  except Exception as error:
    raise ConfigError(f'--distributed={mode}: {" ".join(str(error).split())[:300]}') from error
  alone = f'--distributed={mode}: this is a single process ({cluster.name if cluster else "no cluster is detected"})'
  require(count > 1 or mode == 'auto', f'{alone}; elsewhere give ADDRESS:PORT,COUNT,INDEX')
  if count == 1:
    return None
  return {'num_processes': count, **local_gpus(os.environ)} if slurm else {}


def local_gpus(environment: Mapping[str, str]) -> Mapping[str, Any]:
  """Which GPUs a task of a Slurm step takes: its share of the node's, or all that it sees.

  JAX gives task i of a node the GPU number i. That is wrong where a task has the node to itself (seven of eight GPUs
  would idle) and where Slurm shows each task no GPU but its own.
  """
  visible = environment.get('CUDA_VISIBLE_DEVICES', '').split(',')
  one_a_node = environment.get('SLURM_STEP_NUM_TASKS') == environment.get('SLURM_STEP_NUM_NODES')
  own = visible != [''] and len(visible) == 1
  return {'local_device_ids': []} if (one_a_node or own) and 'JAX_LOCAL_DEVICE_IDS' not in environment else {}


def check_shared(folder: Path) -> None:
  """ConfigError on all processes unless they all see what process 0 writes into `folder`."""
  if _group is None:
    return
  name = on_main(_mark, folder)
  end = time.monotonic() + SHARED
  while not (seen := folder.is_dir() and name in os.listdir(folder)) and time.monotonic() < end:
    time.sleep(0.2)
  blind = first_of('' if seen else socket.gethostname())
  if is_main():
    (folder / name).unlink(missing_ok=True)
  require(not blind, f'{folder}: not shared; {blind} does not see there what process 0 writes')


def _mark(folder: Path) -> str:
  name = f'.seen-{uuid.uuid4().hex[:12]}'
  try:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
  except OSError as error:
    raise ConfigError(f'{folder}: {error.strerror or error}') from error
  return name


# --------------------------------------------------------------------------------------------------------- agreeing


def is_main() -> bool:
  """Whether this process writes the files."""
  return _group is None or _group.index == 0


def on_main(function: Callable[..., Any], *args: Any) -> Any:
  """function(*args) of process 0, for all of them; must be JSON. Its ConfigError is raised on all of them."""
  if _group is None:
    return function(*args)
  key = f'{next(_group.turns)}'
  if is_main():
    said: dict[str, Any] = {}
    try:
      said['value'] = function(*args)
    except ConfigError as error:
      said['error'] = str(error)
    _group.say(key, said)
  said = _group.hear(key)
  if 'error' in said:
    raise ConfigError(said['error'])
  return said['value']


def main_first(function: Callable[[], T]) -> T:
  """function(), by process 0 and then by the others: what it leaves on a shared disk is made once.

  A ConfigError of any process is raised on all of them.
  """
  if _group is None:
    return function()
  key = f'{next(_group.turns)}'
  wrong = _group.hear(f'{key}/0') if not is_main() else ''
  if not wrong:
    try:
      value = function()
    except ConfigError as error:
      wrong = str(error)
  wrong = next(filter(None, _group.gather(key, wrong)), '')
  if wrong:
    raise ConfigError(wrong)
  return value


def first_of(text: str) -> str:
  """The text of the first process that has one; '' if none has."""
  return text if _group is None else next(filter(None, _group.gather(f'{next(_group.turns)}', text)), '')


def stop_agreed(requested: bool) -> bool:
  """Whether to stop here; requested: whether this process was asked to.

  All processes make the same calls in the same order, so the number of a call is a moment that they have in common.
  Once one was asked to stop, all stop at the first call that none of them has made yet. Until then no process waits
  for another: the host compares two numbers, and the devices do nothing.
  """
  if _group is None:
    return requested
  if requested and not _group.asked:
    _group.asked = True
    _group.say_first('stop', True)
  with _group.lock:
    _group.checks += 1
    return _group.checks >= _group.last_check


def failed_together() -> bool:
  """Called where this process failed to train an arm: whether the others come here too, so that all can go on.

  If one of them died, this one ends here, with 42.
  """
  if _group is None:
    return True
  if not _group.alone:
    try:
      _group.gather(f'failed/{next(_group.failures)}', True, end=time.monotonic() + 2.0 * HEARTBEAT)
    except TimeoutError:
      _group.alone = True
  return not _group.alone


# ----------------------------------------------------------------------------------------------------------- ending


def leave(code: int) -> None:
  """Called last: parts from the others. If this process did not come to a good end, it ends here, and so do they."""
  global _group
  if _group is None:
    return
  if code == EXIT_DONE:
    import jax

    jax.distributed.shutdown()  # once all have come here
    for thread in _group.waiting:  # none may come back from jaxlib to an interpreter that is shutting down
      thread.join()
    ctypes.CDLL(None).signal(signal.SIGABRT, None)
    _group = None
    return
  if sys.exc_info()[0]:
    traceback.print_exc()
  sys.stdout.flush()
  sys.stderr.flush()
  _group.told = code
  try:
    _group.say_first('end', code)
    _group.say_first(f'heard/{_group.index}', True)
    if is_main():  # the service lives here: the others must have heard before it goes
      end = time.monotonic() + GRACE
      for i in range(_group.count):
        _group.hear(f'heard/{i}', end)
      time.sleep(1.0)  # those that are about to leave do so without a fuss about the service
  finally:
    os._exit(code)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
  """The handler of SIGABRT, by which JAX's runtime ends a process where another one has died or never came.

  That is a reason to start again, and comes with no exception and the wrong exit code. A handler of Python's own kind
  would wait for the main thread, which hangs in a collective.
  """
  os._exit(EXIT_PREEMPTED if _group is None or _group.told is None else _group.told)
