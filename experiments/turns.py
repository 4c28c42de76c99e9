"""For benchmarks whose contestants are processes of their own and take turns: a busy machine then slows all of them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


class Contestant:
  """Processes, usually one, that work at the same time while the other contestants wait.

  Each is a command that ends in `serve`, and what it finds in its environment besides ours.
  """

  def __init__(self, *processes: tuple[Sequence[str], Mapping[str, str]]):
    pipes: Any = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
    self._started = [subprocess.Popen(command, env={**os.environ, **env}, **pipes) for command, env in processes]
    self.facts: list[Any] = []
    try:
      self.facts = self._answers()
    except BaseException:
      self.close()
      raise

  def turn(self, seconds: float) -> list[Any]:
    """What each process says of its work of so many seconds."""
    for process in self._started:
      process.stdin.write(f'{seconds}\n')  # type: ignore[union-attr]
      process.stdin.flush()  # type: ignore[union-attr]
    return self._answers()

  def close(self) -> None:
    for process in self._started:
      process.kill()
      process.wait()

  def _answers(self) -> list[Any]:
    lines = [process.stdout.readline() for process in self._started]  # type: ignore[union-attr]
    if not all(lines):
      command = ' '.join(map(str, self._started[lines.index('')].args))
      raise RuntimeError(f'{command}: ended too early; what it printed is above')
    return [json.loads(line) for line in lines]


@contextmanager
def closing(contestants: list[Contestant]) -> Iterator[list[Contestant]]:
  """The list, whose members, those that are added later too, are closed at the end."""
  try:
    yield contestants
  finally:
    for contestant in contestants:
      contestant.close()


def take_turns(contestants: Sequence[Contestant], rounds: int, seconds: float) -> list[list[Any]]:
  """For each contestant, the answers of all its turns. Every second round is in the reverse order."""
  answers: list[list[Any]] = [[] for _ in contestants]
  for i in range(rounds):
    for n in range(len(contestants)) if i % 2 == 0 else reversed(range(len(contestants))):
      answers[n] += contestants[n].turn(seconds)
  return answers


def serve(facts: Any, turn: Callable[[float], Any]) -> None:
  """A contestant's side: says what it is, then for each turn what came of it."""
  print(json.dumps(facts), flush=True)
  for line in sys.stdin:
    print(json.dumps(turn(float(line))), flush=True)
