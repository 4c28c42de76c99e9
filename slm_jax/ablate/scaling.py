"""Scaling laws: what loss is reached with so many parameters and so many tokens, and how to spend a budget.

    L(N, D) = E + A N^-alpha + B D^-beta        Hoffmann et al., arXiv 2203.15556, section 3.3 and appendix D.2
    L(x)    = E + A x^-alpha                    the same in one variable, tokens or FLOPs say

Fitted as there: Huber loss (delta = 1e-3) of log L - LSE(log E, log A - alpha log N, log B - beta log D), the best of
many initialisations. Besiroglu et al. (arXiv 2404.10102) found that the published fit had stopped too early and that
its intervals were too narrow; so here the sum and not the mean is minimised, to convergence, by a trust-region method
with exact derivatives. Intervals are percentiles over fits to runs drawn anew, with replacement.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy

from slm_jax.ablate.comparable import LOSS, metric_of, why_apart
from slm_jax.ablate.results import Row
from slm_jax.ablate.stats import LEVEL
from slm_jax.config import require

DELTA = 1e-3  # of the Huber loss of log L
STARTS = 12  # the initialisations that are followed to the end: the best of a grid
DRAWS = 200  # of the bootstrap
LARGEST_EXPONENT = 3.0


class Chinchilla(NamedTuple):
  """L(N, D) = E + A N^-alpha + B D^-beta, in nats per token. N: parameters, D: tokens."""

  E: float
  A: float
  B: float
  alpha: float
  beta: float

  def loss(self, parameters: Any, tokens: Any) -> Any:
    of_size = self.A * np.asarray(parameters, np.float64) ** -self.alpha
    return self.E + of_size + self.B * np.asarray(tokens, np.float64) ** -self.beta

  def optimum(self, flops: float, per: float = 6.0) -> tuple[float, float]:
    """The `(parameters, tokens)` of the lowest loss for a budget of FLOPs = per * N * D.

    N = G (C / per)^(beta / (alpha + beta)) with G = (alpha A / (beta B))^(1 / (alpha + beta)), equation 4 there.
    per: FLOPs a token and parameter; 6 neglects attention and counts embeddings as if they were multiplied.
    """
    both = self.alpha + self.beta
    g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / both)
    parameters = g * (flops / per) ** (self.beta / both)
    return parameters, flops / per / parameters


class Power(NamedTuple):
  """L(x) = E + A x^-alpha."""

  E: float
  A: float
  alpha: float

  def loss(self, x: Any) -> Any:
    return self.E + self.A * np.asarray(x, np.float64) ** -self.alpha


class Fit(NamedTuple):
  """A law, and the laws of the same runs drawn anew, which say how sure it is."""

  law: Any  # Chinchilla or Power
  draws: tuple[Any, ...]

  def interval(self, of: Callable[[Any], float]) -> tuple[float, float]:
    """`(low, high)` at 95 % of any number that follows from a law: `lambda law: law.optimum(1e15)[0]`, say."""
    low, high = np.quantile([of(law) for law in self.draws], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def points(rows: Iterable[Row]) -> tuple[list[float], list[float], list[float]]:
  """`(parameters, tokens, losses)` of the runs that are done, each seed a run of its own; what `chinchilla` takes.

  Of runs with different tokenizers: bytes of training text, and bits per byte. ConfigError if they were evaluated on
  different text, which no law relates.
  """
  done = [row for row in rows if row.summary]
  metric, apart = metric_of(done), why_apart(done)
  require(not apart, f'scaling law: the runs were {apart}')
  keys = ('parameters', 'tokens' if metric is LOSS else 'bytes', metric.key)
  found = [[row.summary[key] for key in keys] for row in done]
  parameters, tokens, losses = map(list, zip(*found, strict=True)) if found else ([], [], [])
  return parameters, tokens, losses


def chinchilla(
  parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float], draws: int = DRAWS, seed: int = 0
) -> Fit:
  """Fits L(N, D) to runs. ConfigError if they are too few: six, of three sizes and three numbers of tokens at least."""
  return _fit([parameters, tokens], losses, draws, seed, lambda e, a, k: Chinchilla(e, a[0], a[1], k[0], k[1]))


def power(x: Sequence[float], losses: Sequence[float], draws: int = DRAWS, seed: int = 0) -> Fit:
  """Fits L(x) to runs. ConfigError if they are too few: four, at three values of x at least."""
  return _fit([x], losses, draws, seed, lambda e, a, k: Power(e, a[0], k[0]))


# ------------------------------------------------------------------------------------------------------- the fitting
# k variables in n runs. theta = (e, b_1..b_k, alpha_1..alpha_k), where exp(b_i) is the i-th term at the geometric mean
# of its variable: with A_i itself, which is that of x = 1, a coefficient and its exponent could hardly be told apart.


def _fit(variables: Sequence[Sequence[float]], losses: Sequence[float], draws: int, seed: int, law: Callable) -> Fit:
  wrong = 'scaling law: the numbers of a run and its loss must be positive and finite, and as many'
  require(all(len(variable) == len(losses) for variable in variables), wrong)
  x, y = np.asarray(variables, np.float64), np.asarray(losses, np.float64)
  require(all(bool((np.isfinite(z) & (z > 0)).all()) for z in (x, y)), wrong)
  least, values = 2 * (len(x) + 1), [len(np.unique(row)) for row in x]
  require(
    y.size >= least and _determines(x),
    f'scaling law: {y.size} runs with {" and ".join(map(str, values))} different values; '
    f'needs {least} runs, and 3 values of each variable',
  )
  centre = np.log(x).mean(axis=1)
  u, v = np.log(x) - centre[:, None], np.log(y)

  def natural(theta: np.ndarray) -> Any:
    e, b, alpha = _parts(theta, len(x))
    return law(float(np.exp(e)), np.exp(b + alpha * centre).tolist(), alpha.tolist())

  starts = _starts(u, v)
  best = min((_descend(theta, u, v) for theta in starts), key=lambda found: found[1])[0]
  rng, again = np.random.default_rng(seed), list[np.ndarray]()
  while len(again) < draws:
    chosen = rng.integers(0, y.size, y.size)
    if _determines(x[:, chosen]):
      again.append(_descend(best, u[:, chosen], v[chosen])[0])
  return Fit(natural(best), tuple(map(natural, again)))


def _determines(x: np.ndarray) -> bool:
  """Whether a law can follow from these runs: as many different ones as it has constants, in all directions."""
  return np.unique(x, axis=1).shape[1] > 2 * len(x) and all(len(np.unique(row)) >= 3 for row in x)


def _parts(theta: np.ndarray, k: int) -> tuple[float, np.ndarray, np.ndarray]:
  return theta[0], theta[1 : k + 1], theta[k + 1 :]


def _terms(theta: np.ndarray, u: np.ndarray) -> np.ndarray:
  """Logarithms of E and of the power terms, [k + 1, n]."""
  e, b, alpha = _parts(theta, len(u))
  return np.vstack([np.full(u.shape[1], e), b[:, None] - alpha[:, None] * u])


def _residuals(theta: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  return np.logaddexp.reduce(_terms(theta, u), axis=0) - v


def _jacobian(theta: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  terms = _terms(theta, u)
  share = np.exp(terms - np.logaddexp.reduce(terms, axis=0))  # of each term in the loss
  return np.vstack([share, -share[1:] * u]).T


def _descend(theta: np.ndarray, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, float]:
  """`(theta, Huber loss)` of the minimum that is reached from theta."""
  k = len(u)
  low = np.array([v.min() - 12.0, *[v.min() - 12.0] * k, *[0.0] * k])
  high = np.array([v.min(), *[v.max() + 6.0] * k, *[LARGEST_EXPONENT] * k])
  inside = np.clip(theta, low + 1e-6, high - 1e-6)
  found = scipy.optimize.least_squares(
    _residuals, inside, _jacobian, (low, high), args=(u, v), loss='huber', f_scale=DELTA, xtol=1e-10, ftol=1e-10
  )
  return found.x, float(found.cost)


def _starts(u: np.ndarray, v: np.ndarray) -> list[np.ndarray]:
  """The best of a grid, by their Huber loss, the best one first."""
  k, above = len(u), np.exp(v).mean()
  e = np.log(np.exp(v.min()) * np.array([0.05, 0.3, 0.6, 0.85, 0.98]))
  b = [np.log(above * np.array([0.02, 0.1, 0.3, 0.8]))] * k
  alpha = [np.array([0.1, 0.3, 0.6, 1.2])] * k
  grid = [np.array(theta) for theta in itertools.product(e, *b, *alpha)]

  def cost(theta: np.ndarray) -> float:
    r = np.abs(_residuals(theta, u, v))
    return float(np.where(r < DELTA, 0.5 * r**2, DELTA * (r - 0.5 * DELTA)).sum())

  return sorted(grid, key=cost)[:STARTS]
