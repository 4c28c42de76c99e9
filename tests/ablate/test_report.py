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
from slm_jax.ablate import claims, page, report, sections, workdir
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
  recorded = plan.experiment()
  workdir.write_experiment(path, recorded.with_launch(recorded.latest._replace(answer=answer)))
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
  assert {value for value in links if not value.startswith('#')} == {'index.html'}, 'which is a page beside it'
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
  for text in ('Is two better?', 'Yes, it is.', 'better*', '1.510 ± 0.024', "'one' are paired by seed"):
    assert text in page.text
  for arm in arms:
    assert page.text.count(arm.arm_id) == 2  # its id, and the command that runs it
  assert '500 (base: 1000)' in page.text
  assert 'there was a cat.' in page.text
  assert page.tags.count('svg') == 5
  (plots,) = (tmp_path / 'plots').iterdir()
  assert sorted(p.name for p in plots.iterdir()) == [
    'differences.svg',
    'final_loss.svg',
    'loss_flops.svg',
    'loss_tokens.svg',
    'training_tokens.svg',
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
  assert '2.010 ± 0.024' in page.text
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


def dom_after(path, text, script, width=1200):
  """The page as a browser has it after a script ran, which is allowed by taking the policy out."""
  browser = shutil.which('chromium') or shutil.which('google-chrome')
  if not browser:
    pytest.skip('no chromium here')
  page = re.sub('<meta http-equiv[^>]*>', '', text).replace('</body>', f'<script>{script}</script></body>')
  (path / 'scripted.html').write_text(page)
  command = [browser, '--headless', '--no-sandbox', f'--window-size={width},900', '--dump-dom']
  found = subprocess.run(
    [*command, (path / 'scripted.html').as_uri()], capture_output=True, text=True, timeout=60, check=True
  )
  return found.stdout


LONG = 'distilled from the averaged teacher of the longest run, learning_rate=0.0003'


def test_a_page_of_1200_pixels_needs_no_sideways_scrolling(tmp_path):
  names = [LONG, 'scratch', 'pruned+distilled', 'taught by 0.25x', 'renormalised teacher']
  sweep = list(product([{'name': name, 'train.steps': 7 + i} for i, name in enumerate(names)], seeds(3)))
  parents = {'parent_flops': 4.1e13, 'chip_hours': 1.25, 'dollars': 123.0, 'joules': 1e6, 'joules_estimated': 2e6}
  costs = {'goodput': 0.97, 'peak_bytes': 1.2e9, 'hardware_flops': 3e12, 'zeros': 120_000, **parents}
  taught = {'kl': 0.1, 'reverse_kl': 0.2, 'rollout_kl': 0.3, 'agreement': 0.9, 'entropy': 1.0, 'teacher_loss': 1.0}
  page_of(tmp_path, sweep, FakeTrain(dict.fromkeys(names, 1.5)))
  for path in tmp_path.glob('arms/*/run.json'):
    run = json.loads(path.read_text())
    path.write_text(json.dumps({**run, 'summary': {**run['summary'], **costs, **taught}}))
  report.publish(tmp_path)
  script = 'const w=[document.documentElement,...document.querySelectorAll(".wide")]'
  script += ';document.title=w.map(x=>x.scrollWidth-x.clientWidth).join(" ")'
  dom = dom_after(tmp_path, (tmp_path / 'report.html').read_text(), script)
  beyond = re.search('<title>(.*?)</title>', dom)[1].split()
  assert len(beyond) >= 4
  assert set(beyond) == {'0'}


def test_a_click_on_the_head_of_a_column_sorts_it(tmp_path):
  sweep = [{'name': name, 'train.steps': i + 7} for i, name in enumerate('abcd')]
  page_of(tmp_path, sweep, FakeTrain({'a': 1.5, 'b': 11.0, 'd': 1.3}, c=1))
  text = (tmp_path / 'report.html').read_text()

  def order(clicks):
    """Names in the first table after so many clicks on 'loss'."""
    dom = dom_after(tmp_path, text, clicks * 'document.querySelectorAll("th button")[2].click();')
    body = dom[dom.index('<tbody>') : dom.index('</tbody>')]
    return re.findall('<tr><td data-key="(.)"', body), re.findall('aria-sort="([a-z]*)"', dom)

  assert order(1) == (['d', 'a', 'b', 'c'], ['ascending'])  # 1.3, 1.5, 11, none
  assert order(2) == (['b', 'a', 'd', 'c'], ['descending'])


def test_a_workdir_without_results_has_a_report_too(tmp_path):
  page, _ = page_of(tmp_path, [{'name': 'one'}], FakeTrain(one=1))
  assert '1 arms: 1 diverged' in page.text
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
        for name in (*sections.TAUGHT.values(), 'entropy', 'teacher_entropy', 'teacher_ece')
      }
      run['summary'].update(of_seed, teacher_loss=1.5)
      path.write_text(json.dumps(run))
  report.publish(tmp_path)
  text = (tmp_path / 'report.html').read_text()
  section = Page('<h2>' + text.split('<h2>')[3]).text
  assert section.startswith('Students and their teachers')
  assert section.count('student') == 3  # its row, and twice in the note
  assert section.count('0.11 ± 0.13') == len(sections.TAUGHT) == 5  # the 95 % interval of two seeds: 12.7 times 0.01
  assert '1.705 (1.500)' in section
  assert '1.0% (11.0%)' in section
  with open(tmp_path / 'results.csv', newline='') as file:
    rollouts = {line['name']: line['rollout_kl'] for line in csv.DictReader(file)}
  assert rollouts['teacher'] == ''
  assert float(rollouts['student']) == pytest.approx(0.12)


# --------------------------------------------------------------------------------------- launches of one workdir


def launched(path, sweep, train=None, doc='Which?', answer=None, part=None):
  """A launch of a sweep, or of a part of its arms, and its report."""
  module = experiment(doc=doc, sweep=sweep)
  everyone = arms_of(module)
  arms = [arm for arm in everyone if part is None or arm.name in part]
  plan = Plan(module, path, arms, (), arms[0].name, everyone, choice=[f'--only={part[0]}'] if part else [])
  plan.record()
  run_arms(arms, path, train=train or FakeTrain(), say=lambda line: None)
  if answer is not None:
    recorded, said = plan.experiment(), claims.answer_of(answer)
    decided = tuple(claim._asdict() for claim in said.claims)
    workdir.write_experiment(path, recorded.with_launch(recorded.latest._replace(answer=said.text, claims=decided)))
  return report.publish(path)


def shown(path):
  return Page(path.read_text())


SWEEP = list(product([{'name': 'one'}, {'name': 'two', 'train.steps': 500}, {'name': 'six'}], seeds(3)))[:6]


def test_a_quick_try_leaves_the_report_of_the_sweep(tmp_path):
  launched(tmp_path, SWEEP)
  whole = (tmp_path / 'report.html').read_text()
  text = launched(tmp_path, SWEEP, part=['one'])
  assert (tmp_path / 'report.html').read_text() == whole
  assert len(list((tmp_path / 'reports').iterdir())) == 2
  (part,) = (path for path in (tmp_path / 'reports').iterdir() if path.name.startswith('part-3-arms'))
  assert str(part) in text, 'the command says where this one is'
  assert 'two' not in shown(part).text.split('Arms')[-1]
  index = shown(tmp_path / 'index.html')
  assert 'the whole sweep: 6 arms: 6 done' in index.text
  assert 'a part of the sweep: 3 arms: 3 done' in index.text
  assert '--only=one' in index.text
  links = [value for name, value in index.attributes if name == 'href']
  assert all((tmp_path / link).exists() for link in links)
  assert len(links) == 2


def test_the_same_launch_again_is_one_report(tmp_path):
  for _ in range(2):
    launched(tmp_path, SWEEP)
  assert len(list((tmp_path / 'reports').iterdir())) == 1
  (launch,) = workdir.read_experiment(tmp_path).launches
  index = shown(tmp_path / 'index.html').text
  assert '1 launch ' in index
  assert launch.when[:16].replace('T', ' ') in index


def test_links_lead_to_the_index_from_both_places(tmp_path):
  launched(tmp_path, SWEEP)
  (own,) = (tmp_path / 'reports').iterdir()
  for path in (own, tmp_path / 'report.html'):
    (link,) = [value for name, value in shown(path).attributes if name == 'href' and not value.startswith('#')]
    assert (path.parent / link).resolve() == tmp_path / 'index.html'


def test_claims_and_comparisons_are_apart(tmp_path):
  ours, theirs = {i: 1 + 0.001 * i for i in range(5)}, {i: 1.03 + 0.0011 * i for i in range(5)}
  said = ['    a table', claims.less('one < two', ours, theirs, primary=True), claims.less('a < b', ours, theirs)]
  launched(tmp_path, SWEEP, answer=said)
  text = shown(tmp_path / 'report.html').text
  claimed, compared = text.index('What was claimed'), text.index('Compared with one')
  assert claimed < text.index('REPRODUCED one < two: −0.0') < text.index('1 exploratory claims') < compared
  assert text.index('a table') < compared
  assert 'REPRODUCED: one < two' in shown(tmp_path / 'index.html').text


def test_the_figure_with_the_message_comes_first(tmp_path):
  launched(tmp_path, SWEEP)
  page = (tmp_path / 'report.html').read_text()
  assert page.index('<figure>') < page.index('<table>')
  assert page.index('Difference to one') < page.index('Loss on held-out text')
  rates = list(product(({'optim.learning_rate': lr} for lr in (1e-3, 2e-3, 4e-3)), seeds(2)))
  launched(tmp_path / 'rates', rates)
  page = (tmp_path / 'rates' / 'report.html').read_text()
  assert page.index('Loss against optim.learning_rate') < page.index('Difference to')


def test_the_page_says_how_the_base_was_trained(tmp_path):
  launched(tmp_path, SWEEP)
  text = ' '.join(shown(tmp_path / 'report.html').text.split())
  assert 'How one was trained' in text
  for fact in (
    'datastories',
    'tokenizerbytes',
    'batch, sequences32',
    'steps1000 (differs between arms)',
    'learning rate0.001',
    'optim.clip1',
  ):
    assert fact in text


def test_what_changed_the_text_stands_on_the_page(tmp_path):
  launched(tmp_path, SWEEP)
  for path in list(tmp_path.glob('arms/*/run.json'))[:4]:
    path.write_text(json.dumps({**json.loads(path.read_text()), 'notices': ['12 records were skipped']}))
  report.publish(tmp_path)
  text = ' '.join(shown(tmp_path / 'report.html').text.split())
  assert '12 records were skipped (4 of 6 arms)' in text


def test_where_a_curve_is_cut_is_said(tmp_path):
  launched(tmp_path, SWEEP)
  for path in tmp_path.glob('arms/*/metrics.jsonl'):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]['loss'] = 9.0
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  report.publish(tmp_path)
  assert 'Loss on held-out text against training tokens; the start above' in shown(tmp_path / 'report.html').text


def test_arms_of_other_text_are_not_compared_and_the_page_says_why(tmp_path):
  launched(tmp_path, SWEEP)
  for path in tmp_path.glob('arms/*/run.json'):
    run = json.loads(path.read_text())
    run['summary']['held_out'] = json.loads((path.parent / 'config.json').read_text())['name']
    path.write_text(json.dumps(run))
  text = report.publish(tmp_path)
  assert 'not compared: evaluated on different held-out text' in text
  assert '+0.0' not in text
  assert 'not compared: evaluated on different held-out text' in shown(tmp_path / 'report.html').text


def test_tokenizers_that_differ_make_bits_per_byte_the_unit_of_everything(tmp_path):
  """350 tokens: fewer nats, but more bits per byte, than 500."""
  launched(tmp_path, SWEEP)
  for path in tmp_path.glob('arms/*/run.json'):
    run, name = json.loads(path.read_text()), json.loads((path.parent / 'config.json').read_text())['name']
    loss = run['summary']['loss']
    nats, bits = (loss, loss + 2.5) if name == 'one' else (loss + 0.9, loss + 2.0)
    run['summary'] |= {'loss': nats, 'bits_per_byte': bits, 'tokenizer': name, 'held_out': 'same', 'bytes': 2500}
    path.write_text(json.dumps(run))
    metrics = [json.loads(line) for line in (path.parent / 'metrics.jsonl').read_text().splitlines()]
    metrics = [{**line, 'bits_per_byte': line['loss'] / 2} for line in metrics]
    (path.parent / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in metrics))
  text = report.publish(tmp_path)
  (row,) = [line for line in text.split('\n') if line.startswith('two')][:1]
  assert '−0.50' in row
  assert 'better' in row
  assert 'arms are compared in bits per byte' in text
  assert 'at equal bytes' in text or 'at equal FLOPs' in text
  assert 'at equal tokens' not in text
  page = shown(tmp_path / 'report.html').text
  assert 'bits per byte' in page
  assert 'difference, nats per token' not in page
  (plots,) = (tmp_path / 'plots').iterdir()
  assert {path.name for path in plots.iterdir()} >= {'loss_bytes.svg', 'training_bytes.svg'}
