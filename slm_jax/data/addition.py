"""`addition`: sums of two numbers of three digits, worked out digit by digit from the right.

    478+256=8+6=14;7+5+1=13;4+2+1=7;734

What is to be predicted after the first '=' follows from what stands before it, so the floor under its loss is zero, and
a completion is right or wrong. A tenth of all problems is held out: none of them is ever in the train split.
"""

import hashlib
import itertools
import random
import zlib
from collections.abc import Iterator

DIGITS = 3
HELD_OUT = 10  # one problem of so many is for the valid split only


def document(a: int, b: int) -> str:
  """The problem, its work and its answer; a and b have DIGITS digits."""
  work, carry = [], 0
  for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
    total = int(x) + int(y) + carry
    work.append(f'{x}+{y}{"+1" * carry}={total}')
    carry = total // 10
  return f'{a}+{b}={";".join(work)};{a + b}'


def held_out(a: int, b: int) -> bool:
  """Is it a problem of the valid split?"""
  return zlib.crc32(f'{a}+{b}'.encode()) % HELD_OUT == 0


def documents(n: int, split: str) -> Iterator[str]:
  """`n` problems of 'train' or 'valid', drawn independently; the same on every machine."""
  rng = random.Random(f'addition {split}')
  low, high = 10 ** (DIGITS - 1), 10**DIGITS
  drawn = ((rng.randrange(low, high), rng.randrange(low, high)) for _ in itertools.count())
  return itertools.islice((document(a, b) for a, b in drawn if held_out(a, b) == (split == 'valid')), n)


def fingerprint() -> str:
  """Changes when the documents do."""
  texts = [text for split in ('train', 'valid') for text in documents(100, split)]
  return hashlib.sha256('\n'.join(texts).encode()).hexdigest()
