"""The privacy mechanisms of a run, made from its config and the sizes of the hospitals."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedjax_med.core.config import Config
from fedjax_med.core.errors import UserError, require
from fedjax_med.data.dataset import ClientTable, UnitTable, unit_table
from fedjax_med.privacy.accounting import epsilon, resolve_deltas
from fedjax_med.privacy.calibration import (
  PrivacyTarget,
  affordable_steps,
  calibrate_noise,
  calibrate_shares,
  plan_mechanisms,
)
from fedjax_med.privacy.distributed import DistributedGaussian, coarsest, on_grid
from fedjax_med.privacy.guarantees import SEVERAL_IMAGES, Guarantee
from fedjax_med.privacy.mechanism import PoissonGaussian, batch_size_bound, smallest_cap

# Rows of a patient in a step, if privacy.rows_per_unit is 0: slices of a stack are much alike. The
# number is the same for all data: one that followed the largest patient would reveal its size.
ROWS_PER_UNIT = 8


class Protection(NamedTuple):
  """The privacy mechanisms of a run, and the sizes that they fix.

  Attributes:
    config: the config, with the value that ``privacy.solve_for`` finds filled in.
    steps: [K] int64 local steps a round of each client.
    units: privacy units that hold several rows, or None.
    rows_per_unit: rows of a unit that a step looks at.
    local: DP-SGD in the clients' local steps, or None.
    central: DP-FedAvg at the server, or None.
  """

  config: Config
  steps: np.ndarray
  units: UnitTable | None
  rows_per_unit: int
  local: Guarantee | None
  central: Guarantee | None

  @property
  def guarantees(self) -> tuple[Guarantee, ...]:
    """The guarantees of the run, the local one first."""
    return tuple(guarantee for guarantee in (self.local, self.central) if guarantee is not None)


def local_steps(config: Config, counts: np.ndarray) -> np.ndarray:
  """[K] local steps a round: as configured, or epochs · n / batch size, at least 1."""
  client = config.client
  if client.num_local_steps:
    return np.full(len(counts), client.num_local_steps, np.int64)
  batches = client.num_local_epochs * counts / client.batch_size
  # Without privacy an epoch ends with a partial batch; a Poisson epoch is 1/q expected draws.
  steps = np.ceil(batches) if config.privacy.mechanism == "none" else np.round(batches)
  return np.maximum(1, steps).astype(np.int64)


def cohort_cap(config: Config, num_clients: int) -> int | None:
  """Most clients of a Poisson cohort (expected + 5 standard deviations), None for all clients."""
  if config.server.participation == "full":
    return None
  return min(num_clients, batch_size_bound(num_clients, config.server.participation_rate, 5))


def protect(
  config: Config,
  names: tuple[str, ...],
  rows: ClientTable,
  groups: np.ndarray,
  steps: np.ndarray | None = None,
  place: str = "federation",
  update_size: int = 0,
) -> Protection:
  """Mechanisms of every client and of the server.

  Args:
    config: validated config.
    names: K clients.
    rows: rows of each client.
    groups: [N] patient or near-duplicate group of each example.
    steps: [K] local steps a round, None as configured.
    place: federation, or the name of a baseline (see ``Guarantee``).
    update_size: numbers of an update at most, where hospitals add the noise themselves.

  Raises:
    UserError: a rule that needs the sizes is broken, or a target cannot be reached.
  """
  private = config.privacy.mechanism != "none"
  units, rows_per_unit = None, 1
  if private and config.privacy.unit in SEVERAL_IMAGES:
    units = unit_table(rows, groups)
    rows_per_unit = config.privacy.rows_per_unit or ROWS_PER_UNIT
  counts = (rows.counts if units is None else units.counts).astype(np.int64)
  config = _solved(config, counts)
  steps = local_steps(config, counts) if steps is None else steps
  local = None
  if private:
    mechanisms, deltas = _mechanisms(config, counts, steps)
    local = Guarantee(
      unit=config.privacy.unit, names=names, mechanisms=mechanisms, deltas=deltas, place=place
    )
  return Protection(
    config=config,
    steps=steps,
    units=units,
    rows_per_unit=rows_per_unit,
    local=local,
    central=_central(config, len(names), update_size),
  )


def require_a_round(protection: Protection) -> None:
  """Raises UserError where a budget ends the run before its first round."""
  config = protection.config
  budgets = (
    (protection.local, "privacy", config.privacy, protection.steps),
    (protection.central, "client_privacy", config.client_privacy, (1,)),
  )
  for guarantee, section, values, steps in budgets:
    if not (guarantee and values.noise_multiplier and values.target_epsilon):
      continue
    parties = zip(guarantee.names, guarantee.mechanisms, guarantee.deltas, steps, strict=True)
    for name, mechanism, delta, count in parties:
      require(
        affordable_steps(mechanism, delta, values.target_epsilon) >= count,
        f"{section}.target_epsilon={values.target_epsilon:g} does not allow '{name}' one round at"
        f" {section}.noise_multiplier={mechanism.noise_multiplier:g}",
        "raise either of them, or take fewer local steps a round",
      )


def _mechanisms(
  config: Config, counts: np.ndarray, steps: np.ndarray
) -> tuple[tuple[PoissonGaussian, ...], tuple[float, ...]]:
  privacy, smallest = config.privacy, int(np.min(counts))
  require(
    privacy.bands == 1 or privacy.bands * config.client.batch_size <= smallest,
    f"privacy.bands={privacy.bands} times client.batch_size={config.client.batch_size} exceeds the"
    f" {smallest} units of a hospital, whose batches would be smaller than asked for",
    "lower one of them",
  )
  mechanisms = plan_mechanisms(
    counts,
    config.client.batch_size,
    steps * config.server.num_rounds,
    PrivacyTarget(
      clip_norm=privacy.clip_norm,
      batch_cap=privacy.batch_cap,
      noise_multiplier=privacy.noise_multiplier,
      target_epsilon=privacy.target_epsilon,
      delta=privacy.delta,
      bands=privacy.bands,
    ),
  )
  if privacy.same_noise:
    sigma = max(mechanism.noise_multiplier for mechanism in mechanisms)
    mechanisms = tuple(dataclasses.replace(m, noise_multiplier=sigma) for m in mechanisms)
  return mechanisms, resolve_deltas(counts, privacy.delta)


def _solved(config: Config, counts: np.ndarray) -> Config:
  """The config with the rounds, the batch size or the clip norm that the target ε allows."""
  solve = config.privacy.solve_for
  if config.privacy.mechanism == "none" or solve == "noise":
    return config
  solver = {
    "rounds": _solve_rounds,
    "batch_size": _solve_batch_size,
    "clip_norm": _solve_clip_norm,
  }[solve]
  solved = solver(config, counts)
  # Solved once: baselines of the run take it as it is.
  privacy = dataclasses.replace(solved.privacy, solve_for="noise", noise_stddev=0.0)
  return dataclasses.replace(solved, privacy=privacy)


def _solve_rounds(config: Config, counts: np.ndarray) -> Config:
  steps, target = local_steps(config, counts), config.privacy.target_epsilon
  mechanisms, deltas = _mechanisms(config, counts, steps)
  rounds = min(
    affordable_steps(mechanism, delta, target) // int(count)
    for mechanism, delta, count in zip(mechanisms, deltas, steps, strict=True)
  )
  require(
    rounds >= 1,
    f"privacy.target_epsilon={target:g} does not allow one round at"
    f" privacy.noise_multiplier={config.privacy.noise_multiplier:g}",
    "raise either of them, or take fewer local steps a round",
  )
  return dataclasses.replace(config, server=dataclasses.replace(config.server, num_rounds=rounds))


def _with_batch(config: Config, batch_size: int) -> Config:
  return dataclasses.replace(
    config, client=dataclasses.replace(config.client, batch_size=batch_size)
  )


def _solve_batch_size(config: Config, counts: np.ndarray) -> Config:
  target = config.privacy.target_epsilon

  def allowed(batch_size: int) -> bool:
    candidate = _with_batch(config, batch_size)
    if not _fits_cap(config, counts, batch_size):
      return False
    steps = local_steps(candidate, counts)
    rows = zip(*_mechanisms(candidate, counts, steps), steps, strict=True)
    return all(
      epsilon(mechanism, int(count) * config.server.num_rounds, delta) <= target
      for mechanism, delta, count in rows
    )

  require(
    _fits_cap(config, counts, 1),
    f"privacy.batch_cap={config.privacy.batch_cap} is too small even for client.batch_size=1",
    "raise it, or use 0 to have it chosen",
  )
  size = _largest(allowed, int(counts.max()))
  if size == 0:
    raise UserError(
      f"privacy.target_epsilon={target:g} allows no batch at privacy.noise_multiplier="
      f"{config.privacy.noise_multiplier:g} in {config.server.num_rounds} rounds; raise either of"
      " the first two, or lower server.num_rounds"
    )
  return _with_batch(config, size)


def _fits_cap(config: Config, counts: np.ndarray, batch_size: int) -> bool:
  """Whether a mechanism accepts ``privacy.batch_cap`` with this batch size at every hospital."""
  cap = config.privacy.batch_cap
  rates = [(int(n), min(1.0, batch_size / int(n))) for n in counts]
  return not cap or all(smallest_cap(n, q) <= cap for n, q in rates)


def _largest(allowed: Callable[[int], bool], limit: int) -> int:
  """Largest whole number up to ``limit`` that is allowed, if smaller ones are; 0 if not even 1."""
  low, high = 0, limit + 1
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if allowed(middle) else (low, middle)
  return low


def _solve_clip_norm(config: Config, counts: np.ndarray) -> Config:
  mechanisms, _ = _mechanisms(config, counts, local_steps(config, counts))
  sigma = max(mechanism.noise_multiplier for mechanism in mechanisms)
  clip_norm = config.privacy.noise_stddev / sigma
  privacy = dataclasses.replace(config.privacy, clip_norm=clip_norm, same_noise=True)
  return dataclasses.replace(config, privacy=privacy)


def _central(config: Config, num_clients: int, update_size: int) -> Guarantee | None:
  """The client-level guarantee, if there is one."""
  client = config.client_privacy
  if client.mechanism == "none":
    return None
  (delta,) = resolve_deltas([num_clients], client.delta)
  make = _distributed if client.noise == "distributed" else _at_server
  mechanism = make(config, num_clients, delta, update_size)
  return Guarantee(
    unit="client", names=("all hospitals",), mechanisms=(mechanism,), deltas=(delta,)
  )


def _at_server(config: Config, num_clients: int, delta: float, update_size: int) -> PoissonGaussian:
  """The mechanism of a round whose noise the server adds."""
  client, server = config.client_privacy, config.server
  cap = cohort_cap(config, num_clients) or num_clients
  rate = 1.0 if server.participation == "full" else server.participation_rate
  sigma = client.noise_multiplier or calibrate_noise(
    num_clients, rate, cap, server.num_rounds, delta, client.target_epsilon
  )
  mechanism = PoissonGaussian(
    num_units=num_clients,
    sampling_probability=rate,
    batch_cap=cap,
    noise_multiplier=sigma,
    clip_norm=client.clip_norm,
  )
  if client.clipping == "adaptive":
    count_noise = client.count_noise or max(mechanism.expected_batch_size / 20, sigma)
    mechanism = dataclasses.replace(mechanism, count_noise=count_noise)
  return mechanism


def _distributed(
  config: Config, num_clients: int, delta: float, update_size: int
) -> DistributedGaussian:
  """The mechanism of a round in which each hospital adds its share of the noise."""
  client, secure = config.client_privacy, config.secure
  template = coarsest(num_clients, client.colluders, client.clip_norm, update_size)
  if client.noise_multiplier:
    return on_grid(template, client.noise_multiplier, secure.bits, secure.scale)
  return calibrate_shares(
    template, secure.bits, secure.scale, config.server.num_rounds, delta, client.target_epsilon
  )
