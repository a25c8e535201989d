"""FedNova (Wang et al. 2020): unequal numbers of local steps no longer tilt the objective."""

import jax
import jax.numpy as jnp
import optax

from fedjax_med.core.config import Config
from fedjax_med.core.errors import require
from fedjax_med.federated.algorithm import FederatedAlgorithm
from fedjax_med.federated.fedavg import fedavg
from fedjax_med.federated.local import LocalTraining
from fedjax_med.federated.rules import require_no_proximal_term


def effective_steps(optimizer: optax.GradientTransformation, steps: jax.Array) -> jax.Array:
  """‖a_i‖₁: distance a weight of constant gradient 1 moves in ``steps`` steps, in learning rates.

  With plain SGD the number of steps; with momentum ρ more, up to 1 / (1 − ρ) times (section 4).
  """
  one = jnp.ones((), jnp.float32)

  def body(_, carry):
    total, state = carry
    direction, state = optimizer.update(one, state, one)
    return total + jnp.asarray(direction), state

  total, _ = jax.lax.fori_loop(0, steps, body, (jnp.zeros((), jnp.float32), optimizer.init(one)))
  return total


def fednova(
  local: LocalTraining, optimizer: optax.GradientTransformation, *, average: bool
) -> FederatedAlgorithm:
  """FedAvg of deltas over their own effective steps, times the mean of those (equation 6).

  Arguments as of ``fedavg``. Where all clients take as many steps it is FedAvg.
  """
  plain = fedavg(local, optimizer, average=average)

  def client_update(server, client_state, client, pool, hyper, key):
    delta, client_state, metrics = plain.client_update(
      server, client_state, client, pool, hyper, key
    )
    steps = effective_steps(local.optimizer, metrics.steps)
    per_step = delta.params / jnp.maximum(steps, 1e-6)
    return delta._replace(params=per_step, extra=steps), client_state, metrics

  def server_update(server, delta, share, hyper):
    whole = delta._replace(params=delta.params * delta.extra)
    return plain.server_update(server, whole, share, hyper)

  def blank_delta(server):
    return plain.blank_delta(server)._replace(extra=jnp.zeros((), jnp.float32))

  return plain._replace(
    client_update=client_update, server_update=server_update, blank_delta=blank_delta
  )


def require_known_steps(config: Config) -> None:
  """Raises UserError where the effective number of local steps is not known."""
  require_no_proximal_term(config)
  optimizer = config.client.optimizer
  require(
    optimizer in ("sgd", "momentum"),
    f"server.algorithm='fednova' with client.optimizer='{optimizer}': the effective number of its"
    " steps is known for SGD and momentum only",
    "use client.optimizer=sgd or momentum",
  )
