"""What does it cost to distil in chunks? Time and memory of loss and gradient, against the full logits of both models.

    python -m experiments.bench_kd [--tokens=8192] [--vocab=32768] [--width=128] [--chunks=512,2048x1024] [--out=FILE]

(1 - w) CE + w T^2 KL from the hidden states of a student and of a teacher twice as wide, with the gradients of the
student's hidden states and head: what one step adds to the two models' bodies. `dense` holds the logits of all tokens
at once; the others those of so many (train.loss_chunk), and compute them again for the gradient. 8192x2048 holds, of
8,192 tokens of text, the logits of 2,048 tokens of the vocabulary (train.vocab_chunk), and computes all once more for
each sum over the vocabulary.

Each way is a process of its own. They take turns, so that a busy machine slows all of them; reported is the fastest
call of each. Memory is what the compiled program asks for beside its arguments and results.
"""

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.turns import Contestant, closing, serve, take_turns
from slm_jax import commands
from slm_jax.ablate.table import columns

_TOKENS = flags.DEFINE_integer('tokens', 8192, 'of a batch, in sequences of 256', lower_bound=256)
_VOCAB = flags.DEFINE_integer('vocab', 32768, 'tokens of the vocabulary', lower_bound=2)
_WIDTH = flags.DEFINE_integer('width', 128, "the student's; the teacher has twice as much", lower_bound=1)
_CHUNKS = flags.DEFINE_list(
  'chunks', ['512', '2048', '8192x2048'], 'tokens whose logits exist at once, and, after an x, tokens of the vocabulary'
)
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'turns of each way', lower_bound=1)
_OUT = flags.DEFINE_string('out', 'runs/bench_kd/bench.json', 'where the figures go')
_WORKER = flags.DEFINE_string('worker', '', 'internal: the chunk of this process')


def loss_and_gradient(tokens: int, vocab: int, width: int, chunk: int, block: int) -> tuple[Any, tuple[Any, ...]]:
  """(function of its arguments, the arguments): the loss, and its gradient by the student's head and hidden states."""
  import jax
  import jax.numpy as jnp

  from slm_jax import losses, vocabulary
  from slm_jax.distill import logits, signals, teachers
  from slm_jax.distill.divergences import kl
  from slm_jax.model.api import Model
  from slm_jax.step import Context

  b, t = tokens // 256, 256
  keys = iter(jax.random.split(jax.random.PRNGKey(0), 5))

  def head(w_VD: jax.Array, x_BTD: jax.Array) -> vocabulary.Logits:
    def of(rows_WD: jax.Array) -> jax.Array:
      return jnp.einsum('btd,wd->btw', x_BTD, rows_WD, preferred_element_type=jnp.float32)

    return vocabulary.blocks(of, w_VD, block) if block else of(w_VD)

  def part(d: int) -> tuple[jax.Array, jax.Array]:
    return jax.random.normal(next(keys), (vocab, d)) / d**0.5, jax.random.normal(next(keys), (b, t, d))

  (own, x_BTD), (its, y_BTD) = part(width), part(2 * width)
  teacher: Any = Model(None, None, lambda params, batch: batch['teacher_hidden'], head, None)  # type: ignore[arg-type]
  numbers = {'distill.weight': 0.5, 'distill.temperature': 2.0}
  source = teachers.dense(teachers.online(teacher))
  taught = logits.taught_by(source, signals.dense_loss(kl), numbers)
  token_loss = taught.token_loss({'source': ()}, losses.cross_entropy())
  hparams = {name: jnp.float32(x) for name, x in taught.hparams.items()}
  targets = jax.random.randint(next(keys), (b, t), 0, vocab)

  def of(own: jax.Array, x_BTD: jax.Array, its: jax.Array, y_BTD: jax.Array, targets: jax.Array) -> jax.Array:
    context = Context(jnp.int32(0), jax.random.PRNGKey(0), hparams, {'teacher': its})
    batch = {'targets': targets, 'mask': jnp.ones((b, t)), 'teacher_hidden': y_BTD}
    return losses.objective(losses.over_chunks(token_loss, head, own, x_BTD, batch, context, chunk))

  return jax.value_and_grad(of, argnums=(0, 1)), (own, x_BTD, its, y_BTD, targets)


def work(chunk: int, block: int) -> None:
  """A contestant."""
  import jax

  from slm_jax import perf

  perf.keep_freed_memory()
  fn, args = loss_and_gradient(_TOKENS.value, _VOCAB.value, _WIDTH.value, chunk, block)
  compiled = jax.jit(fn).lower(*args).compile()
  memory: Any = compiled.memory_analysis()
  value, grads = jax.block_until_ready(compiled(*args))
  norm = float(sum((g**2).sum() for g in grads)) ** 0.5

  def turn(seconds: float) -> list[float]:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
      start = time.perf_counter()
      jax.block_until_ready(compiled(*args))
      times.append(time.perf_counter() - start)
    return times

  facts = {'memory': int(memory.temp_size_in_bytes), 'loss': float(value), 'gradient': norm}
  serve({**facts, 'device': jax.devices()[0].device_kind}, turn)


def main(argv: list[str]) -> None:
  if _WORKER.value:
    work(*sizes_of(_WORKER.value))
    return
  wrong = [chunk for chunk in _CHUNKS.value if not _known(chunk)]
  if wrong or len(argv) > 1:
    allowed = f'numbers of tokens, less than {_TOKENS.value}, or of text x of the vocabulary'
    sys.exit(f'error: {", ".join(wrong + argv[1:])}: --chunks must be {allowed}')
  chunks = [str(_TOKENS.value), *_CHUNKS.value]
  sizes = [f'--{name}={flags.FLAGS[name].value}' for name in ('tokens', 'vocab', 'width')]
  command = [sys.executable, '-m', 'experiments.bench_kd', *sizes]
  with closing([]) as contestants:
    for chunk in chunks:
      contestants.append(Contestant(([*command, f'--worker={chunk}'], {})))
    answers = take_turns(contestants, _ROUNDS.value, 1.0)
    rows = [
      {'chunk': chunk, **its.facts[0], 'seconds': min(min(turn) for turn in turns), 'calls': sum(map(len, turns))}
      for chunk, its, turns in zip(chunks, contestants, answers, strict=True)
    ]
  print(table(rows))
  out = Path(_OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  problem = {name: flags.FLAGS[name].value for name in ('tokens', 'vocab', 'width')}
  out.write_text(json.dumps({'machine': platform.platform(), **problem, 'rows': rows}, indent=1) + '\n')
  print(f'\n{out}')


def sizes_of(chunk: str) -> tuple[int, int]:
  """Of text, of the vocabulary (0: all): '512' -> (512, 0), '512x2048' -> (512, 2048)."""
  text, _, block = chunk.partition('x')
  return int(text), int(block or 0)


def _known(chunk: str) -> bool:
  text, x, block = chunk.partition('x')
  if not text.isdigit() or (x and not (block.isdigit() and 0 < int(block) < _VOCAB.value)):
    return False
  return 0 < int(text) <= _TOKENS.value - (not x)


def table(rows: list[dict[str, Any]]) -> str:
  dense = rows[0]
  head = ('logits of', 'ms', 'of dense', 'memory MiB', 'of dense', 'loss', 'gradient')
  lines = [head]
  for row in rows:
    lines.append(
      (
        'all, dense' if row is dense else f'{row["chunk"]}',
        f'{1e3 * row["seconds"]:,.0f}',
        f'{row["seconds"] / dense["seconds"]:.2f}x',
        f'{row["memory"] / 2**20:,.0f}',
        f'1/{dense["memory"] / row["memory"]:.1f}',
        f'{row["loss"]:.6f}',
        f'{row["gradient"]:.6f}',
      )
    )
  return columns(lines, right=range(1, len(head)))


if __name__ == '__main__':
  commands.show_any_text()
  app.run(main)
