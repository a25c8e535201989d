"""One medical model trained across many hospitals, with exact privacy accounting.

A notebook needs these names:

    import fedjax_med

    config = fedjax_med.load_config("configs/smoke.py", {"privacy.clip_norm": 0.5})
    result = fedjax_med.simulate(config)
    result.per_hospital  # metrics and ε as a pandas frame
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.3.0.dev1"

# Functions are not named ``train``, ``run``, ``report`` or ``sweep``: those are modules.
__all__ = [
  "Config",
  "Result",
  "UserError",
  "load_config",
  "simulate",
  "simulate_grid",
  "write_report",
]
_ELSEWHERE = {"Config": "fedjax_med.core.config", "UserError": "fedjax_med.core.errors"}

if TYPE_CHECKING:
  from fedjax_med.api import Result, load_config, simulate, simulate_grid, write_report
  from fedjax_med.core.config import Config
  from fedjax_med.core.errors import UserError


def __getattr__(name: str) -> Any:
  """Imports a public name at its first use (PEP 562): the package itself imports nothing."""
  if name not in __all__:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  import importlib

  value = getattr(importlib.import_module(_ELSEWHERE.get(name, "fedjax_med.api")), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
