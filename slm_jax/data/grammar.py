"""A probabilistic grammar with a memory, and three readings of it: sample a text, score a text, expect a number.

Productions are strings. What stands in brackets is

    [rule]              one of the productions of `rule`
    [rule/var.feature]  the same, of the rule named 'rule/VALUE', where VALUE is that feature of what `var` holds
    [var=table.form]    one of the records of `table`, kept in `var`; its form is printed
    [var.form]          a form of what `var` holds; [var.Form] prints it capitalised; if `form` names a variable, that
                        one's feature 'form' says which form (agreement of number)
    [var:=other]        lets `var` stand for what `other` holds; prints nothing

Every list stands in falling order of probability, p_i proportional to 1 / (i + 2) for i = 0, 1, ...: a flattened Zipf's
law, so the tables hold no numbers. There is no recursion: the number of derivations is finite.

A derivation is a sequence of choices, so log p(derivation) is a sum over choices, and the entropy is the expected sum
of the choices' own entropies (the chain rule). If a text has one derivation only (an unambiguous grammar), both are
those of the text. The expectation needs no sampling: one pass over the grammar carries the exact distribution of the
few features on which later choices depend.
"""

import bisect
import functools
import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple


class Text(NamedTuple):
  text: str


class Say(NamedTuple):
  var: str
  form: str


class Pick(NamedTuple):
  var: str
  table: str
  form: str


class Use(NamedTuple):
  rule: str
  var: str  # '': the rule itself
  feature: str


class Let(NamedTuple):
  var: str
  other: str


Item = Text | Say | Pick | Use | Let
Production = tuple[Item, ...]
Record = Mapping[str, str]  # form or feature -> what is printed or looked up
Memory = Mapping[str, 'Record | str']  # variable -> what it holds, or the name of the variable it stands for


class Grammar(NamedTuple):
  rules: Mapping[str, tuple[Production, ...]]
  tables: Mapping[str, tuple[Record, ...]]


def grammar(rules: Mapping[str, list[str]], tables: Mapping[str, list[Record]]) -> Grammar:
  """Reads the productions. The first rule is the start."""
  return Grammar(
    {name: tuple(map(production, texts)) for name, texts in rules.items()},
    {name: tuple(records) for name, records in tables.items()},
  )


_PATTERNS = (
  (re.compile(r'(\w+)=(\w+)\.(\w+)'), Pick),
  (re.compile(r'(\w+):=(\w+)'), Let),
  (re.compile(r'(\w+)/(\w+)\.(\w+)'), Use),
  (re.compile(r'(\w+)\.(\w+)'), Say),
  (re.compile(r'(\w+)()()'), Use),
)


def production(text: str) -> Production:
  """Reads one production; ValueError if a bracket holds none of the five kinds of item."""
  items: list[Item] = []
  for plain, bracket in re.findall(r'([^\[]+)|\[([^\]]*)\]', text):
    if plain:
      items.append(Text(plain))
      continue
    match = next(((kind, m) for pattern, kind in _PATTERNS if (m := pattern.fullmatch(bracket))), None)
    if match is None:
      raise ValueError(f'[{bracket}] in {text!r} is not an item')
    items.append(match[0](*match[1].groups()))
  return tuple(items)


# --------------------------------------------------------------------------------------------------- one item at a time


class Zipf(NamedTuple):
  """p_i = (1 / (i + 2)) / sum_j 1 / (j + 2) for i < n."""

  probs: tuple[float, ...]
  nats: tuple[float, ...]  # -log p_i
  cumulative: tuple[float, ...]
  entropy: float


@functools.cache
def zipf(n: int) -> Zipf:
  total = math.fsum(1 / (i + 2) for i in range(n))
  probs = tuple(1 / (i + 2) / total for i in range(n))
  nats = tuple(math.log(i + 2) + math.log(total) for i in range(n)) if n > 1 else (0.0,)
  return Zipf(
    probs, nats, tuple(itertools.accumulate(probs)), math.fsum(p * x for p, x in zip(probs, nats, strict=True))
  )


def held(memory: Memory, var: str) -> Record:
  """What `var` holds, or the variable for which it stands."""
  record = memory[var]
  return held(memory, record) if isinstance(record, str) else record


def lookup(memory: Memory, say: Say) -> str:
  """The entry that [var.form] names, not yet capitalised."""
  form = held(memory, say.form)['form'] if say.form in memory else say.form
  return held(memory, say.var)[form.lower()]


def spell(memory: Memory, say: Say) -> str:
  """What [var.form] prints."""
  word = lookup(memory, say)
  return word[0].upper() + word[1:] if say.form[0].isupper() else word


def width(grammar: Grammar, item: Pick | Use, memory: Memory) -> int:
  """Number of options of a choice."""
  return len(grammar.tables[item.table] if isinstance(item, Pick) else _rule(grammar, item, memory))


def option(grammar: Grammar, item: Pick | Use, memory: Memory, i: int) -> tuple[Production, Memory]:
  """Option i of a choice: what to go on with, and the memory after it."""
  if isinstance(item, Use):
    return _rule(grammar, item, memory)[i], memory
  return (Say(item.var, item.form),), {**memory, item.var: grammar.tables[item.table][i]}


def _rule(grammar: Grammar, item: Use, memory: Memory) -> tuple[Production, ...]:
  name = f'{item.rule}/{held(memory, item.var)[item.feature]}' if item.var else item.rule
  return grammar.rules[name]


def _start(grammar: Grammar) -> Production:
  return (Use(next(iter(grammar.rules)), '', ''),)


# ------------------------------------------------------------------------------------------------ sampling and scoring


def sample(grammar: Grammar, rng: random.Random) -> tuple[str, float]:
  """A text and its -log p in nats."""
  words: list[str] = []
  nats: list[float] = []

  def walk(items: Production, memory: Memory) -> Memory:
    for item in items:
      if isinstance(item, Text):
        words.append(item.text)
      elif isinstance(item, Say):
        words.append(spell(memory, item))
      elif isinstance(item, Let):
        memory = {**memory, item.var: item.other}
      else:
        law = zipf(width(grammar, item, memory))
        i = min(bisect.bisect(law.cumulative, rng.random()), len(law.probs) - 1)
        nats.append(law.nats[i])
        memory = walk(*option(grammar, item, memory, i))
    return memory

  walk(_start(grammar), {})
  return ''.join(words), math.fsum(nats)


def derivations(grammar: Grammar, text: str) -> Iterator[float]:
  """-log p of every derivation of the text: none if it is not the grammar's, one if the grammar is unambiguous."""

  def walk(items: Production, memory: Memory, at: int, nats: tuple[float, ...]) -> Iterator[float]:
    for k, item in enumerate(items):
      if isinstance(item, Let):
        memory = {**memory, item.var: item.other}
      elif isinstance(item, (Text, Say)):
        word = item.text if isinstance(item, Text) else spell(memory, item)
        if not text.startswith(word, at):
          return
        at += len(word)
      else:
        for i, cost in enumerate(zipf(width(grammar, item, memory)).nats):
          first, after = option(grammar, item, memory, i)
          yield from walk(first + items[k + 1 :], after, at, (*nats, cost))
        return
    if at == len(text):
      yield math.fsum(nats)

  return walk(_start(grammar), {}, 0, ())


def log_prob(grammar: Grammar, text: str) -> float:
  """log p(text) in nats: the log-sum over its derivations; -inf for a text outside the grammar."""
  nats = list(derivations(grammar, text))
  if not nats:
    return -math.inf
  least = min(nats)
  return math.log(math.fsum(math.exp(least - x) for x in nats)) - least if len(nats) > 1 else -least


# ------------------------------------------------------------------------------------------------- exact expectations


def entropy(grammar: Grammar) -> float:
  """Exact entropy of a derivation, in nats."""

  def cost(item: Item, memory: Memory) -> float:
    return zipf(width(grammar, item, memory)).entropy if isinstance(item, Pick | Use) else 0.0

  return _expect(grammar, cost, lengths=False)


def expected_bytes(grammar: Grammar) -> float:
  """Exact expected length of a text, in UTF-8 bytes."""

  def cost(item: Item, memory: Memory) -> float:
    entry = item.text if isinstance(item, Text) else lookup(memory, item) if isinstance(item, Say) else ''
    return len(entry.encode()) if isinstance(entry, str) else entry

  return _expect(grammar, cost, lengths=True)


Outcome = tuple[float, list[tuple[Memory, float]]]  # expected cost; what is remembered anew, with which probability
States = dict[frozenset, tuple[Memory, float]]


def _expect(grammar: Grammar, cost: Callable[[Item, Memory], float], lengths: bool) -> float:
  """The exact expectation of the sum of `cost(item, memory)` over the items of a derivation.

  What follows depends on a record only by its features (those in [rule/var.feature], and 'form'). So records of equal
  features are merged; what is no feature is forgotten or, if `lengths`, replaced by its mean length in bytes, which is
  exact too, being the conditional expectation. An item's outcome depends only on the variables that are read at or
  below it, and is computed once for each state of those.
  """
  features, reads = _dependencies(grammar)
  known: dict[tuple[Item, frozenset], Outcome] = {}
  same: dict[tuple, Record] = {}  # equal records are one object, so that memories can be compared by identity

  @functools.cache
  def classes(pick: Pick) -> list[tuple[Record, float]]:
    merged = _merge(grammar.tables[pick.table], features[pick.var], lengths)
    return [(same.setdefault(tuple(record.items()), record), p) for record, p in merged]

  def outcome(item: Item, memory: Memory) -> Outcome:
    given = {var: memory[var] for var in reads[item] if var in memory}
    key = (item, _key(given))
    if key not in known:
      known[key] = compute(item, given)
    return known[key]

  def compute(item: Item, given: Memory) -> Outcome:
    total = cost(item, given)
    ends: States = {}
    if isinstance(item, Pick):
      for record, p in classes(item):
        total += p * cost(Say(item.var, item.form), {**given, item.var: record})
        _add(ends, {item.var: record}, p)
    elif isinstance(item, Use):
      for i, p in enumerate(zipf(width(grammar, item, given)).probs):
        more, news = run(option(grammar, item, given, i)[0], given)
        total += p * more
        for new, q in news:
          _add(ends, new, p * q)
    else:
      _add(ends, {item.var: item.other} if isinstance(item, Let) else {}, 1.0)
    return total, list(ends.values())

  def run(items: Production, given: Memory) -> Outcome:
    total = 0.0
    states: list[tuple[Memory, float]] = [({}, 1.0)]
    for item in items:
      ends: States = {}
      for memory, p in states:
        more, news = outcome(item, {**given, **memory})
        total += p * more
        for new, q in news:
          _add(ends, {**memory, **new}, p * q)
      states = list(ends.values())
    return total, states

  return run(_start(grammar), {})[0]


def _merge(records: tuple[Record, ...], features: set[str], lengths: bool) -> list[tuple[dict, float]]:
  """The records of a table merged by their features, each with its probability."""
  groups: dict = {}
  for record, p in zip(records, zipf(len(records)).probs, strict=True):
    groups.setdefault(tuple(record[f] for f in sorted(features)), []).append((record, p))
  merged = []
  for group in groups.values():
    share, first = math.fsum(p for _, p in group), group[0][0]
    means = {f: math.fsum(p * len(record[f].encode()) for record, p in group) / share for f in first if lengths}
    merged.append((means | {f: first[f] for f in sorted(features)}, share))
  return merged


def _add(states: States, memory: Memory, p: float) -> None:
  """Adds p to the memory's probability."""
  key = _key(memory)
  states[key] = (memory, states[key][1] + p if key in states else p)


def _key(memory: Memory) -> frozenset:
  return frozenset((var, id(entry)) for var, entry in memory.items())


def _dependencies(grammar: Grammar) -> tuple[dict[str, set[str]], dict[Item, set[str]]]:
  """Variable -> its features, on which a choice or a form depends; item -> the variables read at or below it."""
  items = {item for productions in grammar.rules.values() for items in productions for item in items}
  items |= {*_start(grammar)}
  features: dict[str, set[str]] = {item.var: set() for item in items if isinstance(item, Pick | Let)}
  reads: dict[Item, set[str]] = {item: set() for item in items}
  for item in items:
    if isinstance(item, Use) and item.var:
      features[item.var].add(item.feature)
      reads[item].add(item.var)
    elif isinstance(item, Say | Pick):
      reads[item] |= {item.var, item.form} & features.keys()
      if item.form in features:
        features[item.form].add('form')
  lets = [item for item in items if isinstance(item, Let)]
  below = {
    item: {part for name, productions in grammar.rules.items() if _names(item, name) for p in productions for part in p}
    for item in items
  }
  for _ in range(len(grammar.rules)):  # as deep as rules can be nested
    for item in items:
      reads[item].update(*(reads[part] for part in below[item]))
      reads[item] |= {let.other for let in lets if let.var in reads[item]}
    for let in lets:  # what is a feature of a variable is one of those it may stand for
      features[let.other] |= features[let.var]
  return features, reads


def _names(item: Item, rule: str) -> bool:
  return isinstance(item, Use) and (rule.startswith(f'{item.rule}/') if item.var else rule == item.rule)
