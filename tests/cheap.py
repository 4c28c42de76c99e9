"""How tests compile: quickly. Most of their time is compilation, of programs that run for a moment.

LLVM does not optimise, a program is one LLVM module in place of up to 32, and fusions are emitted without MLIR. The
laws hold of any program, however compiled, and so does what is asked of processes that are killed.
"""

import importlib.metadata

FAST = [
  '--xla_backend_optimization_level=0',
  '--xla_cpu_parallel_codegen_split_count=1',
  '--xla_cpu_collective_call_terminate_timeout_seconds=600',
]
EMITTERS = {}  # compiler options of a program that is to be as it is for users
if importlib.metadata.version('jaxlib') < '0.11':  # which has nothing but MLIR
  FAST.append('--xla_cpu_use_fusion_emitters=false')
  EMITTERS['xla_cpu_use_fusion_emitters'] = True


def flags(devices: int) -> str:
  """XLA_FLAGS of a process that sees the CPU as that many devices, which on a busy machine wait long for each other."""
  return ' '.join([f'--xla_force_host_platform_device_count={devices}', *FAST])
