"""Online distillation: the teacher runs inside the student's compiled step."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from slm_jax.config import require, setting
from slm_jax.losses import Term
from slm_jax.model.api import Model
from slm_jax.model.flops import flops_per_token
from slm_jax.step import Resources, Transform, TransformConfig


@dataclasses.dataclass(frozen=True)
class Distill(TransformConfig):
  """Learn from another arm's trained model as well as from the data."""

  kind: ClassVar[str] = 'distill'
  teacher: str = setting('', arm=True)  # name of the arm
  weight: float = setting(0.5, traced=True)  # of the teacher's term; the data's has 1 - weight
  temperature: float = setting(1.0, traced=True)

  def check(self, key: str) -> None:
    require(bool(self.teacher), f'{key}.teacher={self.teacher!r}: name the arm to learn from')
    require(0 <= self.weight <= 1, f'{key}.weight={self.weight}: must lie in [0, 1]')
    require(self.temperature > 0, f'{key}.temperature={self.temperature}: must be positive')

  def build(self, resources: Resources) -> tuple[Transform, dict[str, Any]]:
    teacher, params = resources.load(self.teacher)
    forward = flops_per_token(teacher.config, resources.seq_len, backward=False)
    return distill(teacher, self.weight, self.temperature)._replace(flops=forward), {'teacher': params}


def distill(teacher: Model, weight: float, temperature: float) -> Transform:
  """(1 - w) CE(y, q) + w T^2 KL(p_T || q_T), p_T = softmax(z_teacher / T) (Hinton et al., arXiv 1503.02531).

  The teacher's hidden states are computed once a batch, outside of the gradient (`data`); its logits exist only for
  the chunk of tokens whose student logits exist too (`token_loss`), so full logits of neither model are ever held.
  Logs 'kl', KL(p || q) at temperature 1, so that runs with different temperatures compare. `frozen['teacher']` holds
  the teacher's parameters.
  """

  def data(slot, params, batch, context):
    hidden = teacher.hidden(context.frozen['teacher'], batch)
    return {**batch, 'teacher_hidden': jax.lax.stop_gradient(hidden)}

  def token_loss(slot, fn):
    def with_teacher(logits, tokens, context):
      terms = fn(logits, tokens, context)
      w, t = context.hparams['distill.weight'], context.hparams['distill.temperature']
      teacher_logits = jax.lax.stop_gradient(teacher.head(context.frozen['teacher'], tokens['teacher_hidden']))
      mask = tokens['mask']
      count = mask.sum()
      soft = (kl(teacher_logits / t, logits / t) * mask).sum() * t**2
      plain = (kl(teacher_logits, jax.lax.stop_gradient(logits)) * mask).sum()
      return {
        **terms,
        'loss': terms['loss']._replace(weight=(1 - w) * terms['loss'].weight),
        'distill': Term(soft, count, w),
        'kl': Term(plain, count, 0.0),
      }

    return with_teacher

  hparams = {'distill.weight': weight, 'distill.temperature': temperature}
  return Transform('distill', hparams, data=data, token_loss=token_loss)


def kl(p_logits: jax.Array, q_logits: jax.Array) -> jax.Array:
  """KL(softmax(p) || softmax(q)) over the last axis, in nats. float32 logits [..., V] -> [...]."""
  log_p, log_q = jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)
  return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
