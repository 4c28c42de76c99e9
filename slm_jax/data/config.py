"""DataConfig: which text, cut into which tokens, packed how."""

import dataclasses
from typing import ClassVar, Literal

from slm_jax.config import Needs, require, setting

EMBEDDED = ('stories', 'addition', 'python_stdlib')  # sources that are no files


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Sources are 'stories', 'addition', 'python_stdlib', a file, a folder, a glob, or 'hf:NAME'; see data/sources.py.

  Paths are not part of an arm's identity; `content`, the hash of what they hold, is. It is filled in when an experiment
  is resolved (`sources.fingerprint`).
  """

  sources: tuple[str, ...] = setting(('stories',), semantic=False)
  weights: tuple[float, ...] = ()  # share of training sequences from each source; empty: by size
  valid_sources: tuple[str, ...] = setting((), semantic=False)  # empty: a source's own valid files, or its last part
  valid_fraction: float = 0.1  # the last part of each source that has no valid files of its own
  content: str = ''
  text_field: str = 'text'  # of JSONL, Parquet and Hugging Face records
  errors: Literal['strict', 'replace', 'skip'] = 'strict'  # of text that is not UTF-8, lines that are not records
  documents: int = 0  # at most so many from each source, or from its train and its valid files; 0: all (drawn: 20,000)
  tokenizer: Literal['bytes', 'sentencepiece'] = 'bytes'
  tokenizer_file: str = setting('', semantic=False)  # a SentencePiece .model; empty: trained on the training split
  vocab_size: int = 512  # of a SentencePiece that is trained here
  seq_len: int = 128
  # whole: only a document longer than seq_len is cut; single: one document a sequence, and a longer one is an error
  packing: Literal['split', 'whole', 'single'] = 'split'
  # A text that is one token, and in every document: up to the first one nothing is predicted. '': no prompts
  prompt_end: str = ''
  batch_size: int = 32  # sequences in a global batch
  seed: int = 0  # order of the batches

  needs: ClassVar[Needs] = {
    'vocab_size': (
      lambda its: its.tokenizer == 'sentencepiece' and not its.tokenizer_file,
      'a tokenizer that is trained here: tokenizer=sentencepiece, and no tokenizer_file',
    ),
    'text_field': (lambda its: {*its.sources, *its.valid_sources}.difference(EMBEDDED), 'a source of records'),
    'weights': (lambda its: len(its.sources) > 1, 'a second source'),
    'valid_fraction': (
      lambda its: not its.valid_sources,
      'a source that holds out its own last part: no valid_sources',
    ),
  }

  def check(self, key: str) -> None:
    require(len(self.sources) > 0, f'{key}.sources=(): name at least one source')
    require(
      len(self.weights) in (0, len(self.sources)),
      f'{key}.weights={self.weights}: expected none, or one for each of the {len(self.sources)} sources',
    )
    require(all(w > 0 for w in self.weights), f'{key}.weights={self.weights}: must be positive')
    require(0 < self.valid_fraction < 1, f'{key}.valid_fraction={self.valid_fraction}: must lie between 0 and 1')
    for name in ('seq_len', 'batch_size', 'vocab_size'):
      require(getattr(self, name) > 0, f'{key}.{name}={getattr(self, name)}: must be positive')
    require(self.documents >= 0, f'{key}.documents={self.documents}: must not be negative')
    require(
      not self.tokenizer_file or self.tokenizer == 'sentencepiece',
      f"{key}.tokenizer_file={self.tokenizer_file!r}: needs {key}.tokenizer='sentencepiece'",
    )

  @property
  def has_completions(self) -> bool:
    """Whether a sequence is one document, of a prompt and what is to follow it."""
    return self.packing == 'single' and bool(self.prompt_end)
