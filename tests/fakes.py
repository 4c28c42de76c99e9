"""Experiment modules made in memory, and workdirs filled without training."""

import json
import math
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

from slm_jax.ablate.arms import Arm, expand
from slm_jax.ablate.claims import Claim, decide
from slm_jax.experiment import Config
from slm_jax.model.config import ModelConfig


def experiment(doc: str = 'Which?', base: Config = Config(model=ModelConfig(n_layers=2)), **members: Any) -> Any:
  """A module with a config(), and sweeps given as `sweep_x=[{...}, ...]` or as functions."""
  module = ModuleType('tiny')
  module.__doc__ = doc
  module.config = lambda: base
  for name, value in members.items():
    setattr(module, name, (lambda changes: lambda: iter(changes))(value) if isinstance(value, list) else value)
  return module


def arms_of(module: Any, sweep: str | None = None, **overrides: Any) -> list[Arm]:
  return expand(module, sweep, overrides, fingerprint=lambda data: 'content of ' + '+'.join(data.sources))


class FakeTrain:
  """Stands in for training: writes what a run leaves. Losses and outcomes (exit code or error) by name."""

  def __init__(self, losses: dict[str, float] | None = None, **outcomes: Any):
    self.losses, self.outcomes, self.called = losses or {}, outcomes, []

  def __call__(self, config: Config, workdir: Path, arm_id: str) -> int:
    self.called.append((config.name, config.seed))
    outcome = self.outcomes.get(config.name, 0)
    if callable(outcome):
      outcome = outcome()
    if isinstance(outcome, BaseException):
      raise outcome
    folder = workdir / 'arms' / arm_id
    run = {
      'status': {0: 'done', 42: 'preempted'}.get(outcome, 'diverged'),
      'error': None if outcome == 0 else 'not finite',
    }
    if outcome == 0:
      loss = self.losses.get(config.name, 1.5) + 0.01 * config.seed + noise(config)
      run['summary'] = summary(loss)
      fill(folder, loss, config.train.steps)
    (folder / 'run.json').write_text(json.dumps(run))
    if outcome == 0:
      (folder / 'DONE').touch()
    return outcome


def noise(config: Config) -> float:
  """Differs between arms and seeds, and sums to nothing over seeds 0, 1 and 2: no two seeds differ by the same."""
  size = 1e-4 * (1 + zlib.crc32(config.name.encode()) % 7)
  return size * (1, -1, 0)[config.seed] if config.seed < 3 else 0.0


def summary(loss: float, **more: Any) -> dict[str, Any]:
  known = {
    'loss': loss,
    'bits_per_byte': loss / math.log(2),
    'perplexity': math.exp(loss),
    'accuracy': 0.5,
    'ece': 0.01,
  }
  used = {'tokens': 1000, 'flops': 2e6, 'parent_flops': 0.0, 'parameters': 100, 'seconds': 3.0}
  return {**known, **used, 'floor': 1.1, 'gap': loss - 1.1, **more}


def fill(folder: Path, loss: float, steps: int, text: str = 'there was a cat.') -> None:
  evaluations = [
    {'step': step, 'kind': 'eval', 'loss': loss + 1 - step / max(steps, 1), 'tokens': 1000 * step / max(steps, 1)}
    for step in (0, steps // 2, steps)
  ]
  train = [{'step': 1, 'kind': 'train', 'loss': 3.0, 'tokens': 10}]
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in train + evaluations))
  (folder / 'samples.json').write_text(json.dumps([{'prompt': 'Once ', 'text': text}]))


def verdicts_of(said: Any) -> list[str]:
  """The verdict of every claim in what a report says, each as if it were the only one, in their order."""
  claims = [part for part in said if isinstance(part, Claim)]
  return [decide([claim._replace(primary=True)])[0].verdict for claim in claims]


def primary_of(said: Any) -> list[Claim]:
  return [part for part in said if isinstance(part, Claim) and part.primary]
