"""Which hospital holds which units: a class-by-client matrix of shares, apportioned and repaired.

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
  """Moves units from the largest clients until every client has ``min_size`` examples.

  Deterministic, and at most one move an example missing: a donor never falls under ``min_size``,
  so every move brings the end nearer. A unit of the class the receiver has most of moves first.

  Args:
    owner: [U] client of each unit.
    classes: [U] class of each unit.
    sizes: [U] examples of each unit.
    shares: [C, K], the preference of each receiver.
    min_size: examples every client must have.

  Returns:
    ([U] int32 owners, number of examples moved).

  Raises:
    UserError: the units are too few or too large to reach ``min_size``.
  """
  owner = owner.astype(np.int32, copy=True)
  num_clients = shares.shape[1]
  held = np.bincount(owner, weights=sizes, minlength=num_clients).astype(np.int64)
  units = [np.flatnonzero(owner == client).tolist() for client in range(num_clients)]
  donors = [(-int(held[k]), k) for k in range(num_clients) if held[k] > min_size]
  heapq.heapify(donors)
  moved = 0
  for client in np.flatnonzero(held < min_size).tolist():
    while held[client] < min_size:
      unit, donor = _spare_unit(donors, units, held, classes, sizes, shares[:, client], min_size)
      require(
        unit >= 0,
        f"partition.min_client_size={min_size} cannot be reached by {num_clients} clients: no"
        f" unit kept together is small enough to move to client {client + 1}, which has"
        f" {held[client]} examples",
        "lower partition.min_client_size or partition.num_clients, or use data.split=paper",
      )
      units[donor].remove(unit)
      units[client].append(unit)
      owner[unit] = client
      held[donor] -= sizes[unit]
      held[client] += sizes[unit]
      moved += int(sizes[unit])
      heapq.heappush(donors, (-int(held[donor]), donor))
    if held[client] > min_size:
      heapq.heappush(donors, (-int(held[client]), client))
  return owner, moved


def _spare_unit(donors, units, held, classes, sizes, preference, min_size) -> tuple[int, int]:
  """Pops the largest client that can spare a unit: (unit, donor), or (-1, -1) if none can."""
  while donors:
    donor = heapq.heappop(donors)[1]
    own = np.array(units[donor])
    own = own[sizes[own] <= held[donor] - min_size]
    if len(own):
      # The receiver's own classes first, then small units, which distort the shares least.
      best = np.lexsort((own, sizes[own], -preference[classes[own]]))[0]
      return int(own[best]), donor
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
