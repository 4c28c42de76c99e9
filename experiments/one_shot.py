"""How much can be set to zero at once, and by which criterion? No retraining; three dense models.

115K parameters on stories, 1,200 steps. Of the layers' matrices 50, 70 or 90 % is set to zero (of magnitude and OBD a
curve from 10 to 95 %), or two of every four inputs; then the loss on held-out text is taken. dL is its distance from
the dense model's. Calibration: 128 sequences of training text. OBD goes by the Fisher information of labels that the
model draws.

Expected, written before the run (ratios of dL, every seed in the mean of three; the thresholds are those of
../shared/reference/pruning.md, section 5, where they were seen in a preliminary measurement on bytes):

    OBD global < 0.6 of magnitude global, at 50 and 70 %      Optimal Brain Damage (LeCun 1989)
    SparseGPT < 0.65 of magnitude, at 50 and 70 %             SparseGPT (arXiv 2301.00774)
    SparseGPT < 0.5 of magnitude, 2:4
    OBD global < 0.8 of OBD by layer, at 70 and 90 %          OWL (arXiv 2310.05175): layers are not alike
    50 % without a pattern < 2:4, for magnitude and SparseGPT
    each < random, at 50 %
    OBD global < magnitude global at 10, 30, 80 and 95 % too (added, with these shares, when 50, 70, 90 % were known)

Wanda against magnitude is reported and not expected: below 100M parameters the order is not safe.

Found (2 CPU cores, three dense models of 0.638 nats, 95 % intervals): dL at 50, 70, 90 % and 2:4 is 0.30, 2.30, 7.1,
0.98 by magnitude, 0.20, 1.50, 5.5 by OBD with one budget for all, 0.24, 2.08, 6.9, 0.72 by SparseGPT. The order is as
expected and the distances are not: OBD global < 0.6 of magnitude global CANNOT TELL at 50 and 70 % (-0.08 +- 0.12,
-0.25 +- 0.48); SparseGPT < 0.65 of magnitude NOT REPRODUCED at both, nor < 0.5 at 2:4 (it is 0.79, 0.90 and 0.74 of
it); OBD global < 0.8 of OBD by layer CANNOT TELL. REPRODUCED: 50 % < 2:4, and all of them < random (6.1). So small a
model, trained on ten tokens a parameter, has little that it can do without: at 70 % all is lost, by any criterion. OBD
global < magnitude global is REPRODUCED from 30 to 95 %; at 10 % neither costs more than 0.001.

    python -m experiments.one_shot
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import launch
from experiments.common import student
from slm_jax.ablate import stats
from slm_jax.ablate.claims import Claim, all_of, less, values
from slm_jax.ablate.results import Row
from slm_jax.ablate.sweep import product, seeds
from slm_jax.experiment import Config
from slm_jax.prune.sparse import OneShot

SEEDS = 3
WAYS: dict[str, dict[str, str]] = {
  'random': {'criterion': 'random'},
  'magnitude': {'criterion': 'magnitude'},
  'magnitude global': {'criterion': 'magnitude', 'allocation': 'global'},
  'wanda': {'criterion': 'wanda', 'pattern': 'output'},
  'obd': {'criterion': 'obd'},
  'obd global': {'criterion': 'obd', 'allocation': 'global'},
  'sparsegpt': {'criterion': 'sparsegpt'},
}
SHARES = (0.5, 0.7, 0.9)
CURVE = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)  # of those below
CURVES = ('magnitude', 'magnitude global', 'obd', 'obd global')
OF_FOUR = ('magnitude', 'wanda', 'sparsegpt')
BASELINE = 'dense'


def config() -> Config:
  return student(1200)


def sweep(base: Config) -> Iterator[dict[str, Any]]:
  """Zero-step arms: each is evaluated as it starts."""
  arms: list[dict[str, Any]] = [{'name': 'dense'}]
  start = {'init.arm': 'dense', 'train.steps': 0}
  for way, settings in WAYS.items():
    for share in CURVE if way in CURVES else SHARES:
      arms.append({'name': f'{way} {share:.0%}', 'init.sparse': OneShot(**{**settings, 'sparsity': share}), **start})  # type: ignore[arg-type]
  for way in OF_FOUR:
    spec = OneShot(criterion=WAYS[way]['criterion'], sparsity=0.5, pattern='2:4')  # type: ignore[arg-type]
    arms.append({'name': f'{way} 2:4', 'init.sparse': spec, **start})
  yield from product(arms, seeds(SEEDS))


def report(rows: Sequence[Row]) -> list[str | Claim]:
  """Increases of the loss by seed of the dense model, and what became of the expectation."""
  losses: Mapping[str, Mapping[Hashable, float]] = values(rows)
  dense = losses.get('dense', {})
  rise = {name: {key: loss - dense[key] for key, loss in of.items() if key in dense} for name, of in losses.items()}
  heads = [f'{share:.0%}' for share in SHARES]
  shown = [*(f'{share:.0%}' for share in CURVE), '2:4']
  lines = [f'    {"dL (nats)":<20}' + ''.join(head.ljust(20) for head in shown)]
  for way in WAYS:
    cells = [stats.interval(rise.get(f'{way} {head}', {}).values()) for head in shown]
    lines.append(f'    {way:<20}' + ''.join((stats.digits(c.mean, c.half) if c.n else '–').ljust(20) for c in cells))

  def below(a: str, b: str, ratio: float, where: Sequence[str]) -> list[Claim]:
    return [less(f'dL at {head}: {a} < {ratio:g} of {b}', at(a, head), scaled(at(b, head), ratio)) for head in where]

  def at(way: str, head: str) -> Mapping[Hashable, float]:
    return rise.get(f'{way} {head}', {})

  obd = below('obd global', 'magnitude global', 0.6, heads[:2])
  sparsegpt = below('sparsegpt', 'magnitude', 0.65, heads[:2])
  return [
    *lines,
    all_of('OBD < 0.6 of magnitude, one budget for all, at 50 and 70 %', obd, primary=True),
    all_of('SparseGPT < 0.65 of magnitude, at 50 and 70 %', sparsegpt, primary=True),
    below('sparsegpt', 'magnitude', 0.5, ['2:4'])[0]._replace(primary=True),
    *obd,
    *sparsegpt,
    *below('obd global', 'obd', 0.8, heads[1:]),
    *below('obd global', 'magnitude global', 1.0, shown[:-1]),
    *(less(f'dL of {way}: 50% < 2:4', at(way, '50%'), at(way, '2:4')) for way in ('magnitude', 'sparsegpt')),
    *(less(f'dL at 50%: {way} < random', at(way, '50%'), at('random', '50%')) for way in list(WAYS)[1:]),
  ]


def scaled(of: Mapping[Any, float], by: float) -> dict[Any, float]:
  return {key: by * value for key, value in of.items()}


if __name__ == '__main__':
  launch.main()
