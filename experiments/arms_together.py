"""For benchmarks: a step of one arm, or of many of one size in one program, as populations train."""

from collections.abc import Callable
from typing import Any

from slm_jax.model.presets import preset

BATCH, CONTEXT = 8, 128


def trainer(student: str, n_arms: int, teacher: str) -> tuple[Callable[[], Any], int]:
  """`(takes one step of all arms and waits for it, how many arms these are)`: half as many until they fit."""
  import jax
  import numpy as np

  from slm_jax.ablate import program
  from slm_jax.distill.logits import distill
  from slm_jax.model import decoder
  from slm_jax.optim import OptimConfig, optimizer
  from slm_jax.step import chain, init_state, make_step

  model, optim = decoder.build(preset(student)), optimizer(OptimConfig(), 1000)
  transform, frozen = chain(), {}
  if teacher != 'none':
    taught_by = decoder.build(preset(teacher))
    transform = distill(taught_by, 0.5, 1.0)
    frozen = {'teacher': jax.jit(taught_by.init)(jax.random.PRNGKey(9))}
  step = make_step(model, optim, transform)
  tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (BATCH, CONTEXT + 1)).astype(np.int32)
  ones = np.ones((BATCH, CONTEXT))
  batch = {'inputs': tokens[:, :-1], 'targets': tokens[:, 1:], 'segments': ones.astype('int32')}
  batch = jax.device_put({**batch, 'mask': ones.astype('float32')})
  fresh = jax.jit(lambda key: init_state(key, model.init(key), optim, transform))
  if n_arms == 1:
    state = fresh(jax.random.PRNGKey(0))
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch, frozen).compile()
  else:
    batch = jax.tree.map(lambda x: x[None], batch)  # of one order of the data
    together = jax.jit(program.together(step, jax.default_backend() != 'cpu'), donate_argnums=0)
    make = jax.jit(lambda keys: in_one_order(jax.vmap(fresh)(keys)))
    while True:
      keys = jax.random.split(jax.random.PRNGKey(0), n_arms)
      compiled = together.lower(jax.eval_shape(make, keys), batch, frozen).compile()
      if program.bytes_needed(compiled) <= program.memory_limit() or n_arms <= 2:
        break
      n_arms //= 2
    state = make(keys)

  def take() -> Any:
    nonlocal state
    state, measured = compiled(state, batch, frozen)
    return jax.device_get(measured)

  return take, n_arms


def in_one_order(states: Any) -> Any:
  """States [A, ...] as those of a population of one order of the data, [1, A, ...], whose steps are one."""
  import jax

  return jax.tree.map(lambda x: x[None], states)._replace(step=states.step[0])
