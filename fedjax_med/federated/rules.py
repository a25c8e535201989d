"""Rules of a configuration that several algorithms share; their registry entries name them."""

from fedjax_med.core.config import Config
from fedjax_med.core.errors import require


def no_rules(config: Config) -> None:
  """Accepts every configuration."""


def require_no_proximal_term(config: Config) -> None:
  """Raises UserError for a proximal term beside an algorithm that reads gradients off weights."""
  server = config.server
  require(
    server.proximal_weight == 0,
    f"server.algorithm='{server.algorithm}' with server.proximal_weight="
    f"{server.proximal_weight:g}: it takes the weights a client moves for a sum of gradients",
    "use server.proximal_weight=0, or server.algorithm=fedavg (FedProx)",
  )
