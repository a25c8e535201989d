"""An audit of client-level privacy as executed: one hospital takes part, or sends nothing.

The rounds that train are run as they are, on an algorithm whose updates are known.
"""

import jax
import jax.numpy as jnp

from fedjax_med.audit.likelihood_ratio import ATTACKS, TRIALS_AT_ONCE, Scores, attack_scores, ratio
from fedjax_med.exchange.registry import Exchange, private_exchange
from fedjax_med.federated.algorithm import (
  Client,
  ClientDelta,
  FederatedAlgorithm,
  Hyper,
  Pool,
  ServerState,
  no_metrics,
)
from fedjax_med.privacy.distributed import DistributedGaussian
from fedjax_med.privacy.mechanism import Mechanism
from fedjax_med.simulation.mesh import local_devices, map_over_devices
from fedjax_med.simulation.rounds import init_state, make_round


def _algorithm(clip_norm: float) -> FederatedAlgorithm:
  """An algorithm in which client 0 sends four times the clip norm if the pool's label is above 0.

  All other clients send zeros.
  """

  def client_update(server, client_state, client, pool, hyper, key):
    speaks = (client.number == 0) & (pool.labels[0] > 0)
    size = jnp.where(speaks, jnp.float32(4 * clip_norm), jnp.float32(0))
    delta = blank_delta(server)
    return delta._replace(params=delta.params.at[0].set(size)), client_state, no_metrics()

  def server_update(server, delta, share, hyper):
    return server._replace(params=server.params + delta.params, round=server.round + 1)

  def init_server(params, state):
    return ServerState(
      params=params, state=state, opt_state=(), average=None, round=jnp.zeros((), jnp.int32)
    )

  def blank_delta(server):
    return ClientDelta(params=jnp.zeros_like(server.params), state=server.state)

  return FederatedAlgorithm(
    init_server=init_server,
    init_client=lambda params, state: (),
    client_update=client_update,
    server_update=server_update,
    blank_delta=blank_delta,
  )


def hospital_trials(
  mechanism: Mechanism,
  hyper: Hyper,
  rounds: int,
  number: int,
  key: jax.Array,
  exchange: Exchange | None = None,
) -> Scores:
  """Attack scores of independent runs in which one hospital speaks, or sends nothing.

  The attacker sees the model after every round, and the clip norm of the round. Where hospitals add
  the noise themselves, it is the server with the colluders: it takes off what they sent, so that
  only the others are run.

  Args:
    mechanism: accounted mechanism of a round over K hospitals, which the attacker knows.
    hyper: hyperparameters of the run; a noise multiplier of 0 leaves the noise out.
    rounds: rounds of a run.
    number: runs without the hospital; a tenth as many are run with it.
    key: key of the trials.
    exchange: the run's exchange, in which a transform clips; None for clip and noise alone.
  """
  shared = isinstance(mechanism, DistributedGaussian)
  num_clients, q = mechanism.num_units, mechanism.sampling_probability
  if shared:
    num_clients = mechanism.honest
  algorithm = _algorithm(mechanism.clip_norm)
  if exchange is None:
    exchange = private_exchange(mechanism.clip_norm)
  run_round = make_round(
    algorithm,
    num_clients=num_clients,
    cohort_cap=None if q == 1 else mechanism.batch_cap,
    chunk=min(num_clients, mechanism.batch_cap),
    exchange=exchange,
  )
  ones = jnp.ones(num_clients, jnp.int32)
  real = jnp.ones(num_clients, jnp.float32)
  clients = Client(
    number=jnp.arange(num_clients),
    indices=ones[:, None] * 0,
    num_examples=ones,
    weight=real,
    num_steps=ones,
    sampling_probability=real,
    expected_batch_size=real,
    noise_multiplier=real,
  )
  expected = jnp.float32(mechanism.expected_batch_size)
  sigma = mechanism.noise_multiplier * jnp.asarray([share for share, _ in ATTACKS], jnp.float32)

  def trial(shared, numbered):
    (hyper, trials_key), (run, present) = shared, numbered
    key = jax.random.fold_in(trials_key, run)
    pool = Pool(jnp.zeros((1, 1, 1, 1), jnp.uint8), present.astype(jnp.int32)[None])
    state = init_state(algorithm, jnp.zeros(4), jnp.zeros(0), num_clients, exchange)

    def body(_, carry):
      state, scores = carry
      after, _ = run_round(state, clients, pool, hyper, key)
      moved = (after.server.params - state.server.params)[0]
      clip_norm = mechanism.clip_norm if shared else state.exchange[exchange.clip_place]
      seen = moved * expected / clip_norm
      return after, scores + ratio(seen, q, sigma)

    start = (state, jnp.zeros(len(ATTACKS), jnp.float32))
    return jax.lax.fori_loop(0, rounds, body, start)[1]

  trials = map_over_devices(trial, local_devices(), TRIALS_AT_ONCE)
  return attack_scores(lambda *runs: trials((hyper, key), runs), number)
