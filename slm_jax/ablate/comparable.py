"""Which numbers of two arms may be subtracted.

A loss per token says nothing between two tokenizers: 350 tokens and 500 tokens split the same text into different
numbers of predictions. Such arms are compared in bits per byte, which count the same text in the same unit. And no two
losses are compared that were measured on different text.
"""

from collections.abc import Iterable
from typing import NamedTuple

from slm_jax.ablate.results import Point, Row


class Metric(NamedTuple):
  """A way to state the loss on held-out text."""

  key: str  # of a summary, and of an evaluation in metrics.jsonl
  unit: str
  title: str

  def of(self, point: Point) -> float:
    """Of one evaluation."""
    return point.loss if self.key == 'loss' else point.bits_per_byte


LOSS = Metric('loss', 'nats', 'nats per token')
BITS = Metric('bits_per_byte', 'bits/byte', 'bits per byte')


def metric_of(rows: Iterable[Row]) -> Metric:
  """Returns how the runs are compared with each other: LOSS where all that have a result share one tokenizer."""
  return LOSS if len({row.tokenizer for row in rows if row.summary}) < 2 else BITS


def why_apart(rows: Iterable[Row]) -> str:
  """Returns why runs may not be compared: they were evaluated on different text; '' if they may."""
  texts = {row.held_out for row in rows if row.summary}
  return '' if len(texts) < 2 else 'evaluated on different held-out text'
