"""`stories`: short children's stories from a probabilistic grammar whose entropy is known exactly.

A story is easy to read and not so easy to predict. To come near the floor a model has to learn words and spelling; the
agreement of number ('three red kites ... they were ... these kites') and of pronouns; which troubles befall which
things, who helps in which trouble and how they go about it; and to remember, over a hundred words, a name, a colour, a
place, the weather, the time of day, a helper, a thief, a pet, and who has the thing in the end.

The language of the tables is explained in grammar.py. All lists stand in falling order of probability.
"""

import functools
import hashlib
import random
import re
from collections.abc import Iterator

from slm_jax.data import grammar
from slm_jax.data.grammar import Record

# ---------------------------------------------------------------------------------------------------------------- words


def _word(text: str, **features: str) -> Record:
  return {'text': text, 'a': f'{"an" if text[0] in "aeiou" else "a"} {text}', **features}


def _list(text: str) -> list[str]:
  return [part.strip() for part in text.split(',')]


def _words(text: str) -> list[Record]:
  return [_word(word) for word in _list(text)]


def _people(pronouns: str, names: str) -> list[Record]:
  return [
    {'name': name, **dict(zip(('they', 'them', 'their'), pronouns.split(), strict=True))} for name in names.split()
  ]


def _things(kind: str, nouns: str) -> list[Record]:
  """'kite, leaf/leaves' -> singular and plural."""
  pairs = [noun.partition('/') for noun in _list(nouns)]
  return [{'one': one, 'many': many or one + 's', 'kind': kind} for one, _, many in pairs]


def _helpers(acts: str) -> list[Record]:
  """'owl: flew up, ...' -> noun, name and what it does."""
  pairs = [act.partition(': ') for act in _list(acts)]
  return [{'noun': noun, 'name': f'the {noun}', 'act': act} for noun, _, act in pairs]


def _places(places: str) -> list[Record]:
  """'into|in: garden, ...' -> into the garden, in the garden, the garden."""
  parts = [re.split(r'\W+', place) for place in _list(places)]
  return [{'to': f'{to} the {noun}', 'at': f'{at} the {noun}', 'name': f'the {noun}'} for to, at, noun in parts]


def _kinds(**words: str) -> list[Record]:
  """One word of each kind in turn."""
  rows = zip(*(text.split() for text in words.values()), strict=True)
  return [_word(word, kind=kind) for row in rows for kind, word in zip(words, row, strict=True)]


_MANY = {'form': 'many', 'it': 'they', 'them': 'them', 'was': 'were', 'is': 'are', 'this': 'these', 'what': 'what'}

TABLES: dict[str, list[Record]] = {
  'girls': _people(
    'she her her',
    'Lily Mia Anna Zoe Ella Rose Lucy Nora Ruby Clara Ivy Maya Sara Hana Leila Wren Amara Greta Ines Yuki',
  ),
  'boys': _people(
    'he him his',
    'Tom Ben Max Sam Leo Jack Tim Noah Finn Omar Hugo Theo Raj Kofi Emil Yusuf Oscar Bruno Diego Ravi',
  ),
  'beasts': _words('rabbit, mouse, bear, kitten, hedgehog, lamb, piglet, turtle'),
  'cubs': _people('she her her', 'Poppy Dot Bun Honey Clover Minnow Pearl')
  + _people('he him his', 'Pip Moss Nibble Toffee Bramble Acorn Tuft'),
  'pets': _words('dog, cat, pony, parrot, goat, hamster, donkey'),
  'petnames': _people('he him his', 'Biscuit Patch Rusty Shadow Button Pepper Ziggy')
  + _people('she her her', 'Daisy Bella Coco Socks Luna Hazel Truffle'),
  'traits': _kinds(
    bold='brave cheerful bold strong proud lively daring noisy',
    shy='little shy small quiet young gentle timid sleepy',
    calm='clever kind wise patient careful curious polite eager',
  ),
  'skies': _kinds(
    sun='sunny bright warm golden',
    rain='rainy wet stormy grey',
    wind='windy breezy cool wild',
    snow='snowy cold frosty icy',
  ),
  'hours': [
    {'text': 'morning', 'meal': 'lunch'},
    {'text': 'day', 'meal': 'supper'},
    {'text': 'afternoon', 'meal': 'tea'},
    {'text': 'evening', 'meal': 'bed'},
  ],
  'places': _places(
    'to|in: park, into|in: garden, to|by: lake, into|in: forest, to|on: beach, to|at: farm, to|by: river, up|on: hill, '
    'to|in: meadow, to|at: market, to|in: orchard, to|by: pond, into|in: village, to|at: castle, to|on: bridge, '
    'to|at: harbour, into|in: valley, to|at: mill, to|in: playground, to|by: waterfall'
  ),
  'numbers': [
    {'text': 'a', 'form': 'one', 'it': 'it', 'them': 'it', 'was': 'was', 'is': 'is', 'this': 'this', 'what': 'what a'},
    {'text': 'two', **_MANY},
    {'text': 'three', **_MANY},
  ],
  'colours': _words(
    'red, blue, yellow, green, white, pink, brown, golden, purple, black, silver, striped, grey, shiny, spotted, '
    'rainbow, wooden, tiny, velvet, painted'
  ),
  'rolling': _things('roll', 'ball, marble, wheel, hoop, walnut, barrel, drum, skittle'),
  'flying': _things('fly', 'kite, balloon, paper plane, feather, ribbon, flag, lantern, paper bird'),
  'soft': _things('soft', 'doll, scarf/scarves, blanket, teddy bear, mitten, puppet, pillow, jacket'),
  'shiny': _things('shine', 'key, ring, coin, shell, bell, whistle, necklace, spoon'),
  'floating': _things('float', 'toy boat, rubber duck, raft, leaf/leaves, paper ship, cork, basket, canoe'),
  'food': _things('food', 'cake, apple, pear, cookie, peach/peaches, muffin, plum, pancake'),
  'climbers': _helpers(
    'squirrel: climbed up, bird: flew up, monkey: swung up, owl: glided up, giraffe: reached up, crow: flapped up, '
    'fireman: used a ladder, bat: fluttered up'
  ),
  'swimmers': _helpers(
    'duck: paddled out, frog: hopped in, otter: swam out, beaver: dived in, swan: sailed out, fisherman: rowed out, '
    'seal: splashed in, heron: waded in'
  ),
  'diggers': _helpers(
    'rabbit: jumped inside, mole: dug down, mouse: squeezed inside, badger: dug deep, snake: slid down, '
    'ant: crawled in, gardener: fetched a spade, lizard: slipped in'
  ),
  'menders': _helpers(
    'tailor: took a needle, carpenter: took a hammer, spider: spun a thread, baker: mixed some paste, '
    'toymaker: opened a box of tools, grandmother: found some glue, sailor: tied a knot, wizard: said a magic word'
  ),
  'chasers': _helpers(
    'pony: galloped, dog: ran, hare: raced, goose: flapped, policeman: hurried, knight: rode, '
    'postman: cycled, cow: trotted'
  ),
  'finders': _helpers(
    'puppy: sniffed around, cat: looked everywhere, hen: scratched the ground, farmer: lit a lamp, '
    'bee: flew in circles, fairy: waved a wand, pig: rooted about, teacher: put on her glasses'
  ),
  'guests': _helpers('old man: ate, fox: ate, bear: ate, kitten: ate, beggar: ate, sparrow: ate'),
  'thieves': _words('fox, magpie, goat, raccoon, raven, wolf, pirate, weasel'),
  'slies': _words('naughty, sly, greedy, sneaky, bad, wicked'),
  'ways': _words(
    'kind, friendly, wise, old, tiny, big, gentle, funny, tall, busy, merry, plump, lazy, helpful, young, quick'
  ),
}

# -------------------------------------------------------------------------------------------------------------- stories


def _trouble(name: str, helpers: str, deed: str, how: list[str], thanks: str = 'thanks') -> dict[str, list[str]]:
  """A misfortune, how the hero takes it, and the helper who knows what to do about it."""
  helper = f'[then] [way=ways.a] [helper={helpers}.noun]'
  return {
    name: [f'[{name}_how] [{name}_help]', f'[{name}_how] [plea/trait.kind] [{name}_help]'],
    f'{name}_how': how,
    f'{name}_help': [
      f'{helper} [helper.act] {deed}. [{thanks}]',
      f'{helper} [came]. [offer] [helper.Name] [helper.act] {deed}.',
    ],
  }


RULES = {
  'story': [
    '[start] [find] [joy] [trouble/thing.kind] [fate] [lead/sky.kind] [last]',
    '[start] [company] [find] [trouble/thing.kind] [fate_pal] [lead/sky.kind] [last_pal]',
    '[start] [find] [play/thing.kind] [fate_alone] [lead/sky.kind] [last_alone]',
  ],
  # who, when, where
  'start': [
    'One [sky=skies.text] [hour=hours.text], [trait=traits.a] [person] [went] [place=places.to].',
    'Once upon a time, there was [trait=traits.a] [person]. One [sky=skies.text] [hour=hours.text], [hero.they] '
    '[went] [place=places.to].',
    'It was [sky=skies.a] [hour=hours.text], and [trait=traits.a] [person] [went] [place=places.to].',
  ],
  'person': [
    'girl named [hero=girls.name]',
    'boy named [hero=boys.name]',
    '[beast=beasts.text] named [hero=cubs.name]',
  ],
  'went': _list('went, walked, ran, hurried, skipped, wandered, raced, marched'),
  'company': [
    '[hero.Their] [pet=pets.text], [pal=petnames.name], came too.',
    '[hero.Their] [pet=pets.text] was with [hero.them] and was called [pal=petnames.name].',
    '[hero.They] took along [hero.their] [pet=pets.text], [pal=petnames.name].',
  ],
  # a thing
  'find': [
    '[hero.Name] [saw] [prize] [spot].',
    '[there], [hero.they] [saw] [prize].',
    'Soon [hero.they] [saw] [prize] [spot].',
    'An old woman gave [hero.them] [prize].',
    'It was [hero.their] birthday, and [hero.they] had got [prize].',
  ],
  'saw': _list('found, saw, spotted, picked up, discovered, noticed'),
  'spot': _list(
    'under a bench, near the gate, behind a wall, next to a tree, in the grass, on a rock, in an empty box, by the road'
  ),
  'there': _list('There, On the way, Along the path, In a corner'),
  'prize': ['[n=numbers.text] [colour=colours.text] [object]'],
  'object': [
    '[thing=rolling.n]',
    '[thing=flying.n]',
    '[thing=soft.n]',
    '[thing=shiny.n]',
    '[thing=floating.n]',
    '[thing=food.n]',
  ],
  'joy': [
    '[hero.They] [smiled].',
    '"[n.What] [nice] [thing.n]!" [hero.they] said.',
    '"[n.This] [thing.n] [n.is] [nice]," said [hero.name].',
    '[hero.Name] had never seen such [nice] things.',
  ],
  'smiled': _list('smiled, was very happy, laughed, clapped, jumped for joy, danced around, cheered, sang a song'),
  'nice': _list('nice, pretty, lovely, beautiful, wonderful, funny, fine, splendid'),
  'play/fly': ['[hero.They] let [n.them] [fly] in the wind.'],
  'play/float': ['[hero.They] set [n.them] on the water.', '[hero.They] watched [n.them] drift along.'],
  'play/roll': ['[hero.They] rolled [n.them] down the path.', '[hero.They] kicked [n.them] around.'],
  'play/shine': ['[hero.They] held [n.them] up to the light.', '[hero.They] rubbed [n.them] until [n.it] shone.'],
  'play/soft': ['[hero.They] hugged [n.them] tight.', '[hero.They] played with [n.them] for hours.'],
  'play/food': ['[hero.They] took a big bite.', '[hero.They] smelled [n.them] and felt hungry.'],
  'fly': _list('fly, dance, sail, spin'),
  # trouble, and help
  'trouble/fly': ['[high]', '[broken]', '[stolen]'],
  'trouble/float': ['[adrift]', '[broken]', '[stolen]'],
  'trouble/roll': ['[fallen]', '[adrift]', '[high]'],
  'trouble/shine': ['[stolen]', '[lost]', '[fallen]'],
  'trouble/soft': ['[broken]', '[lost]', '[stolen]'],
  'trouble/food': ['[shared]', '[stolen]', '[lost]'],
  **_trouble(
    'high',
    'climbers',
    'and brought [n.them] down',
    [
      'But a gust of wind blew [n.them] into a tree.',
      'But then [n.it] got stuck on a high roof.',
      'But [n.it] landed on top of a tower.',
    ],
  ),
  **_trouble(
    'adrift',
    'swimmers',
    'and pushed [n.them] back',
    ['But [n.it] fell into deep water.', 'But a wave carried [n.them] away.'],
  ),
  **_trouble(
    'fallen',
    'diggers',
    'and got [n.them] out',
    ['But [n.it] rolled into a dark hole.', 'But [n.it] slipped between two big stones.'],
  ),
  **_trouble(
    'broken',
    'menders',
    'and made [n.them] as good as new',
    ['But all at once [n.it] tore in two.', 'But [hero.they] tripped, and [n.it] came apart.'],
  ),
  **_trouble(
    'stolen',
    'chasers',
    'after the [sly.text] [thief.text] and got [n.them] back',
    [
      'Suddenly, [sly=slies.a] [thief=thieves.text] took [n.them] and ran off.',
      'But [sly=slies.a] [thief=thieves.text] wanted [n.them] too, and stole [n.them].',
    ],
    thanks='sorry',
  ),
  **_trouble(
    'lost',
    'finders',
    'and found [n.them]',
    [
      'But [hero.they] dropped [n.them], and the [colour.text] [thing.n] [n.was] gone.',
      'But when [hero.they] looked again, [n.it] [n.was] not there.',
    ],
  ),
  'shared': [
    'Then [hero.they] met [way=ways.a] [helper=guests.noun]. [asks] [hero.Name] shared the [colour.text] [thing.n].'
  ],
  'asks': ['"I am so hungry," said [helper.name].', '"May I have some?" asked [helper.name].'],
  'plea/bold': [
    '"I will get [n.them] back!" said [hero.name].',
    '[hero.Name] tried and tried again.',
    '[hero.Name] was not afraid.',
  ],
  'plea/shy': ['[hero.Name] began to cry.', '"Oh no," whispered [hero.name].', '[hero.Name] was very sad.'],
  'plea/calm': [
    '[hero.Name] sat down to think.',
    '"There must be a way," said [hero.name].',
    '[hero.Name] looked for help.',
  ],
  'then': ['Just then,', 'Luckily,', 'After a while,', 'In the end,', 'Before long,'],
  'came': _list('came by, heard the noise, passed by, appeared, looked up, stopped'),
  'offer': [
    '"Can you help me?" asked [hero.name].',
    '"Do not worry," said [helper.name].',
    '"I have lost my [thing.n]," said [hero.name].',
    '"I can help you, [hero.name]," [helper.name] said.',
    '"What is the matter?" asked [helper.name].',
  ],
  'thanks': [
    '"Thank you!" said [hero.name].',
    '[hero.Name] hugged [helper.name].',
    '"You are so [nice]," said [hero.name].',
    '[hero.They] thanked the [way.text] [helper.noun].',
  ],
  'sorry': ['[thanks]', '"I am sorry," said the [sly.text] [thief.text].', 'The [thief.text] felt bad.'],
  # who has it in the end
  'fate': [
    '[hero.Name] gave the [colour.text] [thing.n] to [helper.name].[owner:=helper]',
    '[hero.Name] put [n.them] in [hero.their] bag.[owner:=hero]',
    '[hero.Name] and [helper.name] played together.[owner:=hero]',
    '[helper.Name] asked for [n.them], and got [n.them].[owner:=helper]',
  ],
  'fate_pal': [
    '[hero.Name] gave the [colour.text] [thing.n] to [helper.name].[owner:=helper]',
    '[pal.Name] got the [colour.text] [thing.n] as a present.[owner:=pal]',
    '[hero.Name] held [n.them] tight.[owner:=hero]',
    '[helper.Name] asked for [n.them], and got [n.them].[owner:=helper]',
  ],
  'fate_alone': [
    '[hero.Name] played until [hero.they] was tired.',
    'It was a very good [hour.text].',
    'A friend wanted to see the [colour.text] [thing.n] too.',
  ],
  # home
  'lead/sun': ['When the sun went down,', 'When it got dark,'],
  'lead/rain': ['When the rain stopped,', 'With wet feet,'],
  'lead/wind': ['When the wind died down,', 'With messy hair,'],
  'lead/snow': ['When the snow melted,', 'With cold hands,'],
  'last': [
    '[hero.name] went home for [hour.meal], and [owner.name] still had the [colour.text] [thing.n].',
    '[owner.name] kept the [thing.n] safe [place.at].',
    '[hero.name] said goodbye to the [way.text] [helper.noun].',
    '[owner.name] and the [colour.text] [thing.n] were never far from [place.name].',
    '[hero.name] came back [place.to] to see the [way.text] [helper.noun].',
  ],
  'last_pal': [
    '[hero.name] and [pal.name] went home for [hour.meal], and [owner.name] still had the [colour.text] [thing.n].',
    '[owner.name] kept the [thing.n] safe [place.at].',
    '[pal.name] the [pet.text] ran home, and [hero.name] ran after [pal.them].',
    '[hero.name] told [pal.name] about the [way.text] [helper.noun].',
    '[hero.name] and [pal.name] came back [place.to] once more.',
  ],
  'last_alone': [
    '[hero.name] went home for [hour.meal].',
    '[hero.name] took the [colour.text] [thing.n] home from [place.name].',
    '[hero.name] dreamed of [place.name] and the [colour.text] [thing.n].',
  ],
}

GRAMMAR = grammar.grammar(RULES, TABLES)


def story(rng: random.Random) -> tuple[str, float]:
  """A story and its exact -log p in nats."""
  return grammar.sample(GRAMMAR, rng)


def documents(n: int, seed: str) -> Iterator[tuple[str, float]]:
  """`n` independent stories with their nats; the same for the same seed, on every machine."""
  rng = random.Random(seed)
  return (story(rng) for _ in range(n))


def log_prob(text: str) -> float:
  """log p(text) in nats, by parsing; -inf for a text that is no story."""
  return grammar.log_prob(GRAMMAR, text)


@functools.cache
def entropy() -> float:
  """Exact entropy of a story in nats; the floor under any model's expected -log p of a document."""
  return grammar.entropy(GRAMMAR)


@functools.cache
def expected_bytes() -> float:
  """Exact expected length of a story in bytes."""
  return grammar.expected_bytes(GRAMMAR)


def fingerprint() -> str:
  """Changes when the grammar does."""
  return hashlib.sha256(repr((GRAMMAR, [text for text, _ in documents(3, 'fingerprint')])).encode()).hexdigest()
