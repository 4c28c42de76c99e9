"""The table of prices and watts: complete, dated, and forgiving of nobody's typing errors."""

import re

import pytest

from slm_jax import chips
from slm_jax.ablate import cost
from slm_jax.config import ConfigError, check, override
from slm_jax.experiment import Config
from slm_jax.perf import PEAK


def test_every_chip_has_a_peak_and_every_peak_a_price():
  kinds = [kind for chip in chips.table().values() for kind in chip.kinds]
  assert sorted(kinds) == sorted(PEAK)


def test_every_price_says_where_and_of_when_it_is():
  for chip in chips.table().values():
    assert chip.prices[chips.ON_DEMAND] > 0
    assert chip.prices.get(chips.SPOT, 0) < chip.prices[chips.ON_DEMAND]
    assert re.search(r'20\d\d', chip.price_source)
    assert chip.power_source


def test_memory_and_links_are_of_a_plausible_size_and_say_where_they_are_from():
  for chip in chips.table().values():
    assert 16 * 2**30 <= chip.hbm <= 192 * 2**30
    assert chip.dcn < chip.ici < chip.bandwidth
    assert 100 < PEAK[chip.kinds[0]] / chip.bandwidth < 1000, 'FLOPs a byte at which a matrix product stops to wait'
    assert len(chip.memory_source) > 20


def test_an_hour_costs_what_is_agreed():
  listed = chips.table()['v5e'].prices
  for kind in chips.table()['v5e'].kinds:
    assert chips.price(kind, 'on_demand')[0] == listed['on_demand']
    assert chips.price(kind, 'spot')[0] == listed['spot']
    assert chips.price(kind, '0.75') == (0.75, 'as given')
  assert chips.price('cpu', 'on_demand')[0] == 0
  assert chips.price('cpu', '0.05')[0] == 0.05
  assert chips.price('NVIDIA Unheard Of', 'on_demand') == (
    None,
    'no on_demand price of NVIDIA Unheard Of in chips.toml',
  )
  assert chips.price('NVIDIA H200', 'spot')[0] is None


@pytest.mark.parametrize('terms', ['cheap', '-1', 'nan', 'inf', ''])
def test_impossible_terms_are_refused(terms):
  with pytest.raises(ConfigError, match=re.escape(f'run.price={terms!r}: allowed: on_demand, spot')):
    check(override(Config(), {'run.price': terms}))


@pytest.mark.parametrize('text', ['[v4', '[v4]\nkinds = ["TPU v4"]\n', 'v4 = 3\n', None])
def test_a_broken_edit_is_one_line(tmp_path, monkeypatch, text):
  path = tmp_path / 'chips.toml'
  if text is not None:
    path.write_text(text)
  monkeypatch.setattr(chips, 'TABLE', path)
  with pytest.raises(ConfigError, match=f'{path}: cannot be read') as error:
    chips.table()
  assert '\n' not in str(error.value)


def test_a_chip_that_was_added_without_a_peak_is_one_line(tmp_path, monkeypatch):
  text = chips.TABLE.read_text()
  start = text.index('[v5e]')
  section = text[start : text.index('\n[', start)].replace('[v5e]', '[l4]')
  path = tmp_path / 'chips.toml'
  path.write_text(text + '\n' + re.sub(r'kinds = .*', 'kinds = ["NVIDIA L4"]', section))
  monkeypatch.setattr(chips, 'TABLE', path)
  with pytest.raises(ConfigError, match='NVIDIA L4: no published peak is known; add it to PEAK in slm_jax/perf.py'):
    cost.device('l4')


def test_the_fakes_of_one_cpu_are_one_machine():
  assert chips.count('cpu', devices=8, processes=1) == 1
  assert chips.count('TPU v5 lite', devices=8, processes=2) == 8
