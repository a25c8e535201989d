"""Google's FedJAX: its FedAvg on the for_each_client backend with jit, its default on one device.

The network is written in Haiku, as in FedJAX's own models; clients come from its in-memory data set
and its uniform sampler. Its other backend, pmap, calls functions that jax has since removed.
"""

import sys
from typing import Any

from benchmarks.peers import protocol

VARIANTS = ("jit",)
TOLERANCE = 1e-3


def main() -> None:
  """Serves rounds."""
  arguments = protocol.parse(__doc__ or "", *VARIANTS)
  stream = protocol.claim_stdout()
  serve(arguments, stream)


def serve(arguments: Any, stream: Any) -> None:
  """Builds the federation and answers requests for rounds."""
  import jax

  if not hasattr(jax, "tree_map"):  # the last FedJAX calls what jax has since renamed
    jax.tree_map = jax.tree.map
  import fedjax
  import haiku as hk
  import jax.numpy as jnp
  import numpy as np

  from benchmarks import specs

  workload = specs.WORKLOADS[arguments.workload]
  if workload.network not in ("cifar_cnn", "mnist_cnn"):
    raise SystemExit(
      f"error: --workload={workload.name} has the network '{workload.network}', which is not"
      " written for FedJAX; use W1 or W3"
    )

  def network(batch, train: bool):
    x = batch["x"].astype(jnp.float32) / 127.5 - 1
    if workload.network == "cifar_cnn":
      x = jax.nn.relu(hk.Conv2D(32, 3, padding="VALID", name="conv1")(x))
      x = jax.nn.relu(hk.Conv2D(64, 3, padding="VALID", name="conv2")(x))
      x = hk.max_pool(x, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
      x = hk.dropout(hk.next_rng_key(), 0.25, x) if train else x
      x = jax.nn.relu(hk.Linear(128, name="hidden")(hk.Flatten()(x)))
      x = hk.dropout(hk.next_rng_key(), 0.5, x) if train else x
    else:
      for name, features in (("conv1", 16), ("conv2", 32)):
        x = jax.nn.relu(hk.Conv2D(features, 3, name=name)(x))
        x = hk.max_pool(x, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
      x = hk.Flatten()(x)
    return hk.Linear(workload.num_classes, name="head")(x)

  images, labels = specs.make_pool(workload)

  def block(client: int) -> slice:
    return slice(client * workload.examples, (client + 1) * workload.examples)

  clients = {
    b"%06d" % k: {"x": images[block(k)], "y": labels[block(k)]} for k in range(workload.num_clients)
  }
  sample = {"x": images[: workload.batch], "y": labels[: workload.batch]}

  def make(dropout: bool) -> fedjax.Model:
    return fedjax.create_model_from_haiku(
      hk.transform(network),
      sample,
      lambda batch, logits: (
        -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], axis=-1)[:, 0]
      ),
      train_kwargs={"train": dropout},
      eval_kwargs={"train": False},
    )

  model = make(True)
  params = hk.transform(network).init(jax.random.PRNGKey(0), sample, False)
  errors = gradient_errors(make(False), params, arguments.reference, sample)
  with fedjax.for_each_client_backend(arguments.variant):
    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
      fedjax.model_grad(model),
      fedjax.optimizers.sgd(workload.learning_rate),
      fedjax.optimizers.sgd(1.0),
      fedjax.ShuffleRepeatBatchHParams(
        batch_size=workload.batch, num_epochs=None, num_steps=workload.steps, seed=0
      ),
    )
  sampler = fedjax.client_samplers.UniformGetClientSampler(
    fedjax.InMemoryFederatedData(clients), workload.cohort, seed=1
  )
  state = algorithm.init(params)

  def run(rounds: int) -> int:
    nonlocal state
    for _ in range(rounds):
      state, _ = algorithm.apply(state, sampler.sample())
    jax.block_until_ready(state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    return rounds * workload.examples_per_round

  about = {
    "system": "fedjax",
    "variant": arguments.variant,
    "settings": {"backend": arguments.variant, "devices": jax.device_count()},
    "gradient_errors": errors,
    "versions": protocol.versions("fedjax", "jax", "dm-haiku"),
  }
  protocol.Session(arguments, stream, about).serve(run)


def gradient_errors(model: Any, params: Any, path: str | None, sample: Any) -> dict[str, float]:
  """Relative errors of FedJAX's batch gradient without dropout; stops if one is too large."""
  import fedjax
  import jax
  import numpy as np

  file = dict(np.load(path)) if path else {}
  if file:
    sample = {"x": file["images"], "y": file["labels"]}
    params = {
      layer: {
        kind: file[f"params/{layer}/{'kernel' if kind == 'w' else 'bias'}"].reshape(leaf.shape)
        for kind, leaf in leaves.items()
      }
      for layer, leaves in params.items()
    }
  gradient = fedjax.model_grad(model)
  key = jax.random.PRNGKey(0)
  mine = gradient(params, sample, key)
  rows = [
    gradient(params, {k: v[i : i + 1] for k, v in sample.items()}, key)
    for i in range(len(sample["y"]))
  ]
  loop = jax.tree.map(lambda *leaves: np.mean(leaves, 0), *rows)
  errors = {"independent_loop": _distance(mine, loop)}
  if file:
    theirs = {
      layer: {
        kind: file[f"mean/{layer}/{'kernel' if kind == 'w' else 'bias'}"].reshape(leaf.shape)
        for kind, leaf in leaves.items()
      }
      for layer, leaves in params.items()
    }
    errors["jax_side"] = _distance(mine, theirs)
  assert max(errors.values()) < TOLERANCE, f"wrong gradient, relative errors {errors}"
  return errors


def _distance(actual: Any, expected: Any) -> float:
  import jax
  import numpy as np

  a, b = (
    np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    for tree in (actual, expected)
  )
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


if __name__ == "__main__":
  sys.exit(main())
