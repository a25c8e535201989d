"""Partitions of units over hospitals: a class-by-client matrix of shares, apportioned, repaired.

Every scheme but ``site`` is a matrix P [num_classes, K] whose rows sum to 1: client k holds the
share P[c, k] of class c. Training and test units use the same matrix, so that the test set of a
hospital resembles its training set.
"""

import heapq

import numpy as np

from fedjax_med.core.errors import require, require_choice

SCHEMES = ("iid", "dirichlet", "quantity", "shards")


def proportions(
  scheme: str,
  num_classes: int,
  num_clients: int,
  alpha: float,
  classes_per_client: int,
  rng: np.random.Generator,
) -> np.ndarray:
  """Share of every class that each client holds.

  Args:
    scheme: 'iid' (1/K everywhere), 'dirichlet' (every class its own Dir(alpha) draw: label skew,
      Hsu et al. 2019), 'quantity' (one Dir(alpha) draw for all classes: size skew only) or
      'shards' (each client holds ``classes_per_client`` classes, each class shared equally by the
      clients that hold it, after McMahan et al. 2017).
    num_classes: C.
    num_clients: K.
    alpha: concentration of 'dirichlet' and 'quantity'; small is skewed.
    classes_per_client: of 'shards'.
    rng: source of the draw.

  Returns:
    [C, K] float64, rows sum to 1.
  """
  require_choice("partition.scheme", scheme, SCHEMES)
  if scheme == "iid":
    return np.full((num_classes, num_clients), 1 / num_clients)
  if scheme == "shards":
    return _shards(num_classes, num_clients, classes_per_client, rng)
  require(
    0 < alpha < float("inf"),
    f"partition.alpha={alpha} must be above 0 and finite",
    "0.1 is strong skew, 100 is nearly IID; use scheme=iid for no skew",
  )
  draws = num_classes if scheme == "dirichlet" else 1
  shares = rng.dirichlet(np.full(num_clients, alpha), size=draws)
  return np.broadcast_to(shares, (num_classes, num_clients)).copy()


def _shards(
  num_classes: int, num_clients: int, classes_per_client: int, rng: np.random.Generator
) -> np.ndarray:
  require(
    1 <= classes_per_client <= num_classes,
    f"partition.classes_per_client={classes_per_client} must be 1 to the number of classes,"
    f" {num_classes}",
    f"lower it to {num_classes} or use scheme=iid",
  )
  require(
    classes_per_client * num_clients >= num_classes,
    f"partition.num_clients={num_clients} with partition.classes_per_client={classes_per_client}"
    f" cannot hold all {num_classes} classes",
    "raise one of the two until their product reaches the number of classes",
  )
  # Dealing the classes round and round gives every client distinct classes and every class
  # floor or ceil of K k / C clients.
  deck = rng.permutation(num_classes)
  dealt = deck[np.arange(num_clients * classes_per_client) % num_classes]
  holds = np.zeros((num_classes, num_clients))
  holds[dealt, np.repeat(rng.permutation(num_clients), classes_per_client)] = 1
  return holds / holds.sum(1, keepdims=True)


def apportion(
  classes: np.ndarray, sizes: np.ndarray, shares: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
  """Gives every unit to a client so that examples follow ``shares`` class by class.

  Each unit, the large ones first, goes to the client whose quota of that class is furthest from
  filled; with units of one example this is the largest-remainder method. A client with share 0
  of a class gets none of it.

  Args:
    classes: [U] class of each unit.
    sizes: [U] examples of each unit.
    shares: [C, K] from ``proportions``.
    rng: order among units of one size, and ties among clients.

  Returns:
    [U] int32 client of each unit.
  """
  num_classes, num_clients = shares.shape
  owner = np.full(len(classes), -1, np.int32)
  behind = np.zeros(num_clients)  # quota minus examples over the classes done: breaks ties
  for label in range(num_classes):
    members = rng.permutation(np.flatnonzero(classes == label))
    members = members[np.argsort(-sizes[members], kind="stable")]
    quota = shares[label] * sizes[members].sum()
    tie = rng.permutation(num_clients)
    heap = [
      (-round(float(quota[k]), 9), -round(float(behind[k]), 9), int(tie[k]), int(k))
      for k in np.flatnonzero(shares[label] > 0)
    ]
    heapq.heapify(heap)
    behind += quota
    for unit in members:
      deficit, late, order, client = heap[0]
      owner[unit] = client
      behind[client] -= sizes[unit]
      heapq.heapreplace(heap, (round(deficit + float(sizes[unit]), 9), late, order, client))
  return owner


def repair(
  owner: np.ndarray,
  classes: np.ndarray,
  sizes: np.ndarray,
  shares: np.ndarray,
  min_size: int,
) -> tuple[np.ndarray, int]:
  """Moves units from large clients until every client has ``min_size`` examples.

  A client is filled with the class that it lacks most of the mixture drawn for it, from the
  largest client that can spare a unit of that class; the next class follows where none can. It is
  deterministic, and a donor never falls under ``min_size``.

  Args:
    owner: [U] client of each unit.
    classes: [U] class of each unit.
    sizes: [U] examples of each unit.
    shares: [C, K] share of each class that was drawn for each client.
    min_size: examples every client must have.

  Returns:
    ([U] int32 owners, number of examples moved).

  Raises:
    UserError: the units are too few or too large to reach ``min_size``.
  """
  owner = owner.astype(np.int32, copy=True)
  num_classes, num_clients = shares.shape
  held = np.zeros((num_classes, num_clients), np.int64)
  np.add.at(held, (classes, owner), sizes)
  mixture = drawn_mixture(classes, sizes, shares)
  # Units of each class at each client, the small ones first, which distort the mixture least.
  order = np.lexsort((np.arange(len(owner)), sizes))
  units: list[list[list[int]]] = [[[] for _ in range(num_clients)] for _ in range(num_classes)]
  for unit in order.tolist():
    units[classes[unit]][owner[unit]].append(unit)
  num_moved = 0
  for client in np.flatnonzero(held.sum(0) < min_size).tolist():
    while held[:, client].sum() < min_size:
      missing = mixture[:, client] * min_size - held[:, client]
      donor, label = _donor(np.argsort(-missing, kind="stable"), units, held, sizes, min_size)
      require(
        donor >= 0,
        f"partition.min_client_size={min_size} cannot be reached by {num_clients} clients: no"
        f" unit kept together is small enough to move to client {client + 1}, which has"
        f" {held[:, client].sum()} examples",
        "lower partition.min_client_size or partition.num_clients, or use data.split=paper",
      )
      unit = units[label][donor].pop(0)
      units[label][client].append(unit)
      owner[unit] = client
      held[label, donor] -= sizes[unit]
      held[label, client] += sizes[unit]
      num_moved += int(sizes[unit])
  return owner, num_moved


def drawn_mixture(classes: np.ndarray, sizes: np.ndarray, shares: np.ndarray) -> np.ndarray:
  """[C, K] share of each class among the examples that were drawn for each client."""
  return _mixture(shares * np.bincount(classes, weights=sizes, minlength=len(shares))[:, None])


def mixture_shifts(
  owner: np.ndarray, classes: np.ndarray, sizes: np.ndarray, shares: np.ndarray
) -> np.ndarray:
  """[K] total variation distance, 0 to 1, between the drawn and the held mixture of classes."""
  held = np.zeros(shares.shape)
  np.add.at(held, (classes, owner), sizes)
  return np.abs(_mixture(held) - drawn_mixture(classes, sizes, shares)).sum(0) / 2


def _mixture(examples: np.ndarray) -> np.ndarray:
  """[C, K] share of each class in each client.

  A client without any example takes the shares of one that has some, in turn: the clients of a
  scheme are alike in how they are drawn.
  """
  least = np.finfo(float).tiny  # shares under it are not exact
  examples = examples.astype(float)
  held = examples.sum(0) >= least
  full, empty = np.flatnonzero(held), np.flatnonzero(~held)
  if len(full):
    examples[:, empty] = examples[:, full[np.arange(len(empty)) % len(full)]]
  return examples / np.maximum(examples.sum(0, keepdims=True), least)


def _donor(
  labels: np.ndarray,
  units: list[list[list[int]]],
  held: np.ndarray,
  sizes: np.ndarray,
  min_size: int,
) -> tuple[int, int]:
  """The largest client that can spare a unit of the first class for which there is one.

  Returns:
    (client, class), or (-1, -1) if no client can spare any unit.
  """
  totals = held.sum(0)
  for label in labels.tolist():
    for client in np.argsort(-totals, kind="stable").tolist():
      if totals[client] <= min_size:
        break
      here = units[label][client]
      if here and sizes[here[0]] <= totals[client] - min_size:
        return client, label
  return -1, -1


def require_clients_fit(num_clients: int, num_units: int, num_examples: int, min_size: int) -> None:
  """Raises UserError when no partition of the training side could satisfy the request."""
  require(
    num_clients <= num_units,
    f"partition.num_clients={num_clients} exceeds the {num_units} training units that may not be"
    f" divided ({num_examples} examples; near-duplicates and patients are kept together)",
    "lower partition.num_clients, add data, or use data.split=paper",
  )
  require(
    num_clients * min_size <= num_examples,
    f"partition.num_clients={num_clients} times partition.min_client_size={min_size} exceeds the"
    f" {num_examples} training examples",
    "lower one of the two or add data",
  )
