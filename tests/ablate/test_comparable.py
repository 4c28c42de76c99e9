"""What may be subtracted, from training to the report: arms of two tokenizers, lengths and packings, and other text."""

import json

import pytest
import tiny
from fakes import experiment

from launch import cli
from slm_jax.ablate import results
from slm_jax.ablate.comparable import BITS, metric_of, why_apart
from slm_jax.config import override

BASE = override(
  tiny.config(3),
  {'name': '', 'transforms': (), 'eval.samples': 0, 'model.vocab_size': 512, 'data.tokenizer': 'sentencepiece'},
)
SWEEP = [
  {'name': '350', 'data.vocab_size': 350},
  {'name': '500', 'data.vocab_size': 500},
  {'name': 'short', 'data.vocab_size': 350, 'data.seq_len': 32},
  {'name': 'whole', 'data.vocab_size': 350, 'data.packing': 'whole'},
]


@pytest.fixture(scope='module')
def launched(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('comparable') / 'runs'
  assert cli.launch(experiment(base=BASE, sweep=SWEEP), [f'--workdir={workdir}']) == 0
  return workdir, {row.name: row for row in results.read(workdir)}


def test_arms_of_other_tokenizers_lengths_and_packings_are_evaluated_on_one_text(launched):
  _, rows = launched
  assert len({row.held_out for row in rows.values()}) == 1
  assert why_apart(rows.values()) == ''
  n_bytes = {
    name: row.summary['loss'] * row.summary['tokens_evaluated'] / row.summary['bits_per_byte']
    for name, row in rows.items()
  }
  for found in n_bytes.values():
    assert found == pytest.approx(n_bytes['350'], rel=1e-9)
  evaluated = {name: row.summary['tokens_evaluated'] for name, row in rows.items()}
  assert evaluated['350'] == evaluated['short'] == evaluated['whole'] > evaluated['500']


def test_two_tokenizers_are_compared_in_bits_per_byte_and_at_equal_bytes(launched, capsys):
  workdir, rows = launched
  assert metric_of(rows.values()) == BITS
  assert rows['350'].tokenizer == rows['short'].tokenizer != rows['500'].tokenizer
  assert cli.launch(experiment(base=BASE, sweep=SWEEP), [f'--workdir={workdir}']) == 0
  table = capsys.readouterr().out
  assert 'Bits per byte of held-out text' in table
  assert 'at equal bytes' in table
  assert rows['500'].summary['bytes'] / rows['500'].summary['tokens'] > 1.1 * (
    rows['350'].summary['bytes'] / rows['350'].summary['tokens']
  )


def test_arms_that_were_evaluated_on_other_text_are_not_subtracted(launched, capsys):
  """As where only a part of a sweep was launched with another setting of evaluation."""
  workdir, rows = launched
  for words in (['--config.eval.bytes=3000', '--only=350'], ['--config.eval.bytes=1000', '--only=500']):
    assert cli.launch(experiment(base=BASE, sweep=SWEEP), [f'--workdir={workdir}', *words]) == 0
  capsys.readouterr()
  now = {row.name: row for row in results.read(workdir)}
  assert now['350'].held_out != now['500'].held_out == rows['500'].held_out
  assert why_apart([now['350'], now['500']]) == 'evaluated on different held-out text'
  assert cli.launch(experiment(base=BASE, sweep=SWEEP), [f'--workdir={workdir}']) == 0  # evaluates it again
  assert '1 to evaluate again' in capsys.readouterr().out
  assert {row.held_out for row in results.read(workdir)} == {rows['500'].held_out}
  assert json.loads((workdir / 'arms' / rows['350'].arm_id / 'config.json').read_text())['eval']['bytes'] == 1000
