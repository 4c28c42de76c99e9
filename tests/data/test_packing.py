"""Laws of packing, with tokens that all differ, so that each can be followed."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slm_jax.data import packing
from slm_jax.data.packing import Piece

PAD = 0
pack = pytest.mark.parametrize('pack', [packing.split, packing.whole])
lengths = st.integers(1, 12)  # L: predictions in a record
sizes = st.lists(st.integers(2, 40), min_size=1, max_size=100)


def documents(sizes: list[int]) -> list[Piece]:
  ends = np.cumsum(sizes)
  return [Piece(np.arange(end - n, end) + 1) for n, end in zip(sizes, ends, strict=True)]


def predictions(records) -> list[tuple[int, int]]:
  """(input, target) wherever the mask is set."""
  found = []
  for record in records:
    mask = packing.mask(record.segments)
    found += zip(record.tokens[:-1][mask].tolist(), record.tokens[1:][mask].tolist(), strict=True)
  return found


@pack
@given(sizes=sizes, length=lengths)
def test_every_token_but_the_first_is_predicted_once_from_the_one_before_it(pack, sizes, length):
  found = predictions(pack(documents(sizes), length, PAD))
  expected = [
    (a, b) for d in documents(sizes) for a, b in zip(d.tokens[:-1].tolist(), d.tokens[1:].tolist(), strict=True)
  ]
  assert sorted(found) == expected


@pack
@settings(max_examples=4, deadline=None)
@given(count=st.integers(1, 70_000), spare=st.integers(0, 3))
@example(count=32_767, spare=0)
@example(count=32_768, spare=0)
@example(count=65_536, spare=0)
def test_nothing_is_lost_however_many_documents_stand_in_one_record(pack, count, spare):
  prompts = (i % 2 for i in range(count))  # a prompt of one token predicts as much as none
  pieces = [d._replace(prompt=prompt) for d, prompt in zip(documents([2] * count), prompts, strict=True)]
  (record,) = pack(pieces, 2 * count - 1 + spare, PAD)
  assert predictions([record]) == [(int(d.tokens[0]), int(d.tokens[1])) for d in pieces]
  assert packing.documents(record.segments).max() == count


@pack
@given(sizes=sizes, length=lengths)
def test_records_have_one_shape_and_segments_are_pieces_of_one_document(pack, sizes, length):
  owner = {int(token): i for i, d in enumerate(documents(sizes)) for token in d.tokens}
  for record in pack(documents(sizes), length, PAD):
    assert record.tokens.shape == record.segments.shape == (length + 1,)
    used = int((record.segments > 0).sum())
    assert used > 0
    assert (record.segments[used:] == 0).all()  # padding comes last
    assert (record.tokens[used:] == PAD).all()
    steps = np.diff(record.segments[:used].astype(int))
    assert record.segments[0] == 1
    assert set(steps.tolist()) <= {0, 1}
    owners = [owner[int(t)] for t in record.tokens[:used]]
    for same, a, b in zip(steps == 0, owners[:-1], owners[1:], strict=True):
      assert same == (a == b)


@given(sizes=sizes, length=lengths)
def test_split_loses_no_space(sizes, length):
  records = list(packing.split(documents(sizes), length, PAD))
  assert all((record.segments > 0).all() for record in records[:-1])
  total = sum(sizes)
  assert math.ceil(total / (length + 1)) <= len(records) <= math.ceil(total / length)


@given(sizes=sizes, length=lengths)
def test_whole_cuts_only_what_is_too_long(sizes, length):
  records = list(packing.whole(documents(sizes), length, PAD))
  where = {int(t): i for i, record in enumerate(records) for t in record.tokens if t != PAD}
  for d in documents(sizes):
    places = {
      where[int(t)] for t in d.tokens[1:]
    }  # of cut documents' first tokens, one is the last of the piece before
    assert len(d.tokens) > length + 1 or len(places) == 1


def test_whole_packs_tightly():
  rng = np.random.default_rng(0)
  sizes = rng.integers(20, 120, 2000).tolist()
  records = list(packing.whole(documents(sizes), 256, PAD))
  assert sum(sizes) / (len(records) * 257) > 0.95
