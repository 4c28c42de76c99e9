"""Attention by the kernels of accelerators, and the one place that chooses between them and attention.py.

    platform   kernel       what it needs
    TPU        splash       nothing: head sizes and lengths that are not multiples of 128 are padded here
    GPU        cuDNN        bfloat16, head sizes that are multiples of 8 up to 128 (256 from Hopper on), even lengths
    other      reference    attention.py in blocks; so do decoding with a cache, and what the kernels cannot do

All of them compute what `attention` of attention.py does for queries and keys that are the same tokens: causal, inside
a document, inside a window in local layers, R query heads sharing a key/value head. None materialises the scores.

What a program is compiled for is said by `Devices`, and not asked of JAX's default backend: a TPU's program can be
compiled on a machine without one. Kernels are opaque to the partitioner, so on a mesh each device runs them on its own
sequences and heads (`shard_map`); neither crosses devices.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from slm_jax.config import ConfigError
from slm_jax.model.config import ModelConfig
from slm_jax.model.products import ANYWHERE, IN_ROWS, Products

Kernel = Literal['reference', 'splash', 'cudnn']

LANES = 128  # of a TPU's vector unit: what head sizes and lengths are padded to a multiple of
BLOCKS = (512, 384, 256, 128)  # tokens of a splash block; the first that divides the length is taken


# Queries [B,T,H,K], keys and values [B,T,G,K], and whether the layer sees beyond the window (traced): [B,T,H,K]
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


class Devices(NamedTuple):
  """What a program is compiled for, as far as a kernel has to know; made by `sharding.devices`."""

  platform: str  # 'cpu', 'gpu' or 'tpu'
  mesh: Mesh | None = None  # None: one device
  rows: tuple[str, ...] = ()  # mesh axes over which sequences are spread
  heads: str | None = None  # mesh axis over which heads are
  widest: int = 128  # head size that its cuDNN can do
  mapped: bool = False  # whether the program is one of many arms under vmap
  grouped: bool = False  # whether it is one of several groups of rows under vmap
  stream: Callable[[jax.Array], jax.Array] | None = None  # x_BTD, said to lie as the residual stream does
  embedded: Callable[[Callable[[jax.Array], jax.Array], jax.Array], jax.Array] | None = None  # (look up, tokens) -> x

  def ways(self) -> tuple[int, int]:
    """Over how many devices (sequences, heads) are spread."""
    if self.mesh is None:
      return 1, 1
    rows = int(np.prod([self.mesh.shape[axis] for axis in self.rows]))
    return rows, self.mesh.shape[self.heads] if self.heads else 1

  def products(self) -> Products:
    """How matrix products are done here."""
    alone = self.mesh is None or self.mesh.size == 1
    return IN_ROWS if self.platform == 'cpu' and alone else ANYWHERE


def choose(config: ModelConfig, devices: Devices | None, b: int, t: int) -> Kernel:
  """The kernel for sequences [b, t]. ConfigError if `config.attention` names one that cannot do it.

  devices: None if nobody said; then 'auto' is the reference, which runs everywhere.
  """
  asked = config.attention
  if asked == 'auto':
    best: Kernel = {'tpu': 'splash', 'gpu': 'cudnn'}.get(devices.platform if devices else '', 'reference')  # type: ignore[assignment]
    return 'reference' if unsuited(best, config, devices, b, t) else best
  if why := unsuited(asked, config, devices, b, t):
    raise ConfigError(f'model.attention={asked}: {why}; allowed: auto, reference')
  return asked


def unsuited(kernel: Kernel, config: ModelConfig, devices: Devices | None, b: int, t: int) -> str:
  """Why a kernel cannot be used; '' if it can."""
  if kernel == 'reference':
    return ''
  rows, heads = devices.ways() if devices else (1, 1)
  if b % rows:
    return f'{b} sequences do not split over {rows} devices'
  if config.n_kv_heads % heads:
    return f'model.n_kv_heads={config.n_kv_heads} does not split over {heads} devices'
  if kernel == 'splash':
    return ''
  if devices and devices.platform != 'gpu':
    return f'cuDNN needs a GPU, and the device is a {devices.platform}'
  widest = devices.widest if devices else 256
  if config.dtype != 'bfloat16':
    return f'cuDNN needs model.dtype=bfloat16, not {config.dtype}'
  if config.head_dim % 8 or config.head_dim > widest:
    return f'cuDNN needs a model.head_dim that is a multiple of 8 up to {widest}, not {config.head_dim}'
  if t % 2:
    return f'cuDNN needs an even length, not {t}'
  if devices and devices.mapped:
    return "cuDNN's rule for vmap mistakes one mask for all arms (jax 0.10 and 0.11)"
  return ''


def attend_by(
  config: ModelConfig, devices: Devices | None, documents_BT: jax.Array | None, b: int, t: int
) -> Attend | None:
  """softmax(scale q k^T) v of sequences [b, t] by the kernel of `choose`; None for the reference.

  documents: a number for each token that is the same in a document and in no other of its row; None: one document a
  row.
  """
  kernel = choose(config, devices, b, t)
  if kernel == 'reference':
    return None
  on_tpu = devices.platform == 'tpu' if devices else jax.default_backend() == 'tpu'
  by_head = devices is not None and devices.grouped
  of = functools.partial(_cudnn, by_head) if kernel == 'cudnn' else functools.partial(_splash, not on_tpu)

  def one(q, k, v, documents, is_global):
    return of(config, q, k, v, None if documents_BT is None else documents, is_global)

  def attend(q_BTHK, k_BTGK, v_BTGK, is_global):
    numbers_BT = jnp.zeros((b, t), jnp.int32) if documents_BT is None else documents_BT
    return _spread(one, devices)(q_BTHK, k_BTGK, v_BTGK, numbers_BT, is_global)

  return attend


def _spread(one: Callable[..., jax.Array], devices: Devices | None) -> Callable[..., jax.Array]:
  """`one` on each device's own sequences and heads."""
  if devices is None or devices.mesh is None or devices.mesh.size == 1:
    return one
  rows = devices.rows or None
  each = PartitionSpec(rows, None, devices.heads, None)
  specs = (each, each, each, PartitionSpec(rows, None), PartitionSpec())
  return jax.shard_map(one, mesh=devices.mesh, in_specs=specs, out_specs=each, check_vma=False)


# ------------------------------------------------------------------------------------------------------------ TPU


def _splash(
  interpret: bool,
  config: ModelConfig,
  q_BTHK: jax.Array,
  k_BTGK: jax.Array,
  v_BTGK: jax.Array,
  documents_BT: jax.Array | None,
  is_global: jax.Array,
) -> jax.Array:
  """jax.experimental.pallas.ops.tpu.splash_attention (arXiv 2205.14135), a sequence at a time.

  Blocks of scores that the mask empties are skipped. Heads are padded with zeros, which adds nothing to a score;
  sequences with tokens that are one more document, which nobody else sees.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

  (_, t, h, k), room = q_BTHK.shape, -q_BTHK.shape[1] % LANES
  # The kernel has no scale. In float32, because bfloat16 would round the scale too: up to 0.2 % of all scores.
  q_BTHK = (q_BTHK.astype(jnp.float32) * config.query_scale).astype(q_BTHK.dtype)
  q_BHTK, k_BGTK, v_BGTK = (jnp.moveaxis(_padded(x), 2, 1) for x in (q_BTHK, k_BTGK, v_BTGK))
  if documents_BT is not None:
    documents_BT = jnp.pad(documents_BT, ((0, 0), (0, room)), constant_values=-1)

  def by(window: int) -> Callable[..., jax.Array]:
    kernel = _splash_kernel(h, t + room, window, interpret)

    def one(q_HTK, k_GTK, v_GTK, documents_T):
      segments = None if documents_T is None else kernels.SegmentIds(documents_T, documents_T)
      return kernel(q_HTK, k_GTK, v_GTK, segments)

    return jax.vmap(one, in_axes=(0, 0, 0, None if documents_BT is None else 0))

  given = (q_BHTK, k_BGTK, v_BGTK, documents_BT)
  if config.window:
    z_BHTK = jax.lax.cond(is_global, by(0), by(config.window), *given)
  else:
    z_BHTK = by(0)(*given)
  return jnp.moveaxis(z_BHTK, 1, 2)[:, :t, :, :k]


def _padded(x_BTHK: jax.Array) -> jax.Array:
  """With zeros, to multiples of 128 tokens and channels."""
  _, t, _, k = x_BTHK.shape
  return jnp.pad(x_BTHK, ((0, 0), (0, -t % LANES), (0, 0), (0, -k % LANES)))


@functools.cache
def _splash_kernel(heads: int, t: int, window: int, interpret: bool) -> Any:
  """For a sequence of t tokens; window 0: none. Its tables of blocks are numpy arrays: constants of any program."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  block = next(size for size in BLOCKS if t % size == 0)
  mask = masks.LocalMask((t, t), (window - 1, 0), 0) if window else masks.CausalMask((t, t))
  sizes = kernels.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  with jax.ensure_compile_time_eval(), jax.transfer_guard('allow'):
    made = kernels.make_splash_mha(
      masks.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    return jax.tree.map(np.asarray, made)


# ------------------------------------------------------------------------------------------------------------ GPU


def _cudnn(
  by_head: bool,
  config: ModelConfig,
  q_BTHK: jax.Array,
  k_BTGK: jax.Array,
  v_BTGK: jax.Array,
  documents_BT: jax.Array | None,
  is_global: jax.Array,
) -> jax.Array:
  """cuDNN's flash attention. It skips what causality empties; documents and windows are a mask [B,1,T,T], shared by
  all heads and, in an unrolled model, by all layers.

  by_head: the mask is [B,H,T,T], which is the only one that its rule for vmap knows (jax 0.10 and 0.11).
  """
  t = q_BTHK.shape[1]
  slot_1T1, slot_11S = jnp.arange(t)[None, :, None], jnp.arange(t)[None, None]
  mask = None
  if documents_BT is not None:
    mask = documents_BT[:, :, None] == documents_BT[:, None]
  if config.window:
    near = (slot_11S > slot_1T1 - config.window) | is_global
    mask = near if mask is None else mask & near
  if mask is not None:
    mask = jnp.repeat(mask[:, None], q_BTHK.shape[2] if by_head else 1, axis=1)
  return jax.nn.dot_product_attention(
    q_BTHK,
    k_BTGK,
    v_BTGK,
    mask=mask,
    scale=config.query_scale,
    is_causal=True,
    implementation='cudnn',
  )


# ------------------------------------------------------------------------------------------------- what was compiled


def kernels_in(text: str) -> dict[str, int]:
  """How many calls of each fused kernel a program's text has, StableHLO or compiled HLO. {} means: the reference."""
  patterns = {'splash': r'custom[-_]call.*splash_m[hq]a|splash_m[hq]a\S*\s*=.*custom-call', 'cudnn': r'__cudnn\$fmha'}
  found = {
    name: sum(bool(re.search(pattern, line)) for line in text.splitlines()) for name, pattern in patterns.items()
  }
  return {name: n for name, n in found.items() if n}
