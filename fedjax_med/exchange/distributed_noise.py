"""Client-level privacy against the server: each hospital adds its share of the noise itself."""

import jax
import jax.numpy as jnp

from fedjax_med.core.config import Config
from fedjax_med.core.errors import require
from fedjax_med.exchange.fixed_point import to_grid
from fedjax_med.exchange.transform import Transform
from fedjax_med.federated.algorithm import ClientDelta, Hyper
from fedjax_med.privacy.client_level import ClientLevel, clip_update
from fedjax_med.privacy.discrete_gaussian import draw
from fedjax_med.privacy.distributed import Shares

# Protocols under which the server sees sums alone.
HIDING = ("masking",)


def distributed_noise(clip_norm: float, bits: int) -> Transform:
  """Clips an update, rounds it to whole numbers and adds a share of noise, by ``hyper``.

  A hospital sends round(scale · clip(update)) + its discrete Gaussian noise, int32; see
  ``privacy.distributed``. The server divides the sum by the scale and by the number of hospitals.
  Non-trained state and ``extra`` do not leave a hospital.

  Args:
    clip_norm: C.
    bits: of a number as it travels.
  """

  def encode(message, kept, state, sender):
    level, shares = _shares_of(sender.hyper)
    update, _ = clip_update(message.params, jnp.float32(clip_norm))
    rounding, noise = (jax.random.fold_in(sender.key, use) for use in (0, 1))
    whole = to_grid(update, clip_norm, shares.scale, rounding)
    share = draw(noise, shares.sampler, whole.shape)
    # No noise is for an audit, which asks what it would have found without.
    share = jnp.where(level.noise_multiplier > 0, share, 0)
    nothing = jnp.zeros(message.state.shape, jnp.int32)
    return ClientDelta(params=whole + share, state=nothing), kept, ()

  def decode(total, state, tally, receiver):
    level, shares = _shares_of(receiver.hyper)
    mean = total.params.astype(jnp.float32) / (shares.scale * level.expected_cohort)
    return ClientDelta(params=mean, state=jnp.zeros(total.state.shape, jnp.float32)), state

  return Transform(
    encode=encode,
    decode=decode,
    wire=lambda wire: wire._replace(value_bits=bits),
    answers_nobody=True,
    clients=True,
  )


def _shares_of(hyper: Hyper) -> tuple[ClientLevel, Shares]:
  level = hyper.client_level
  assert level is not None
  assert level.shares is not None
  return level, level.shares


def is_distributed(config: Config) -> bool:
  """Whether hospitals add the noise of client-level privacy themselves."""
  client = config.client_privacy
  return client.mechanism != "none" and client.noise == "distributed"


def require_distributed(config: Config) -> None:
  """Raises UserError where something does not go with noise of the hospitals' own."""
  protocol, server = config.secure.protocol, config.server
  require(
    protocol in HIDING,
    f"client_privacy.noise='distributed' with secure.protocol='{protocol}': the server would see"
    " each update with that hospital's small share of the noise alone",
    f"use secure.protocol={HIDING[0]}, or client_privacy.noise=server",
  )
  require(
    server.participation == "full",
    f"client_privacy.noise='distributed' with server.participation='{server.participation}': who"
    " is absent adds no noise, and no ε is known for drawn cohorts with it",
    "use server.participation=full, or client_privacy.noise=server",
  )
  require(
    config.client_privacy.clipping == "fixed",
    f"client_privacy.noise='distributed' with client_privacy.clipping="
    f"'{config.client_privacy.clipping}': the noised count that the clip norm follows is made at"
    " the server",
    "use client_privacy.clipping=fixed, or client_privacy.noise=server",
  )
  require(
    config.compression.kind != "sketch",
    "client_privacy.noise='distributed' with compression.kind='sketch': a table may hold more"
    " numbers than rounding is counted for",
    "use compression.kind=none",
  )
  missing = {"secure.dropout": config.secure.dropout, "cost.deadline_s": config.cost.deadline_s}
  for path, value in missing.items():
    require(
      not value,
      f"client_privacy.noise='distributed' with {path}={value:g}: the share of a hospital whose"
      " message does not arrive is missing from the noise",
      f"use {path}=0, or client_privacy.noise=server",
    )
