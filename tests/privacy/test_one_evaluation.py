"""Norm and sum of a unit's gradient read one array: nothing computes it for each of them anew."""

import importlib.util
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from fedjax_med.models.model import from_flax
from fedjax_med.privacy.client_level import clip_update
from fedjax_med.privacy.clipping import Rows, clipped_sum
from fedjax_med.tasks.classification import cross_entropy

H200 = pathlib.Path(__file__).parents[1] / "devices" / "h200.txtpb"
PLUGINS = importlib.util.find_spec("jax_plugins")
CUDA = PLUGINS and any(importlib.util.find_spec(f"jax_plugins.xla_cuda{n}") for n in (12, 13))
ROWS, POSITIONS, UNITS = 4, 8, 32


class Dense(nn.Module):
  """Dense layers with a bias at few positions, whose gradients are formed and not factored."""

  @nn.compact
  def __call__(self, inputs):
    hidden = nn.relu(nn.Dense(UNITS, name="first")(inputs))
    hidden = nn.relu(nn.Dense(UNITS, name="second")(hidden))
    return nn.Dense(2, name="last")(hidden.mean(1))


def clipped(method: str):
  """A function of (params, inputs, labels, mask, C) and the shapes that it is called with."""
  model = from_flax(Dense())
  params, state = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, POSITIONS, 16)))

  def run(params, inputs, labels, mask, clip_norm):
    loss = cross_entropy(0.0)
    rows = Rows(inputs, labels, mask)
    return clipped_sum(method, model, loss, params, state, rows, clip_norm, None)[0]

  shapes = [
    ((ROWS, POSITIONS, 16), "float32"),
    ((ROWS,), "int32"),
    ((ROWS,), "bool"),
    ((), "float32"),
  ]
  return run, (params, *(jax.ShapeDtypeStruct(*each) for each in shapes))


def barriers(program) -> list:
  """Barriers of a traced program that hold an array of every layer."""
  return [eqn for eqn in program.eqns if eqn.primitive.name == "optimization_barrier"]


@pytest.mark.parametrize("method", ["book_keeping", "reference"])
def test_norm_and_sum_are_read_from_behind_one_barrier(method):
  run, shapes = clipped(method)
  program = jax.make_jaxpr(run)(*shapes).jaxpr
  (barrier,) = barriers(program)
  gradients = {var for var in barrier.invars if not hasattr(var, "val")}
  assert len(gradients) >= 4  # of each layer
  place = program.eqns.index(barrier)
  for eqn in program.eqns[place + 1 :]:
    assert not gradients.intersection(v for v in eqn.invars if not hasattr(v, "val")), eqn
  # What the sum is made of comes from behind it.
  behind = set(barrier.outvars)
  for eqn in program.eqns[place + 1 :]:
    if behind.intersection(v for v in eqn.invars if not hasattr(v, "val")):
      behind.update(eqn.outvars)
  assert behind.issuperset(program.outvars)


def test_the_norm_of_an_update_and_what_is_scaled_are_read_from_behind_one_barrier():
  update = jax.ShapeDtypeStruct((16,), "float32")
  program = jax.make_jaxpr(lambda update: clip_update(update, jnp.float32(1)))(update).jaxpr
  (barrier,) = barriers(program)
  assert barrier is program.eqns[0]
  assert set(barrier.invars) == set(program.invars)
  for eqn in program.eqns[1:]:
    assert not set(program.invars).intersection(v for v in eqn.invars if not hasattr(v, "val"))


def h200():
  """An H200 to compile for, which need not be there."""
  from jax.experimental import topologies

  description = H200.read_text()
  topology = topologies.get_topology_desc(
    "", platform="cuda", topology="1x1x1", target_config=description
  )
  return topology.devices[0]


@pytest.mark.skipif(
  not CUDA, reason="jax's compiler for CUDA is not installed: pip install -e '.[gpu]' brings it"
)
# The cache keeps the program and cannot read it again where the device is not.
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.parametrize("method", ["book_keeping", "reference"])
def test_the_program_for_an_h200_sums_the_positions_of_each_layer_once(method):
  run, shapes = clipped(method)
  sharding = SingleDeviceSharding(h200())
  placed = jax.tree.map(
    lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=sharding), shapes
  )
  text = jax.jit(run).trace(*placed).lower().compile().as_text()
  assert text is not None
  for layer in ("first", "second"):
    sums = re.findall(rf"f32\[{ROWS},{UNITS}\]\S* reduce\(.*transpose.*/{layer}/reduce_sum", text)
    assert len(sums) == 1, sums
