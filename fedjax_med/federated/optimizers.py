"""optax optimisers and schedules with the learning rate left out, so that it can be traced."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedjax_med.federated.algorithm import Tree


def client_optimizer(
  name: str, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
  """Direction of a local step before the learning rate: sgd, momentum, adam or adamw."""
  return {
    "sgd": optax.identity,
    "momentum": lambda: optax.trace(decay=momentum),
    "adam": optax.scale_by_adam,
    "adamw": lambda: optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(weight_decay)),
  }[name]()


def server_optimizer(name: str, momentum: float) -> optax.GradientTransformation:
  """Direction of a server step: FedAvg (sgd), FedAvgM, FedAdam or FedYogi (Reddi et al. 2021)."""
  return {
    "sgd": optax.identity,
    "momentum": lambda: optax.trace(decay=momentum),
    # Reddi et al. 2021, table 8: adaptivity 1e-3 and b2 0.99 for server optimisers.
    "adam": lambda: optax.scale_by_adam(b1=momentum, b2=0.99, eps=1e-3),
    "yogi": lambda: optax.scale_by_yogi(b1=momentum, b2=0.99, eps=1e-3),
  }[name]()


def schedule(name: str, num_rounds: int, warmup_rounds: int) -> Callable[[jax.Array], jax.Array]:
  """Factor on the client learning rate by round: warm-up, then constant or decay."""
  decay_rounds = max(1, num_rounds - warmup_rounds)
  main = {
    "constant": lambda: optax.constant_schedule(1.0),
    "cosine": lambda: optax.cosine_decay_schedule(1.0, decay_rounds, alpha=0.01),
    "linear": lambda: optax.linear_schedule(1.0, 0.01, decay_rounds),
  }[name]()
  # Round 0 trains at 1/(warmup+1), not at 0: a private round at rate 0 would waste its ε.
  warmup = optax.linear_schedule(1 / (warmup_rounds + 1), 1.0, max(1, warmup_rounds))
  factor = optax.join_schedules([warmup, main], [warmup_rounds]) if warmup_rounds else main
  return lambda round: jnp.asarray(factor(round), jnp.float32)


def descend(params: Tree, direction: Tree, learning_rate: jax.Array) -> Tree:
  """params − learning_rate · direction, leaf by leaf in the dtype of the parameters."""
  return jax.tree.map(
    lambda p, d: p - jnp.asarray(learning_rate, p.dtype) * d.astype(p.dtype), params, direction
  )
