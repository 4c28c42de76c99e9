"""The stories' grammar: three readings of the same tables must agree, and no text has two derivations."""

import functools
import math
import random
import re
import statistics
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.data import grammar, stories
from slm_jax.data.grammar import Let, Pick, Say, Text, Use

SAMPLES = list(stories.documents(3000, 'test'))

# Has every kind of item, agreement by number, a variable that stands for another, and rules chosen by a feature.
SMALL = grammar.grammar(
  {
    'start': ['[n=numbers.text] [x=things.n] [move/x.kind].[y:=x] [end]', 'Once [p=people.text] slept.[y:=p] [end]'],
    'move/round': ['rolled', 'spun and [move/x.kind2]'],
    'move/flat': ['slid'],
    'end': ['[y.Text]!', 'So [y.text] and [q=people.text] [n2=numbers.text].'],
  },
  {
    'numbers': [{'text': 'one', 'form': 'text'}, {'text': 'two', 'form': 'many'}],
    'things': [
      {'text': 'ball', 'many': 'balls', 'kind': 'round', 'kind2': 'flat'},
      {'text': 'disc', 'many': 'discs', 'kind': 'flat', 'kind2': 'flat'},
      {'text': 'ballot', 'many': 'ballots', 'kind': 'flat', 'kind2': 'flat'},
    ],
    'people': [{'text': 'anna'}, {'text': 'bo'}, {'text': 'cé'}],
  },
)


def all_derivations(rules: grammar.Grammar) -> list[tuple[str, float]]:
  """Every derivation's text and probability, by brute force."""

  def walk(items, memory, text, p):
    if not items:
      yield text, p
      return
    item, rest = items[0], items[1:]
    if isinstance(item, Text):
      yield from walk(rest, memory, text + item.text, p)
    elif isinstance(item, Say):
      yield from walk(rest, memory, text + grammar.spell(memory, item), p)
    elif isinstance(item, Let):
      yield from walk(rest, {**memory, item.var: item.other}, text, p)
    else:
      n = grammar.width(rules, item, memory)
      weights = [1 / (i + 2) for i in range(n)]
      for i, weight in enumerate(weights):
        first, after = grammar.option(rules, item, memory, i)
        yield from walk(first + rest, after, text, p * weight / sum(weights))

  return list(walk((Use('start', '', ''),), {}, '', 1.0))


def test_small_grammar_by_exhaustion():
  every = all_derivations(SMALL)
  assert math.fsum(p for _, p in every) == pytest.approx(1, abs=1e-12)
  assert len({text for text, _ in every}) == len(every) == 77  # no text twice
  for text, p in every:
    assert grammar.log_prob(SMALL, text) == pytest.approx(math.log(p), abs=1e-12)
  assert grammar.entropy(SMALL) == pytest.approx(-math.fsum(p * math.log(p) for _, p in every), abs=1e-12)
  assert grammar.expected_bytes(SMALL) == pytest.approx(
    math.fsum(p * len(text.encode()) for text, p in every), abs=1e-10
  )


def test_small_grammar_samples_follow_the_probabilities():
  rng, n = random.Random(0), 20_000
  counts = Counter(grammar.sample(SMALL, rng)[0] for _ in range(n))
  expected = dict(all_derivations(SMALL))
  chi2 = sum((counts[text] - n * p) ** 2 / (n * p) for text, p in expected.items())
  assert set(counts) <= set(expected)
  assert chi2 < 76 + 4 * math.sqrt(2 * 76)


def test_an_ambiguous_text_has_the_sum_of_its_derivations():
  twice = grammar.grammar({'start': ['[a] b', '[c]'], 'a': ['a', 'x'], 'c': ['a b', 'y']}, {})
  assert math.exp(grammar.log_prob(twice, 'a b')) == pytest.approx(0.6 * 0.6 + 0.4 * 0.6)
  assert ambiguous(twice) == ['start: 0 and 1']
  assert ambiguous(SMALL) == []


def test_a_malformed_bracket_is_an_error():
  with pytest.raises(ValueError, match=r'\[a-b\]'):
    grammar.production('some [a-b] text')


def test_the_sampler_knows_the_probability_of_what_it_says():
  for text, nats in SAMPLES[:400]:
    assert list(grammar.derivations(stories.GRAMMAR, text)) == [nats]  # one derivation, the same number to the bit
    assert stories.log_prob(text) == -nats


def test_entropy_and_length_are_the_means_of_samples():
  nats = [n for _, n in SAMPLES]
  sizes = [len(text.encode()) for text, _ in SAMPLES]
  for values, exact in ((nats, stories.entropy()), (sizes, stories.expected_bytes())):
    error = statistics.stdev(values) / math.sqrt(len(values))
    assert abs(statistics.mean(values) - exact) < 4 * error
    assert error < 0.01 * exact  # the comparison means something


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 399), st.data())
def test_a_changed_story_is_another_story_or_none(index, data):
  text, nats = SAMPLES[index]
  at = data.draw(st.integers(0, len(text) - 1))
  for other in (text[:at] + text[at + 1 :], text[:at] + data.draw(st.sampled_from('aZ. ')) + text[at:]):
    if other != text:
      assert stories.log_prob(other) == -math.inf


def test_what_was_said_is_remembered():
  text = (
    'One windy day, a daring boy named Sam hurried to the farm. He took along his dog, Ziggy. Sam spotted a red leaf '
    'by the road. But it fell into deep water. After a while, a tall seal splashed in and pushed it back. "Thank '
    'you!" said Sam. Sam held it tight. With messy hair, Sam told Ziggy about the tall seal.'
  )
  assert stories.log_prob(text) > -80
  for old, new in (
    ('about the tall', 'about the kind'),
    ('told Ziggy', 'told Patch'),
    ('But it fell', 'But they fell'),
    ('messy hair', 'wet feet'),
    ('his dog', 'her dog'),
    ('But it fell into deep water', 'But it rolled into a dark hole'),
    ('splashed in', 'dived in'),
  ):
    changed = text.replace(old, new)
    assert changed != text
    assert stories.log_prob(changed) == -math.inf, new


def test_stories_are_the_same_everywhere_and_differ():
  texts = [text for text, _ in stories.documents(200, 'test')]
  assert texts == [text for text, _ in SAMPLES[:200]]
  assert len(set(texts)) == 200
  assert texts[0] == FIRST
  assert len({w for text, _ in SAMPLES for w in re.findall(r'\w+', text)}) > 500
  assert not [text for text, _ in SAMPLES if '  ' in text or re.search(r'\ba [aeiou]', text)]


FIRST = (
  'Once upon a time, there was a little boy named Tom. One sunny evening, he walked to the park. His cat was with him '
  'and was called Luna. There, he saw a blue kite. But he tripped, and it came apart. Tom began to cry. Luckily, an '
  'old toymaker heard the noise. "Do not worry," said the toymaker. The toymaker opened a box of tools and made it as '
  'good as new. Tom held it tight. When the sun went down, Tom and Luna came back to the park once more.'
)


def test_no_rule_and_no_table_is_left_over():
  rules, tables, todo = set(), set(), ['story']
  while todo:
    name = todo.pop()
    rules.add(name)
    for item in (item for production in stories.GRAMMAR.rules[name] for item in production):
      if isinstance(item, Use):
        names = {r for r in stories.GRAMMAR.rules if r.startswith(f'{item.rule}/')} if item.var else {item.rule}
        todo += names - rules
      elif isinstance(item, Pick):
        tables.add(item.table)
  assert rules == set(stories.GRAMMAR.rules)
  assert tables == set(stories.GRAMMAR.tables)


# ------------------------------------------------------------------------------------- proof: a text has one derivation


def ambiguous(rules: grammar.Grammar) -> list[str]:
  """Choices of which two options could begin the same text; none is a proof that every text has one derivation.

  Two options are compared word by word, all words that a variable may ever stand for taken as possible (so a proof may
  fail for a good grammar, but never succeeds for a bad one). They must differ in some word before either ends: then the
  set of texts of every rule is prefix-free, and a reader knows from the text alone which option was taken.
  """
  uses = [i for productions in rules.rules.values() for items in productions for i in items]
  lets = {(i.var, i.other) for i in uses if isinstance(i, Let)}

  def tokens(text):
    return tuple(re.findall(r'\w+|[^\w\s]', text))

  @functools.cache
  def words(var, form):
    names = {var} | {other for v, other in lets if v == var}
    return {w for i in uses if isinstance(i, Pick) and i.var in names for w in listed(i.table, form)}

  @functools.cache
  def listed(table, form):
    forms = {r['form'] for i in uses if isinstance(i, Pick) and i.var == form for r in rules.tables[i.table]} or {form}
    found = [r[f.lower()] for r in rules.tables[table] for f in forms if f.lower() in r]
    return [tokens(w[0].upper() + w[1:] if form[0].isupper() else w) for w in found]

  @functools.cache
  def heads(items):
    """{(first word, what follows)}; a tuple of words may stand among the items."""
    if not items:
      return {(None, ())}
    item, rest = items[0], items[1:]
    if isinstance(item, Let) or item == ():
      return heads(rest)
    if isinstance(item, Text):
      return heads((tokens(item.text), *rest))
    if isinstance(item, Say | Pick):
      said = words(item.var, item.form) if isinstance(item, Say) else listed(item.table, item.form)
      return {head for w in said for head in heads((w, *rest))}
    if isinstance(item, Use):
      name = f'{item.rule}/' if item.var else item.rule
      below = [p for r, ps in rules.rules.items() if (r.startswith(name) if item.var else r == name) for p in ps]
      return {head for p in below for head in heads((*p, *rest))}
    return {(item[0], (item[1:], *rest))}

  @functools.cache
  def clash(a, b):
    first, second = {}, {}
    for table, items in ((first, a), (second, b)):
      for word, rest in heads(items):
        table.setdefault(word, set()).add(rest)
    if None in first or None in second:
      return True  # one ended, and nothing has told them apart
    return any(clash(x, y) for word in first.keys() & second.keys() for x in first[word] for y in second[word])

  found = []
  for name, productions in rules.rules.items():
    pairs = [(i, j) for j in range(len(productions)) for i in range(j)]
    found += [f'{name}: {i} and {j}' for i, j in pairs if clash(productions[i], productions[j])]
    for items in productions:  # the words of two items never run together
      said = [i for i in items if not isinstance(i, Let)]
      ends = [
        (x.text[-1] if isinstance(x, Text) else '', y.text[0] if isinstance(y, Text) else '') for x, y in pairwise(said)
      ]
      found += [f'{name}: {x}{y}' for x, y in ends if x.isalnum() or y.isalnum() or x == y == '']
  for pick in {i for i in uses if isinstance(i, Pick)}:
    said = listed(pick.table, pick.form)
    found += [f'{pick}: {a} {b}' for k, b in enumerate(said) for a in said[:k] if a[: len(b)] == b[: len(a)]]
  return found


def test_no_story_has_two_derivations():
  assert ambiguous(stories.GRAMMAR) == []
