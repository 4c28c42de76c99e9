"""report.html: complete, self-contained, and nothing in it that an arm's name or a sample could smuggle in."""

import base64
import csv
import hashlib
import json
import re
import shutil
import subprocess
import warnings
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from fakes import FakeTrain, arms_of, experiment, fill

from launch.plan import Plan
from launch.worker import run_arms
from slm_jax.ablate import page, report, workdir
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
  run.write_text(json.dumps({'status': 'failed', 'error': EVIL, 'git': {'commit': EVIL}, 'packages': {EVIL: EVIL}}))
  report.publish(path)
  return path, Page((path / 'report.html').read_text())


def test_nothing_is_executed(evil):
  _, page = evil
  assert page.tags.count('script') == 1
  assert 'img' not in page.tags
  assert not [name for name, _ in page.attributes if name.startswith('on')]


def test_only_the_script_of_the_page_may_run(evil):
  """A browser that keeps to the policy runs what has this hash, and fetches nothing."""
  text = (evil[0] / 'report.html').read_text()
  (script,) = re.findall('<script>(.*?)</script>', text, re.DOTALL)
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  (policy,) = re.findall('Content-Security-Policy" content="([^"]*)"', text)
  assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
  assert text.index('Content-Security-Policy') < text.index('<style>')


def test_what_was_said_is_shown_as_said(evil):
  path, page = evil
  # docstring, answer, result and cost tables, legend, sample, arms (title, change, error), environment
  assert page.text.count(EVIL) >= 8
  for svg in set((path / 'plots').glob('*.svg')) - {path / 'plots/loss_by_train_steps.svg'}:  # that has a line for all
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


def test_the_table_has_the_controls_and_so_has_the_csv(tmp_path):
  sweep = list(product(seeds(3), [{'name': 'one'}, {'name': 'two', 'train.steps': 500}]))
  page, arms = page_of(tmp_path, sweep, FakeTrain({'one': 1.5, 'two': 1.3}))
  assert 'The final losses are those at equal tokens' in page.text
  for arm in arms:  # now the one has seen twice as many tokens, at half the price
    if arm.name == 'one':
      folder = workdir.folder(tmp_path, arm.arm_id)
      run = json.loads((folder / 'run.json').read_text())
      run['summary'] |= {'tokens': 2000, 'chip_hours': 0.125, 'joules_estimated': 3600.0, 'energy_source': '15 W'}
      (folder / 'run.json').write_text(json.dumps(run))
      lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
      lines = [{**line, 'tokens': 2 * line.get('tokens', 0)} for line in lines]
      (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  report.publish(tmp_path)
  page = Page((tmp_path / 'report.html').read_text())
  # read where half of its steps are done, its loss is 0.5 above its last
  assert '2.010 ± 0.025' in page.text
  assert 'At equal tokens: each arm’s loss when it had seen 1K' in page.text
  for text in ('chip-hours', '0.125', 'joules, estimated', '3.6K', 'Joules: 15 W.'):
    assert text in page.text
  assert 'dollars' not in page.text
  with open(tmp_path / 'results.csv', newline='') as file:
    rows = {row['arm_id']: row for row in csv.DictReader(file)}
  for arm in arms:
    at, last = float(rows[arm.arm_id]['loss_at_equal_tokens']), float(rows[arm.arm_id]['loss'])
    assert at - last == pytest.approx(0.5 if arm.name == 'one' else 0.0)
    assert rows[arm.arm_id]['chip_hours'] == ('0.125' if arm.name == 'one' else '')


def test_a_click_on_the_head_of_a_column_sorts_it(tmp_path):
  browser = shutil.which('chromium') or shutil.which('google-chrome')
  if not browser:
    pytest.skip('no chromium here')
  sweep = [{'name': name, 'train.steps': i + 7} for i, name in enumerate('abcd')]
  page_of(tmp_path, sweep, FakeTrain({'a': 1.5, 'b': 11.0, 'd': 1.3}, c=1))
  text = (tmp_path / 'report.html').read_text()

  def order(clicks):
    """Names in the first table after so many clicks on 'loss'; the clicks are allowed by taking the policy out."""
    click = 'document.querySelectorAll("th button")[2].click();'
    script = f'<script>{clicks * click}</script>'
    page = re.sub('<meta http-equiv[^>]*>', '', text).replace('</body>', f'{script}</body>')
    (tmp_path / 'clicked.html').write_text(page)
    command = [browser, '--headless', '--no-sandbox', '--dump-dom', (tmp_path / 'clicked.html').as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    body = dom[dom.index('<tbody>') : dom.index('</tbody>')]
    return re.findall('<tr><td data-key="(.)"', body), re.findall('aria-sort="([a-z]*)"', dom)

  assert order(1) == (['d', 'a', 'b', 'c'], ['ascending'])  # 1.3, 1.5, 11, none
  assert order(2) == (['b', 'a', 'd', 'c'], ['descending'])


def test_a_workdir_without_results_has_a_report_too(tmp_path):
  page, _ = page_of(tmp_path, [{'name': 'one'}], FakeTrain(one=1))
  assert '1 arms: 1 nan' in page.text
  assert 'svg' not in page.tags


@pytest.mark.parametrize('arm', [{'name': '蒸留 🐣'}, {'name': 'untrained', 'train.steps': 0}])
def test_the_plots_of_an_odd_arm_warn_of_nothing(arm, tmp_path):
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    page, _ = page_of(tmp_path, [arm], FakeTrain())
  assert 'svg' in page.tags
  assert arm['name'] in page.text


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


def test_tables_in_words_are_set_apart_and_lists_keep_their_lines():
  text = """    arm   loss
    base  1.0
- base wins:
  by far

Two lines
of prose."""
  assert page.paragraphs(text) == [
    ('    arm   loss\n    base  1.0', True),
    ('- base wins:\n  by far', True),
    ('Two lines of prose.', False),
  ]


def test_students_are_shown_beside_their_teachers(tmp_path):
  """Only arms that have one; the section is not there without, and the columns of others are empty."""
  sweep = list(product(seeds(2), [{'name': 'teacher'}, {'name': 'student', 'train.steps': 500}]))
  page, arms = page_of(tmp_path, sweep, FakeTrain({'student': 1.7}))
  assert 'Students and their teachers' not in page.text
  for arm in arms:
    if arm.name == 'student':
      path = workdir.folder(tmp_path, arm.arm_id) / 'run.json'
      run = json.loads(path.read_text())
      of_seed = {
        name: 0.1 + 0.02 * arm.config.seed
        for name in (*report.TAUGHT.values(), 'entropy', 'teacher_entropy', 'teacher_ece')
      }
      run['summary'].update(of_seed, teacher_loss=1.5)
      path.write_text(json.dumps(run))
  report.publish(tmp_path)
  text = (tmp_path / 'report.html').read_text()
  section = Page('<h2>' + text.split('<h2>')[2]).text
  assert section.startswith('Students and their teachers')
  assert section.count('student') == 3  # its row, and twice in the note
  assert section.count('0.11 ± 0.13') == len(report.TAUGHT) == 5  # the 95 % interval of two seeds: 12.7 times 0.01
  assert '1.705 (1.500)' in section
  assert '1.0% (11.0%)' in section
  with open(tmp_path / 'results.csv', newline='') as file:
    rollouts = {line['name']: line['rollout_kl'] for line in csv.DictReader(file)}
  assert rollouts['teacher'] == ''
  assert float(rollouts['student']) == pytest.approx(0.12)
