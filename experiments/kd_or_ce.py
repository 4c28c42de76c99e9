"""Does a teacher help a small language model at equal tokens, and at equal FLOPs?

A student of 115K parameters sees 1.2M tokens of stories, ten a parameter: with plain cross-entropy (ce), or with its
teacher's distribution alone (kd: weight 1, temperature 1, forward KL). The teacher is twice as wide, has seen three
times the tokens, and its forward passes are FLOPs of the kd arm; so a third arm trains with cross-entropy until it has
used as many FLOPs as kd (ce, equal FLOPs). The teacher's own training is in nobody's budget (`parent_flops` has it).

Expected, written before the run: at equal tokens kd is ahead by 0.02 nats or more (Busbridge et al., arXiv 2502.08606,
find distillation ahead at few tokens a parameter with a good teacher; RS-KD, arXiv 2503.16870). At equal FLOPs nothing
is left of it or little: MobileLLM (arXiv 2402.14905) and MiniPLM (arXiv 2410.17215) report nulls. So: |difference| of
at most 0.02 nats there.

Found (2 CPU cores, 5 seeds, 95 % intervals): ce 0.6382 +- 0.0021, kd 0.6167 +- 0.0058 (teacher 0.524). At equal
tokens kd is ahead by 0.0215 +- 0.0051: ahead, but whether by 0.02 CANNOT TELL. At equal FLOPs ce, which has then seen
2.1 times the tokens, comes to 0.6010 +- 0.0028 and is ahead of kd by 0.0157 +- 0.0069: kd = ce within 0.02 CANNOT
TELL, and the sign is against kd.

    python -m experiments.kd_or_ce
"""

from collections.abc import Iterator, Sequence
from typing import Any

import launch
from experiments.common import TEACHER, student, table, wider
from slm_jax.ablate.claims import Claim, equal, less, values
from slm_jax.ablate.results import Row
from slm_jax.ablate.sweep import product, seeds
from slm_jax.config import override
from slm_jax.distill.logits import Distill
from slm_jax.experiment import Config
from slm_jax.model.flops import flops_per_token

SEEDS = 5
LONGER = 3  # the teacher's tokens, as a multiple of the student's
MARGIN = 0.02  # nats
BASELINE = 'ce'


def config() -> Config:
  return student(1200)


def sweep(base: Config) -> Iterator[dict[str, Any]]:
  teacher = wider(base, LONGER)
  yield teacher
  own = flops_per_token(base.model, base.data.seq_len)
  its = flops_per_token(override(base, teacher).model, base.data.seq_len, backward=False)
  longer = round(base.train.steps * (1 + its / own))
  arms = [
    {'name': 'ce'},
    {'name': 'kd', 'transforms': (Distill(TEACHER, weight=1.0),)},
    {'name': 'ce, equal FLOPs', 'train.steps': longer, 'eval.every': max(longer // 4, 1)},
  ]
  yield from product(arms, seeds(SEEDS))


def report(rows: Sequence[Row]) -> list[str | Claim]:
  losses = values(rows)
  columns = {'loss': 'loss (nats)', 'ece': 'calibration error', 'tokens': 'tokens', 'flops': 'FLOPs'}
  kd, ce, longer = (losses[name] for name in ('kd', 'ce', 'ce, equal FLOPs'))
  return [
    *table(rows, columns),
    less(f'kd < ce by {MARGIN} at equal tokens', kd, ce, MARGIN, primary=True),
    equal(f'kd = ce within {MARGIN} at equal FLOPs', kd, longer, MARGIN, primary=True),
  ]


if __name__ == '__main__':
  launch.main()
