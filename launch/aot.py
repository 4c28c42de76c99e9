"""Compiles the training step of an experiment's arms for TPU slices, on a machine without one.

    python -m launch.aot --experiment=experiments/shrink.py --topology=v5e:4x4 [--arm=NAME,...] [--config.a.b=v ...]

Prints, for each arm that has a program of its own: whether it fits and what the memory is for, FLOPs, memory traffic,
collectives, the least time that a step can take and the MFU of that, and the largest batch that fits. Nothing is
allocated or run, so there are no timings. Needs the package libtpu (extra `aot`).

The program is the one that training would run: the job is assembled by the same code, on shapes with shardings. Exit
code 1, and one line on stderr, if the batch of an arm does not fit, or for bad input.
"""

import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from absl import flags

from launch import aot_slice
from launch.options import split_overrides
from slm_jax import commands
from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.arms import Arm, expand
from slm_jax.chips import Chip
from slm_jax.config import ConfigError, require
from slm_jax.preempt import EXIT_DONE, EXIT_FAILED

GIB = 2**30


def main(argv: Sequence[str] | None = None) -> NoReturn:
  commands.show_any_text()
  aot_slice.prepare()
  code = EXIT_FAILED
  try:
    code = run(sys.argv[1:] if argv is None else argv)
  except (ConfigError, flags.Error) as error:
    print('error:', ' '.join(str(error).split()), file=sys.stderr)
  sys.exit(code)


def run(argv: Sequence[str]) -> int:
  """The exit code: 0, or 1 if the batch of some arm does not fit."""
  overrides, rest = split_overrides(argv)
  options = parse(rest)
  if options.help:
    print(help_text(options))
    return EXIT_DONE
  aot_slice.check(options.topology, options.num_slices)
  if options.json:  # before hours of compilation
    with workdirs.writing(Path(options.json)):
      Path(options.json).open('a').close()
  require(
    bool(options.experiment), '--experiment=(not given): expected a file or a module, as in experiments/shrink.py'
  )
  arms = expand(load(options.experiment), options.sweep, overrides)
  everyone = {arm.arm_id: arm for arm in arms}
  devices, chip = aot_slice.devices(options.topology, options.num_slices)
  faults = []
  for arm in chosen(arms, everyone, options.arm or ()):
    what = _Arm(arm, everyone, devices, chip, options)
    print(what.title())
    faults += what.sweep() if options.sweep_mesh else what.report()
  for fault in faults:
    print('error:', fault, file=sys.stderr)
  return EXIT_FAILED if faults else EXIT_DONE


def parse(argv: Sequence[str]) -> flags.FlagValues:
  values = flags.FlagValues()
  flags.DEFINE_string('experiment', '', 'file or module of the experiment', flag_values=values)
  flags.DEFINE_string('sweep', None, 'which of its sweeps: as for the experiment itself', flag_values=values)
  text = f'what to compile for: {", ".join(aot_slice.KINDS)}, and a shape in chips, as in v5e:16x16'
  flags.DEFINE_string('topology', '', text, flag_values=values)
  flags.DEFINE_integer('num_slices', 1, 'so many of them, joined by the data-centre network', flag_values=values)
  flags.DEFINE_list('arm', None, 'names or ids of arms (default: one of each program)', flag_values=values)
  text = 'compile an arm and those that can train with it as the one program that they would be, on one chip'
  flags.DEFINE_bool('population', False, text, flag_values=values)
  flags.DEFINE_bool('largest_batch', True, 'search for it, by a few more compilations', flag_values=values)
  flags.DEFINE_bool('sweep_mesh', False, 'compile for many meshes and rank them', flag_values=values)
  text = 'meshes to rank, data x fsdp x tensor each, as in 256x1x1,64x4x1 (default: about twenty)'
  flags.DEFINE_list('meshes', None, text, flag_values=values)
  flags.DEFINE_string('json', '', 'file to which the same is appended, a JSON object a line', flag_values=values)
  flags.DEFINE_bool('help', False, 'show this', short_name='h', flag_values=values)
  values.set_gnu_getopt(True)
  stray = values(['launch.aot', *argv])[1:]
  require(not stray, f'{" ".join(stray)!r}: not a flag; settings are given as --config.KEY=VALUE')
  return values


def help_text(options: flags.FlagValues) -> str:
  names = dict.fromkeys(options[key].name for key in options)
  return '\n'.join([(__doc__ or '').strip(), '', *(f'  --{name}: {options[name].help}' for name in names)])


def load(name: str) -> ModuleType:
  """An experiment by its file or its module name. ConfigError if there is none."""
  path = Path(name)
  if name.endswith('.py') and not path.exists():
    raise ConfigError(f'--experiment={name}: no such file')
  dotted = '.'.join(path.with_suffix('').parts) if name.endswith('.py') and not path.is_absolute() else name
  try:
    if not name.endswith('.py') or dotted.startswith('experiments.'):
      return importlib.import_module(dotted)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
  except ModuleNotFoundError as error:
    raise ConfigError(f'--experiment={name}: {error}') from error


def chosen(arms: Sequence[Arm], everyone: dict[str, Arm], names: Sequence[str]) -> list[Arm]:
  """The arms of these names or ids, one of each program; all if no names are given."""
  from slm_jax.ablate.measure import shape_key  # needs JAX

  for name in names:
    known = ', '.join(dict.fromkeys(arm.name for arm in arms))
    require(
      any(name == arm.name or arm.arm_id.startswith(name) for arm in arms),
      f'--arm={name}: no such arm; there is: {known}',
    )
  wanted = [arm for arm in arms if not names or any(n == arm.name or arm.arm_id.startswith(n) for n in names)]
  return list({shape_key(arm, everyone): arm for arm in reversed(wanted)}.values())[::-1]


class _Arm:
  """One arm on one kind of slice."""

  def __init__(self, arm: Arm, everyone: dict[str, Arm], devices: Sequence[Any], chip: Chip, options: flags.FlagValues):
    from slm_jax.ablate.alike import groups

    self.arm, self.everyone, self.chip, self.options = arm, everyone, chip, options
    self.group: list[Any] = []
    self.devices = devices
    if options.population:
      alike = groups({arm_id: other.config for arm_id, other in everyone.items()})
      self.group = [everyone[arm_id].config for arm_id in next(ids for ids in alike if arm.arm_id in ids)]
      self.devices = devices[:1]  # as populations run

  def title(self) -> str:
    many = f', in a population of {len(self.group)},' if self.group else ''
    slices = f'{self.options.num_slices} x ' if self.options.num_slices > 1 else ''
    where = f'{len(self.devices)} of the chips of {self.options.topology}' if self.group else self.options.topology
    return f'{self.arm.name} ({self.arm.arm_id}){many} on {slices}{where}'

  def facts(self, shape: tuple[int, int, int] | None = None, batch: int = 0) -> Any:
    from launch import aot_step

    mesh = aot_step.make_mesh(self.arm.config, self.devices, shape)
    its = aot_step.facts(self.arm, self.everyone, mesh, self.chip, self.group, batch)
    if self.options.json:
      with Path(self.options.json).open('a', encoding='utf-8') as file:
        known = {'arm': self.arm.name, 'topology': self.options.topology, 'slices': self.options.num_slices}
        bound = {'bound': its.bound(self.chip), 'mfu': its.mfu(self.chip)} if its.fits else {}
        shown = {**its._asdict(), 'collectives': [one._asdict() for one in its.collectives]}
        print(json.dumps({**known, **shown, **bound}), file=file)
    return its

  def report(self) -> list[str]:
    """Prints what is known of the arm on its own mesh; what is wrong with it, if it does not fit."""
    from launch import aot_step

    its = self.facts()
    print('\n'.join(lines(its, self.chip)))
    if not self.options.largest_batch and its.fits:
      return []
    unit = its.mesh[0] * its.mesh[1] * self.arm.config.train.accumulate
    good, bad = aot_step.largest(its, unit, lambda batch: self.facts(batch=batch))
    print(f'  largest batch      {good or "none"}' + (f' ({bad} does not fit)' if bad else ' at least'))
    return [] if its.fits else [self._too_large(its, good, unit)]

  def _too_large(self, its: Any, good: int, unit: int) -> str:
    needs = f'needs {its.needed / GIB:.1f} of {its.limit / GIB:.1f} GiB a chip'
    if good:
      hint = f'the largest that fits is {good}'
    else:
      hint = f'not even {unit} fit; try run.fsdp, run.tensor, model.remat=full or a larger slice'
    return f'{self.arm.name}: data.batch_size={its.batch}: {needs}; {hint}'

  def sweep(self) -> list[str]:
    """Prints the meshes in the order of their bounds."""
    from launch import aot_step

    if self.options.meshes:
      shapes = [mesh_of(text) for text in self.options.meshes]
    else:
      shapes = list(aot_step.meshes(len(self.devices), self.options.num_slices))
    found, refused = aot_step.sweep(shapes, self.facts, self.chip)
    for its in found:
      print(f'  {line(its, self.chip)}')
    for shape, why in refused.items():
      print(f'  {"x".join(map(str, shape)):>10}  {why}')
    fit = any(its.fits for its in found)
    return [] if fit else [f'{self.arm.name}: fits on none of {len(shapes)} meshes']


def mesh_of(text: str) -> tuple[int, int, int]:
  parts = text.split('x')
  good = len(parts) == 3 and all(part.isdigit() and int(part) > 0 for part in parts)
  require(good, f'--meshes={text}: expected data x fsdp x tensor, as in 64x4x1')
  data, fsdp, tensor = map(int, parts)
  return data, fsdp, tensor


# -------------------------------------------------------------------------------------------------------- as text


def lines(its: Any, chip: Chip) -> list[str]:
  """The facts of one step."""
  mesh = ' x '.join(map(str, its.mesh))
  parts = ', '.join(f'{name} {size / GIB:.2f}' for name, size in its.parts.items())
  verdict = 'fits' if its.fits else 'DOES NOT FIT'
  kernels = ', '.join(f'{name} ({n} calls in the text)' for name, n in its.kernels.items())
  found = [
    f'  mesh               data x fsdp x tensor = {mesh}; batch {its.batch}, {its.tokens:,} tokens a step',
    f'  memory a chip      {its.needed / GIB:.2f} GiB of {its.limit / GIB:.2f}: {verdict} ({parts})',
    f'  FLOPs a step       {its.flops:.3g} executed, {its.model_flops:.3g} of the models',
    f'  attention          {kernels or "reference"}',
  ]
  if not its.fits:
    return found
  groups = [
    f'{one.kind} over {one.group}{f" in {one.slices} slices" if one.slices > 1 else ""}: {one.times} of'
    f' {one.bytes / 1e6:,.1f} MB in all'
    for one in its.collectives
  ]
  roofs, (seconds, what) = its.roofs(chip), its.bound(chip)
  each = ', '.join(f'{name} {1e3 * roof:.2f}' for name, roof in roofs.items())
  pace = its.tokens / seconds / its.chips
  return [
    *found,
    f'  memory traffic     {its.traffic / 1e9:.2f} GB a chip',
    *(f'  {"collectives" if i == 0 else "":<18} {group}' for i, group in enumerate(groups or ['none'])),
    f'  a step takes       {1e3 * seconds:.2f} ms or more, for its {what} (ms: {each})',
    f'  MFU                {its.mfu(chip):.0%} or less; {pace:,.0f} tokens/s a chip or less',
    f'  compiled in        {its.seconds:.0f} s',
  ]


def line(its: Any, chip: Chip) -> str:
  """The same on one line, for a table of meshes."""
  from launch.aot_step import by_kind

  mesh = 'x'.join(map(str, its.mesh))
  if not its.fits:
    return f'{mesh:>10}  does not fit: {its.needed / GIB:.2f} of {its.limit / GIB:.2f} GiB'
  seconds, what = its.bound(chip)
  moved = ', '.join(f'{kind} {count}: {size / 1e6:,.0f} MB' for kind, (count, size) in by_kind(its.collectives).items())
  bound = f'{1e3 * seconds:9.2f} ms ({what}), MFU {its.mfu(chip):4.0%}'
  return f'{mesh:>10}  {bound}, {its.needed / GIB:6.2f} GiB; {moved or "alone"}'


if __name__ == '__main__':
  main()
