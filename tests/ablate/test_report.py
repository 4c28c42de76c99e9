"""report.html: complete, self-contained, and nothing in it that an arm's name or a sample could smuggle in."""

import json
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from fakes import FakeTrain, arms_of, experiment, fill

from launch.local import run_arms
from launch.plan import Plan
from slm_jax.ablate import report, workdir
from slm_jax.ablate.sweep import product, seeds

EVIL = '<script>alert(1)</script><img src=x onerror=alert(2)>"\'&$x^{'


class Page(HTMLParser):
  """Collects elements, attributes and visible text; checks that elements are closed."""

  VOID = {'meta', 'br', 'wbr', 'img', 'link', 'input'}

  def __init__(self, text):
    super().__init__()
    self.tags, self.attributes, self.text, self.open = [], [], '', []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    if tag not in self.VOID:
      assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


def page_of(path, sweep, train, doc='Which?', answer='', options=()):
  module = experiment(doc=doc, sweep=sweep)
  arms = arms_of(module)
  plan = Plan(module, path, arms, options, arms[0].name)
  plan.record()
  run_arms(arms, path, train=train, say=lambda line: None)
  workdir.write_experiment(path, plan.experiment()._replace(answer=answer))
  report.publish(path)
  return Page((path / 'report.html').read_text()), arms


@pytest.fixture(scope='module')
def evil(tmp_path_factory):
  path = tmp_path_factory.mktemp('evil')
  sweep = [
    {'name': EVIL, 'eval.prompt': EVIL},
    {'name': '_$h^{$', 'train.steps': 7},
    {'name': 'bad', 'train.steps': 8},
  ]
  train = FakeTrain(bad=RuntimeError(EVIL))
  page, arms = page_of(path, sweep, train, doc=EVIL, answer=EVIL, options=[f'--config.eval.prompt={EVIL}'])
  fill(workdir.folder(path, arms[0].arm_id), 1.0, 4, text=EVIL)
  run = workdir.folder(path, arms[2].arm_id) / 'run.json'
  run.write_text(json.dumps({'status': EVIL, 'error': EVIL, 'git': {'commit': EVIL}, 'packages': {EVIL: EVIL}}))
  report.publish(path)
  return path, Page((path / 'report.html').read_text())


def test_nothing_is_executed(evil):
  _, page = evil
  assert 'script' not in page.tags
  assert 'img' not in page.tags
  assert not [name for name, _ in page.attributes if name.startswith('on')]


def test_what_was_said_is_shown_as_said(evil):
  path, page = evil
  # docstring, answer, result and cost tables, legend, sample, arms (title, change, error), environment
  assert page.text.count(EVIL) >= 8
  for svg in (path / 'plots').glob('*.svg'):
    texts = [e.text for e in ElementTree.parse(svg).iter() if e.tag.endswith('text')]
    assert any(text and text.startswith('<script>') for text in texts), svg
    # in the legend; and as the label of its line in the plot of final losses
    assert texts.count('_$h^{$') == 1 + (svg.stem == 'final_loss')


def test_elements_are_closed(evil):
  assert evil[1].open == []


def test_the_page_needs_nothing_else(evil):
  path, page = evil
  links = [value for name, value in page.attributes if name in ('src', 'href', 'xlink:href', 'data', 'action')]
  assert links
  assert all(value.startswith('#') for value in links)
  assert '@import' not in (path / 'report.html').read_text()


def test_commands_are_quoted_for_the_shell(evil):
  import shlex

  path, _ = evil
  for entry in workdir.read_experiment(path).arms.values():
    words = shlex.split(entry['command'])
    assert words[:2] == ['python', 'tiny']
    assert f'--config.eval.prompt={EVIL}' in words


def test_everything_that_was_promised_is_there(tmp_path):
  sweep = list(product(seeds(3), [{'name': 'one'}, {'name': 'two', 'train.steps': 500}]))
  page, arms = page_of(
    tmp_path, sweep, FakeTrain({'one': 1.5, 'two': 1.3}), 'Is two better?\n\n- a\n- b', 'Yes, it is.'
  )
  for text in ('Is two better?', 'Yes, it is.', 'two: better by 0.20000', '1.510 ± 0.025', "'one' are paired by seed"):
    assert text in page.text
  for arm in arms:
    assert page.text.count(arm.arm_id) == 2  # its id, and the command that runs it
  assert '500 (base: 1000)' in page.text
  assert 'there was a cat.' in page.text
  assert page.tags.count('svg') == 3
  assert sorted(p.name for p in (tmp_path / 'plots').iterdir()) == [
    'final_loss.svg',
    'loss_flops.svg',
    'loss_tokens.svg',
  ]


def test_a_workdir_without_results_has_a_report_too(tmp_path):
  page, _ = page_of(tmp_path, [{'name': 'one'}], FakeTrain(one=1))
  assert '1 arms: 1 nan' in page.text
  assert 'svg' not in page.tags


def test_many_arms_have_curves_that_can_be_told_apart():
  from slm_jax.ablate import plots

  assert len({plots.colour(i) for i in range(28)}) == 28


def test_colours_of_the_page_come_from_its_style_sheet(tmp_path):
  page_of(tmp_path, [{'name': 'one'}], FakeTrain())
  text = (tmp_path / 'report.html').read_text()
  svg = text[text.index('<svg') : text.rindex('</svg>')]
  assert 'var(--ink)' in svg
  assert 'var(--c0)' in svg
  assert '#202124' not in svg
  assert '#0072b2' not in svg
