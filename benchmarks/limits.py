"""Upper bound from the arithmetic: images a second if all of it ran like one large product.

The operations of one training image (XLA's count of the gradient with native convolutions) against
the speed of a square float32 matrix product on all cores. No system that multiplies as often can be
faster; what remains below it is memory traffic, thin products and everything between them.

Example: python -m benchmarks.limits --json
"""

import statistics

import jax
import jax.numpy as jnp

from benchmarks import common, specs
from benchmarks.workloads import make_model
from fedjax_med.core.keys import base_key
from fedjax_med.federated.losses import with_penalties
from fedjax_med.tasks.classification import cross_entropy


def product_speed(size: int, repeats: int) -> float:
  """Operations a second of a float32 product of two square matrices."""
  one = jax.random.normal(base_key(0), (size, size))
  product = jax.jit(jnp.matmul).lower(one, one).compile()
  times = [
    common.seconds(lambda: jax.block_until_ready(product(one, one))) for _ in range(repeats + 1)
  ]
  return 2 * size**3 / statistics.median(times[1:])


def operations(workload: specs.Workload) -> float:
  """Floating-point operations of a plain gradient, for each image of the batch."""
  model, _ = make_model(workload, lowering="native")
  loss = with_penalties(cross_entropy(0.0), model.penalties)
  images = jnp.zeros((workload.batch, *workload.shape), jnp.float32)
  labels = jnp.zeros(workload.batch, jnp.int32)
  params, state = jax.eval_shape(model.init, base_key(0), images[:1])

  def mean_loss(params, state):
    logits, _ = model.apply(params, state, images, key=base_key(1), train=True)
    return loss(logits, labels).mean()

  analysis = jax.jit(jax.grad(mean_loss)).lower(params, state).cost_analysis()
  assert analysis is not None
  return analysis["flops"] / workload.batch


def main() -> None:
  parser = common.parser(__doc__ or "")
  parser.add_argument("--size", type=int, default=2048, help="of the square matrices")
  options = parser.parse_args()
  speed = product_speed(options.size, options.repeats)
  needed = {name: operations(workload) for name, workload in specs.WORKLOADS.items()}
  result = common.envelope("limits") | {
    "product_gflops": speed / 1e9,
    "mflop_per_image": {name: value / 1e6 for name, value in needed.items()},
    "images_per_second_at_most": {name: speed / value for name, value in needed.items()},
  }
  common.finish(result, options)


if __name__ == "__main__":
  main()
