"""Flags without effect: those that were given, and that nothing will look at."""

from collections.abc import Callable, Mapping

from absl import flags

from launch.engines import ENGINES
from slm_jax.ablate.budget import FLAGS
from slm_jax.config import require

_LIMITS = [f'--{name}' for name in FLAGS]
_PREDICTED = ('dry_run', 'max_cost', 'max_hours')  # what asks how long arms take
_NEEDS: Mapping[str, tuple[Callable[[flags.FlagValues], object], str]] = {
  'over_budget': (lambda options: any(options[name].value is not None for name in FLAGS), ' or '.join(_LIMITS)),
  'search_round': (lambda options: options.search, '--search'),
  **dict.fromkeys(
    ('measure', 'device'),
    (lambda options: any(options[name].value for name in _PREDICTED), '--dry_run, --max_cost or --max_hours'),
  ),
}


def check(options: flags.FlagValues) -> None:
  """ConfigError for a flag that was given, is not at its default, and cannot change anything."""
  for name in options:
    flag = options[name]
    if name != flag.name or not flag.present or flag.value == flag.default:
      continue
    condition, words = _NEEDS.get(name, (lambda options: True, ''))
    engine = next((engine for engine in ENGINES if name.startswith(f'{engine}_') and engine != options.launch), '')
    needs = f'--launch={engine}' if engine else words
    require(not engine and bool(condition(options)), f'--{name}={flag.value}: has no effect without {needs}')
