"""A smaller vocabulary for a narrow domain: the pieces of a SentencePiece that its texts use.

    python -m slm_jax.data.specialise --tokenizer=FILE --text=FILE[,FILE] --vocab_size=N --out=FILE

Bytes and special tokens stay, so that any text can still be written; a text of the domain takes a few tokens more. A
model follows by `init.arm` with `data.tokenizer_file=` the new file: it keeps the embeddings of the pieces that are
left."""

import collections
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from absl import flags
from sentencepiece import sentencepiece_model_pb2

from slm_jax import commands
from slm_jax.config import ConfigError, require
from slm_jax.data import tokenizer
from slm_jax.data.tokenizer import SentencePiece, Tokenizer
from slm_jax.files import expanded

model_pb2: Any = sentencepiece_model_pb2  # its classes are made when it is imported
_SPACE = '▁'


def specialised(of: SentencePiece, texts: Iterable[str], vocab_size: int) -> SentencePiece:
  """`vocab_size` of its pieces, in their order: bytes, special ones, and those that the texts use most.

  A piece comes with those that it is merged of, so that each can still be made. A piece that is kept for its use alone
  may be dropped for one that is used less and needs fewer others. ConfigError if even bytes do not fit.
  """
  proto = model_pb2.ModelProto.FromString(of.serialize())
  is_bpe = proto.trainer_spec.model_type == model_pb2.TrainerSpec.BPE
  require(is_bpe, 'tokenizer: its pieces are not made by merges; allowed: a SentencePiece of type bpe')
  counts = collections.Counter(token for text in texts for token in of.encode(text))
  always = {i for i, piece in enumerate(proto.pieces) if piece.type != model_pb2.ModelProto.SentencePiece.NORMAL}
  always.add(of.pieces.piece_to_id(_SPACE))  # without it a space is three bytes
  require(
    len(always) <= vocab_size <= of.vocab_size,
    f'vocab_size={vocab_size}: allowed: {len(always)} (bytes and special tokens) .. {of.vocab_size}',
  )
  scores = {piece.piece: piece.score for piece in proto.pieces}
  kept = set(always)
  for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
    needed = {of.pieces.piece_to_id(part) for part in parts(proto.pieces[token].piece, scores)} - kept
    if token not in kept and len(kept) + len(needed) <= vocab_size:
      kept |= needed
  for token in range(of.vocab_size):  # room is left: what comes first was the most frequent elsewhere
    needed = {of.pieces.piece_to_id(part) for part in parts(proto.pieces[token].piece, scores)} - kept
    if len(kept) + len(needed) <= vocab_size:
      kept |= needed
  return cut(of, sorted(kept))


def parts(piece: str, scores: dict[str, float]) -> list[str]:
  """The piece and all that it is merged of: at each step, the neighbours whose union has the highest score."""
  symbols, made = list(piece), [piece, *piece]
  while len(symbols) > 1:
    pairs = [(-scores[a + b], i) for i, (a, b) in enumerate(zip(symbols, symbols[1:], strict=False)) if a + b in scores]
    if not pairs:  # a special piece, which is no result of merges
      return [piece]
    _, i = min(pairs)
    symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    made.append(symbols[i])
  return list(dict.fromkeys(made))


def cut(of: SentencePiece, kept: Sequence[int]) -> SentencePiece:
  """The same without all other pieces; ids are places in `kept`."""
  proto = model_pb2.ModelProto.FromString(of.serialize())
  pieces = [proto.pieces[i] for i in kept]
  del proto.pieces[:]
  proto.pieces.extend(pieces)
  proto.trainer_spec.vocab_size = len(kept)
  return SentencePiece(proto.SerializeToString(), 'specialised tokenizer')


def within(small: Tokenizer, large: Tokenizer, who: str) -> np.ndarray:
  """[v]: the id in `large`, the tokenizer of `who`, of each token of `small`. ConfigError if one is missing there.

  Special tokens are found by what they are, or by their name, and all others by their bytes; a byte is not the piece
  that reads the same.
  """
  special = {small.pad: large.pad, small.bos: large.bos, small.eos: large.eos}
  ids: dict[tuple[bytes, str], int] = {}
  for i in range(large.vocab_size):
    ids.setdefault(_known_by(large, i), i)
  found = [special.get(i, ids.get(_known_by(small, i), -1)) for i in range(small.vocab_size)]
  missing = [small.spelling[i] for i, at in enumerate(found) if at < 0]
  require(
    not missing,
    f'{who}: its tokenizer {large.fingerprint} lacks {len(missing)} tokens of data.tokenizer, such as '
    f'{(missing + [b""])[0].decode(errors="replace")!r}',
  )
  return np.array(found)


def _known_by(of: Tokenizer, i: int) -> tuple[bytes, str]:
  """(what it stands for, the name of a special token or of a byte)."""
  spelt = of.spelling[i]
  if not isinstance(of, SentencePiece):
    return spelt, f'<0x{spelt[0]:02X}>' if spelt else ''
  return spelt, of.pieces.id_to_piece(i) if not spelt or of.pieces.is_byte(i) else ''


# ---------------------------------------------------------------------------------------------------- the command line


def main(argv: Sequence[str] | None = None) -> int:
  """The exit code: 0, or 1 with one line on stderr."""
  options = flags.FlagValues()
  flags.DEFINE_string('tokenizer', None, 'a SentencePiece .model file', flag_values=options)
  flags.DEFINE_list('text', None, 'files of the domain, plain text', flag_values=options)
  flags.DEFINE_integer('vocab_size', None, 'tokens of the new one', flag_values=options)
  flags.DEFINE_string('out', None, 'where it goes', flag_values=options)
  return commands.run(__doc__, options, argv, ('tokenizer', 'text', 'vocab_size', 'out'), made)


def made(options: flags.FlagValues) -> str:
  """Writes the file; a line about it."""
  large = tokenizer.load(expanded(options.tokenizer))
  require(isinstance(large, SentencePiece), f'--tokenizer={options.tokenizer}: bytes have no pieces to do without')
  assert isinstance(large, SentencePiece)
  texts = []
  for name in options.text:
    try:
      texts.append(expanded(name).read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError) as error:
      raise ConfigError(f'--text={name}: {" ".join(str(error).split())}') from None
  small = specialised(large, texts, options.vocab_size)
  out = expanded(options.out)
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(small.serialize())
  except OSError as error:
    raise ConfigError(f'--out={options.out}: {error.strerror}') from None
  n_bytes = sum(len(text.encode()) for text in texts)
  rates = [n_bytes / max(sum(len(each.encode(text)) for text in texts), 1) for each in (large, small)]
  return (
    f'{small.vocab_size} of {large.vocab_size} tokens; bytes a token on these texts: {rates[1]:.2f}, '
    f'before {rates[0]:.2f}: {options.out}'
  )


if __name__ == '__main__':
  sys.exit(main())
