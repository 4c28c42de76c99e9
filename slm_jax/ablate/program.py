"""The compiled program of a population: one arm's step, mapped over many.

    state   [S, A, ...]   S orders of the data, A arms that see the same batches
    batch   [S, B, T]

`frozen` is never mapped, so a teacher's forward pass runs once for all students that see the same batch.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from slm_jax import memory
from slm_jax.step import TrainState

if TYPE_CHECKING:  # a step is compiled without what its data are read with
  from slm_jax.train import Job

Step = Callable[[TrainState, Any, Any], tuple[TrainState, Any]]
Measure = Callable[[Any, Any], Any]

# The step counter is not mapped, so that a `lax.cond` on it stays a branch.
STATE_AXES = TrainState(step=None, key=0, params=0, opt_state=0, slots=0, hparams=0)  # type: ignore[arg-type]


class Program(NamedTuple):
  """The compiled functions of a population of S x A arms."""

  step: Step
  final: Callable[[TrainState], Any]
  measure: Measure
  empty: Callable[[], TrainState]
  put: Callable[[TrainState, TrainState, jax.Array, jax.Array], TrainState]
  pick: Callable[[TrainState, jax.Array, jax.Array], TrainState]

  def one(self, state: TrainState, at: tuple[int, int]) -> TrainState:
    """The state of one arm."""
    return self.pick(state, *jax.device_put(tuple(map(np.int32, at))))

  def with_one(self, state: TrainState, own: TrainState, at: tuple[int, int]) -> TrainState:
    """A population's state with that of one arm in its place; `state` is used up."""
    return self.put(state, own, *jax.device_put(tuple(map(np.int32, at))))


def together(step: Step, side_by_side: bool) -> Step:
  """The step of a population: (state [S, A, ...], batch [S, ...], frozen) -> (state [S, A, ...], metrics [S, A]).

  side_by_side: by vmap, to fill an accelerator that one arm leaves idle. Otherwise by a loop inside of the program: on
    a CPU an arm's activations stay in its caches, and the compiler moves what does not depend on the arm, such as the
    teacher's forward pass, out of the loop.
  """
  for batch_axis in (None, 0):
    mapped = jax.vmap(step, in_axes=(STATE_AXES, batch_axis, None), out_axes=(STATE_AXES, 0))
    step = mapped if side_by_side else looped(step, batch_axis)
  return step


def looped(step: Step, batch_axis: int | None) -> Step:
  """What `jax.vmap` does in `together`, one after another."""

  def of_all(state, batch, frozen):
    def one(own):
      its_state, its_batch = own
      after, measured = step(its_state._replace(step=state.step), batch if batch_axis is None else its_batch, frozen)
      return _without_step(after), measured

    after, measured = jax.lax.map(one, (_without_step(state), () if batch_axis is None else batch))
    return after._replace(step=state.step + 1), measured

  return of_all


def compile_program(job: 'Job', shape: tuple[int, int], batch: Any, side_by_side: bool) -> tuple[Program, int]:
  """`(program of S x A arms, bytes that its step needs)`. No arm's state need exist yet."""
  state = stacked(job.abstract, shape)
  layout = jax.tree.map(lambda x: x.sharding, state)
  compiled = trace(job, shape, batch, side_by_side).lower().compile()
  final, measure = job.final, job.measure
  for _ in range(2):  # S and A
    final = jax.vmap(final, in_axes=(STATE_AXES,))
    measure = _measured(measure, side_by_side)

  def empty():
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)

  def put(state, own, s, a):
    placed = jax.tree.map(lambda x, one: x.at[s, a].set(one), _without_step(state), _without_step(own))
    return placed._replace(step=own.step)

  def pick(state, s, a):
    return jax.tree.map(lambda x: x[s, a], _without_step(state))._replace(step=state.step)

  program = Program(
    compiled,
    jax.jit(final),
    jax.jit(measure),
    jax.jit(empty, out_shardings=layout),
    jax.jit(put, donate_argnums=0, out_shardings=layout),
    jax.jit(pick),
  )
  return program, bytes_needed(compiled)


def trace(job: 'Job', shape: tuple[int, int], batch: Any, side_by_side: bool) -> Any:
  """The step of S x A arms, to be lowered for their devices. batch: [S, B, T], or its shapes."""
  state = stacked(job.abstract, shape)
  layout = jax.tree.map(lambda x: x.sharding, state)
  step = jax.jit(together(job.step, side_by_side), donate_argnums=0, out_shardings=(layout, None))
  return step.trace(state, batch, job.frozen)


def stacked(abstract: TrainState, shape: tuple[int, int]) -> TrainState:
  """Shapes and shardings of the state of S x A arms, by those of one. No axis of arms is split over devices."""

  def of_all(x):
    layout = NamedSharding(x.sharding.mesh, PartitionSpec(None, None, *x.sharding.spec))
    return jax.ShapeDtypeStruct((*shape, *x.shape), x.dtype, sharding=layout)

  return jax.tree.map(of_all, _without_step(abstract))._replace(step=abstract.step)


def bytes_needed(step: Any) -> int:
  """Of a compiled program, its arguments included, by the compiler's own account."""
  sizes = step.memory_analysis()
  needed = sizes.temp_size_in_bytes + sizes.argument_size_in_bytes + sizes.output_size_in_bytes
  return needed - sizes.alias_size_in_bytes


def _without_step(state: TrainState) -> Any:
  """Without the one entry that has no axes of arms."""
  return state._replace(step=())  # type: ignore[arg-type]


def _measured(measure: Measure, side_by_side: bool) -> Measure:
  return lambda params, batch: jax.lax.map(
    lambda own: measure(own, batch), params, batch_size=len(jax.tree.leaves(params)[0]) if side_by_side else None
  )


def memory_limit() -> float:
  """Bytes that a population may take: of the device, or of the machine where that is the device."""
  stats = jax.devices()[0].memory_stats() or {}
  if 'bytes_limit' in stats:
    return 0.9 * stats['bytes_limit']
  return 0.8 * memory.meminfo('MemAvailable')
