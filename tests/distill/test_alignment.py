"""Laws of alignment: a chunk is the same bytes on both sides, is predicted on both sides, and no cut is overlooked."""

import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from slm_jax.data import packing, stories, tokenizer
from slm_jax.data.packing import Piece
from slm_jax.distill.alignment import align, entries

TEXTS = [text for text, _ in stories.documents(300, 'alignment')] + ['é😀 über ▁ 12\n\n  x']


def with_prefix():
  """A tokenizer that puts a space before every text."""
  model = io.BytesIO()
  settings = {**tokenizer.SETTINGS, 'add_dummy_prefix': True, 'minloglevel': 2}
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=350, **settings
  )
  return tokenizer.SentencePiece(model.getvalue())


PREFIX = with_prefix()
BYTES, PIECES, FEWER = tokenizer.Bytes(), tokenizer.train(TEXTS, 512), tokenizer.train(TEXTS[::-1][:40], 330)
TOKENIZERS = {'bytes': BYTES, 'pieces': PIECES, 'fewer': FEWER, 'prefix': PREFIX}
each = pytest.mark.parametrize('other', TOKENIZERS.values(), ids=TOKENIZERS)
documents = st.lists(
  st.lists(st.sampled_from(['the ', 'cat', ' sat.', 'é', '😀', '\n', ' ', '12', 'Mia ', 'was', 'ü▁'])).map(''.join),
  min_size=1,
  max_size=4,
)


def sequences(texts, own, length, packer=packing.split, prompt=0):
  """[2, length + 1] of documents."""
  pieces = [Piece(np.array([own.bos, *own.encode(text), own.eos]), prompt) for text in texts]
  return [np.stack([r.tokens, r.segments.astype(np.uint32)]) for r in packer(pieces, length, own.pad)]


def spelt(tokens, of):
  return b''.join(b'\xff' if token == of.eos else of.spelling[token] for token in tokens)


@each
@given(texts=documents, length=st.integers(3, 40), own=st.sampled_from([BYTES, PIECES]), packer=st.booleans())
def test_a_chunk_is_the_same_bytes_on_both_sides(other, texts, length, own, packer):
  for sequence in sequences(texts, own, length, packing.whole if packer else packing.split):
    found = align(sequence, own, other, 4 * length)
    targets, its_targets, segments = sequence[0, 1:], found.sequence[0, 1:], packing.documents(sequence[1])
    its_mask = packing.mask(found.sequence[1])
    assert found.chunk.shape == found.place.shape == (length,)
    assert found.its_chunk.shape == (4 * length,)
    assert set(found.chunk) - {0} == set(found.its_chunk) - {0}
    assert found.chunk.max() <= length
    for c in set(found.chunk) - {0}:
      ours, theirs = np.flatnonzero(found.chunk == c), np.flatnonzero(found.its_chunk == c)
      before = theirs[0] and found.its_chunk[theirs[0] - 1]
      first = other is PREFIX and not before  # perhaps with the space that is not of the text
      same = spelt(its_targets[theirs], other), spelt(targets[ours], own)
      assert same[0] == same[1] or (first and same[0] == b' ' + same[1])
      assert len(set(segments[ours + 1])) == 1 == len(set(found.sequence[1, theirs + 1]))
      assert segments[ours[0]] == found.sequence[1, theirs[0]]
      assert packing.mask(sequence[1])[ours].all()
      assert its_mask[theirs].all()


@given(texts=documents, length=st.integers(3, 40))
def test_with_ones_own_tokenizer_every_predicted_token_is_a_chunk(texts, length):
  for sequence in sequences(texts, BYTES, length):
    found = align(sequence, BYTES, BYTES, length)
    mask = packing.mask(sequence[1])
    # A piece that begins or ends in the middle of a character has bytes that are no text.
    if not any(byte >= 0x80 for byte in spelt(sequence[0], BYTES).replace(b'\xff', b'')):
      np.testing.assert_array_equal(found.chunk > 0, mask)
      np.testing.assert_array_equal(found.chunk, found.its_chunk)
      np.testing.assert_array_equal(found.place, np.where(mask, np.arange(1, length + 1), 0))


@each
@given(texts=documents, length=st.integers(4, 40))
def test_at_a_place_both_have_read_the_same_text(other, texts, length):
  for sequence in sequences(texts, PIECES, length, packing.whole):
    found = align(sequence, PIECES, other, 6 * length)
    segments, its = packing.documents(sequence[1]), found.sequence
    for i in np.flatnonzero(found.place):
      j = found.place[i] - 1
      assert segments[i] == its[1, j]
      ours = spelt(sequence[0, : i + 1][segments[: i + 1] == segments[i]], PIECES)
      theirs = spelt(its[0, : j + 1][its[1, : j + 1] == its[1, j]], other)[other is PREFIX :]
      whole = sequence[0, np.flatnonzero(segments == segments[i])[0]] == PIECES.bos
      assert theirs == ours if whole else ours.endswith(theirs)  # a piece may begin in the middle of a character


def test_chunks_are_the_shortest_there_are():
  sequence = sequences([TEXTS[0]], PIECES, 200)[0]
  found = align(sequence, PIECES, BYTES, 600)  # bytes have every cut
  predicted = packing.mask(sequence[1])
  np.testing.assert_array_equal(found.chunk[predicted], np.arange(1, predicted.sum() + 1))
  back = align(found.sequence, BYTES, PIECES, 200)
  counted = packing.mask(found.sequence[1])
  assert (back.chunk[counted] > 0).all()
  np.testing.assert_array_equal(np.bincount(back.its_chunk)[1:], 1)
  assert back.wanted == predicted.sum() + 1


def test_text_that_does_not_fit_has_no_chunk():
  sequence = sequences([TEXTS[0]], PIECES, 60)[0]
  full, short = (align(sequence, PIECES, BYTES, n) for n in (600, 40))
  assert short.wanted == full.wanted > 41
  n = int((short.chunk > 0).sum())
  assert 0 < n < (full.chunk > 0).sum()
  np.testing.assert_array_equal(short.chunk[:n], full.chunk[:n])
  assert not short.chunk[n:].any()
  assert short.place.max() <= 40
  np.testing.assert_array_equal(short.sequence, full.sequence[:, :41])


def test_a_prompt_is_in_no_chunk():
  prompt = 5
  (sequence,) = sequences([TEXTS[0][:60]], PIECES, 60, packing.single, prompt)
  found = align(sequence, PIECES, BYTES, 200)
  mask = packing.mask(sequence[1])
  assert not mask[: prompt - 1].any()
  np.testing.assert_array_equal(found.chunk > 0, mask)
  np.testing.assert_array_equal(found.place > 0, mask)
  asked = spelt(found.sequence[0, 1:][found.its_chunk > 0], BYTES)
  assert asked == spelt(sequence[0, 1:][mask], PIECES)


def test_nothing_has_no_chunks():
  """A row that fills a batch up."""
  found = align(np.zeros((2, 9), np.uint32), PIECES, BYTES, 8)
  assert not found.chunk.any()
  assert not found.place.any()
  assert not found.its_chunk.any()
  assert not found.sequence[1].any()
  assert found.wanted == 0


def test_entries_of_a_batch():
  rows = [align(s, PIECES, BYTES, 90) for s in sequences(TEXTS[:6], PIECES, 30)]
  made = entries('x', rows)
  assert {k: v.shape[1:] for k, v in made.items()} == {
    **{f'x_{k}': (30,) for k in ('chunk', 'place')},
    **{f'x_{k}': (90,) for k in ('its_chunk', 'its_inputs', 'its_targets', 'its_segments')},
  }
  assert all(v.dtype == np.int32 for v in made.values())
  np.testing.assert_array_equal(made['x_its_targets'][:, :-1], made['x_its_inputs'][:, 1:])
