"""What a compiled program moves: the collectives and the memory traffic of its HLO text, loops multiplied out.

XLA's own cost analysis counts the body of a loop once and knows no memory space; here a body counts as often as its
condition's constant says, and what lives in a TPU's VMEM (`S(1)` in a layout) costs no HBM bandwidth. Sizes are those
of the shapes, without the padding of tiles: bounds from below.
"""

import collections
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
FREE = (
  *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id', 'replica-id'),
  *('opt-barrier', 'iota', 'copy-done', 'async-done', 'async-update', 'slice-done', 'send-done', 'recv-done'),
)
BYTES = {'pred': 1, 'bf16': 2} | {f'{kind}{bits}': bits / 8 for kind in 'suf' for bits in (2, 4, 8, 16, 32, 64)}

_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$')
_LINE = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$')
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\](\{[^}]*\})?')
_CALLED = re.compile(
  r'(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%[\w.\-]+)'
)
_CROSSING = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_BETWEEN_SLICES = {
  'ALL_REDUCE': 'all-reduce',
  'ALL_GATHER': 'all-gather',
  'REDUCE_SCATTER': 'reduce-scatter',
  'ALL_TO_ALL': 'all-to-all',
  'ONE_TO_ONE': 'collective-permute',
}


class Instruction(NamedTuple):
  name: str
  shape: str
  opcode: str
  given: str  # between its brackets: operands, the number of a parameter, a constant
  rest: str  # what follows them

  @property
  def operands(self) -> list[str]:
    return re.findall(r'%([\w.\-]+)', self.given)


Computation = dict[str, Instruction]


class Collective(NamedTuple):
  """Of one kind, group and place."""

  kind: str
  group: int  # devices that take part together
  slices: int  # that a group spans
  times: int  # a step
  bytes: float  # a step and a chip: the whole array, gathered or before it is scattered

  @property
  def sent(self) -> tuple[float, float]:
    """Bytes that a chip sends at least: (over ICI, over the data-centre network), by rings, slices joined last.

    all-reduce 2 (n-1)/n, all-gather, reduce-scatter and all-to-all (n-1)/n, a permutation 1 of the array.
    """
    inside = self.group // self.slices
    twice = 2 if self.kind == 'all-reduce' else 1
    if self.kind == 'collective-permute':
      return (self.bytes, 0.0) if self.slices == 1 else (0.0, self.bytes)
    over_ici = twice * self.bytes * (inside - 1) / inside
    return over_ici, twice * self.bytes / inside * (self.slices - 1) / self.slices


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """`({name: computation}, name of the entry)` of a compiled module's text."""
  found: dict[str, Computation] = {}
  entry, current = '', None
  for line in text.splitlines():
    if head := _HEAD.match(line):
      current = found.setdefault(head[2], {})
      entry = head[2] if head[1] else entry
    elif line == '}':  # a kernel's metadata has lines that begin with one
      current = None
    elif current is not None and (match := _LINE.match(line)):
      current[match[1]] = _instruction(match[1], match[2])
  return found, entry


def _instruction(name: str, text: str) -> Instruction:
  shape, rest = _split(text) if text.startswith('(') else text.split(' ', 1)
  opcode, _, rest = rest.strip().partition('(')
  given, rest = _split('(' + rest)
  return Instruction(name, shape, opcode, given[1:-1], rest)


def _split(text: str) -> tuple[str, str]:
  """A text that begins with a bracket, cut behind the one that closes it."""
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == '(') - (letter == ')')
    if depth == 0:
      return text[: i + 1], text[i + 1 :]
  return text, ''


def size(shape: str, in_hbm: bool = False) -> float:
  """Bytes of a shape, tuples too; in_hbm: of what is not in another memory space."""
  return sum(
    BYTES.get(kind, 0) * math.prod(int(d) for d in dims.split(',') if d)
    for kind, dims, layout in _ARRAY.findall(shape)
    if not (in_hbm and 'S(' in layout)
  )


def _called(instruction: Instruction) -> list[str]:
  return [name for group in _CALLED.findall(instruction.rest) for name in re.findall(r'%([\w.\-]+)', group)]


def _trips(computations: Mapping[str, Computation], loop: Instruction) -> int:
  """How often a loop runs: `known_trip_count`, or the constant that its counter stays below; 1 if neither is there."""
  if known := re.search(r'known_trip_count\D*(\d+)', loop.rest):
    return int(known[1])
  condition = re.search(r'condition=%([\w.\-]+)', loop.rest)
  inside = computations[condition[1]].values() if condition else ()
  limits = [i.given for i in inside if i.opcode == 'constant' and i.shape.startswith(('s32[]', 'u32[]'))]
  return max((int(limit) for limit in limits if limit.isdigit()), default=1)


def _walk(computations: Mapping[str, Computation], name: str, times: int = 1) -> Iterator[tuple[str, Instruction, int]]:
  """`(computation, instruction, how often it runs)` of all that is scheduled, not of what is inside of fusions."""
  for instruction in computations[name].values():
    yield name, instruction, times
    if instruction.opcode == 'while':
      body = re.search(r'body=%([\w.\-]+)', instruction.rest)
      if body:
        yield from _walk(computations, body[1], times * _trips(computations, instruction))
    elif instruction.opcode in ('call', 'conditional', 'async-start'):
      for called in _called(instruction):
        yield from _walk(computations, called, times)


# ------------------------------------------------------------------------------------------------------- collectives


def collectives(text: str, devices: int, slices: int = 1) -> list[Collective]:
  """Those of a step, by kind, group and place, the most bytes first. One that is split into parts counts once.

  Of several slices, the program is that of one, with groups inside of it; what crosses is handed to the host (`send`).
  """
  computations, entry = parse(text)
  seen: dict[tuple[str, ...], tuple[Instruction, bool, int]] = {}
  for _, outer, times in _walk(computations, entry):
    called = _called(outer) if outer.opcode == 'fusion' else []
    # Such a fusion keeps a slice of the sum, and sends no more than that needs.
    scattered = any(name.startswith('all-reduce-scatter') for name in called)
    for instruction in (outer, *(i for name in called for i in computations[name].values())):
      if instruction.opcode.removesuffix('-start') in COLLECTIVES or instruction.opcode == 'send':
        channel = re.search(r'channel_id=(\d+)', instruction.rest)
        # Start, middle and end of one that is split up share a channel, and what they make.
        made = re.sub(r'\{[^}]*\}', '', instruction.shape)
        one = (instruction.opcode, channel[1], made) if channel else (instruction.name,)
        before = seen[one][2] if one in seen else 0
        seen[one] = (instruction, scattered, max(times, before))
  found: dict[tuple[str, int, int], list[float]] = collections.defaultdict(lambda: [0, 0.0])
  for instruction, scattered, times in seen.values():
    key, whole = _what(instruction, devices // slices, slices)
    key = ('reduce-scatter', *key[1:]) if scattered else key
    found[key][0] += times
    found[key][1] += times * whole
  all_of = [Collective(*key, int(count), total) for key, (count, total) in found.items() if key[1] > 1 and total]
  return sorted(all_of, key=lambda c: -c.bytes)


def _what(instruction: Instruction, devices: int, slices: int) -> tuple[tuple[str, int, int], float]:
  """`((kind, group, slices), bytes of the array before it is scattered or after it is gathered)`."""
  if instruction.opcode == 'send':
    crossing, part = _CROSSING.search(instruction.rest), _ARRAY.search(instruction.shape)
    kind = _BETWEEN_SLICES.get(crossing[1], crossing[1].lower()) if crossing else 'send'
    whole = size(part[0]) if part else 0.0
    return (kind, slices, slices), whole * (slices if kind == 'all-gather' else 1)
  kind, group = instruction.opcode.removesuffix('-start'), len(_first_group(instruction.rest, devices))
  whole = size(instruction.shape)
  if instruction.opcode.endswith('-start') and instruction.shape.startswith('('):  # (operand, result)
    whole = max(size(part[0]) for part in re.finditer(r'\w+\[[\d,]*\]', instruction.shape))
  return (kind, group, 1), whole * group if kind == 'reduce-scatter' else whole


def _first_group(rest: str, devices: int) -> list[int]:
  if named := re.search(
    r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[.*?\](?:T\([\d,]*\))?)\))? \{([^}]*)\}', rest
  ):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    ids = _iota(named[2], devices).reshape([int(n) for n in sizes.values()])
    axes = set(re.findall(r"'(\w+)'", named[3]))
    return ids[tuple(slice(None) if name in axes else 0 for name in sizes)].ravel().tolist()
  if listed := re.search(r'(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}', rest):
    return [int(i) for i in listed[1].split(',')]
  if iota := re.search(r'replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)', rest):
    shape = [int(n) for n in iota[1].split(',')]
    return _iota(iota[2], devices).reshape(shape)[0].ravel().tolist()
  return list(range(devices))


def _iota(text: str, devices: int) -> np.ndarray:
  """'[4,2]T(1,0)': 0, 1, ... in that shape, transposed; '' is the order itself."""
  match = re.match(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', text or f'[{devices}]')
  assert match, text
  ids = np.arange(devices).reshape([int(n) for n in match[1].split(',')])
  return ids.transpose([int(n) for n in match[2].split(',')]) if match[2] else ids


# ---------------------------------------------------------------------------------------------------- memory traffic


def hbm_bytes(text: str) -> float:
  """That a chip reads from and writes to its memory in a step.

  An instruction reads its operands and writes its result; a slice, or a fusion that only slices an operand, reads what
  it takes; an update in place writes the update. Kernels are taken to read everything once.
  """
  computations, entry = parse(text)
  total = 0.0
  for name, instruction, times in _walk(computations, entry):
    total += times * _traffic(computations, computations[name], instruction)
  return total


def _traffic(computations: Mapping[str, Computation], within: Computation, instruction: Instruction) -> float:
  opcode = instruction.opcode
  if opcode in (*FREE, 'while', 'call', 'conditional', 'async-start') or opcode.endswith('-done'):
    return 0.0
  written = size(instruction.shape, in_hbm=True)
  read = [size(within[name].shape, in_hbm=True) if name in within else 0.0 for name in instruction.operands]
  if opcode in ('copy-start', 'slice-start'):
    first = _ARRAY.search(instruction.shape)
    moved = size(first[0], in_hbm=True) if first else 0.0
    return moved + (min(read[0], size(first[0])) if first and read else 0.0)
  if opcode == 'send':
    return sum(read)
  if opcode in ('dynamic-slice', 'slice', 'gather'):
    return written + min(read[0], size(instruction.shape))
  if opcode == 'dynamic-update-slice':
    return 2 * read[1]
  if opcode == 'fusion':
    return _fused_traffic(computations[_called(instruction)[0]], read, written)
  return written + sum(read)


def _fused_traffic(inside: Computation, read: list[float], written: float) -> float:
  """Of a fusion, whose operands are the parameters of `inside`."""
  users = collections.defaultdict(list)
  for instruction in inside.values():
    for operand in instruction.operands:
      users[operand].append(instruction)
  total, in_place = 0.0, 0.0
  for instruction in inside.values():
    if instruction.opcode != 'parameter':
      continue
    whole, uses = read[int(instruction.given)], users[instruction.name]
    # An index is an operand too: what matters is what is sliced.
    opcodes = {u.opcode if u.operands[0] == instruction.name else 'other' for u in uses}
    if opcodes and opcodes <= {'dynamic-slice', 'slice', 'gather'}:
      total += min(whole, sum(size(u.shape) for u in uses))
    elif opcodes == {'dynamic-update-slice'}:
      updates = sum(size(inside[u.operands[1]].shape) for u in uses if u.operands[1] in inside)
      in_place += max(whole - updates, 0.0)
    else:
      total += whole
  return total + max(written - in_place, 0.0)
