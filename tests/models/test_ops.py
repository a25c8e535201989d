"""Lowered operations against XLA's own and against NumPy."""

import itertools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from jax import lax

from fedjax_med.models import ops

ONE = ((1, 1), (1, 1))

# name: (H, W), C_in, C_out, window, strides, padding, dilation, groups
CONVS = {
  "1x1": ((4, 5), 3, 4, (1, 1), (1, 1), ops.NO_PADDING, (1, 1), 1),
  "1x1_strided": ((5, 4), 3, 4, (1, 1), (2, 2), ops.NO_PADDING, (1, 1), 1),
  "1x1_padded": ((3, 3), 2, 3, (1, 1), (2, 1), ONE, (1, 1), 1),
  "1x1_grouped": ((3, 3), 8, 4, (1, 1), (1, 1), ops.NO_PADDING, (1, 1), 4),
  "3x3": ((5, 5), 3, 4, (3, 3), (1, 1), ONE, (1, 1), 1),
  "wide": ((6, 5), 16, 4, (3, 3), (1, 1), ((1, 0), (2, 1)), (1, 1), 1),
  "wide_1x3_padded": ((5, 6), 16, 4, (1, 3), (1, 1), ((1, 1), (3, 4)), (1, 1), 1),
  "wide_strided": ((7, 6), 16, 4, (3, 3), (2, 2), ONE, (1, 1), 1),
  "stem_7x7": ((10, 9), 1, 4, (7, 7), (2, 2), ((3, 3), (3, 3)), (1, 1), 1),
  "merged_groups": ((4, 4), 32, 32, (3, 3), (1, 1), ONE, (1, 1), 8),
  "merged_strided": ((5, 5), 24, 12, (3, 3), (2, 2), ONE, (1, 1), 6),
  "wide_groups": ((3, 3), 40, 6, (3, 3), (1, 1), ONE, (1, 1), 2),
  "depthwise": ((5, 6), 6, 6, (3, 2), (2, 1), ((1, 0), (2, 1)), (1, 2), 6),
  "depthwise_wider": ((4, 4), 6, 12, (3, 3), (2, 1), ONE, (1, 1), 6),
  "dilated_uneven": ((8, 9), 6, 9, (3, 2), (1, 2), ((2, 0), (0, 3)), (2, 3), 3),
}


def conv_case(name, clients):
  """Options, inputs [clients, 2, H, W, C_in], kernels and output cotangents, float64."""
  size, channels_in, channels_out, window, strides, padding, dilation, groups = CONVS[name]
  options = {"strides": strides, "padding": padding, "dilation": dilation, "groups": groups}
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(clients, 2, *size, channels_in))
  kernel = rng.normal(size=(clients, *window, channels_in // groups, channels_out))
  out = ops.output_size(size, window, strides, padding, dilation)
  return options, inputs, kernel, rng.normal(size=(clients, 2, *out, channels_out))


def value_and_gradients(options, lowering):
  def run(inputs, kernel, cotangent):
    out, pull = jax.vjp(lambda x, k: ops.conv(x, k, lowering=lowering, **options), inputs, kernel)
    return out, *pull(cotangent)

  return run


NATIVE_TOO = ("1x1_strided", "stem_7x7", "wide", "wide_1x3_padded", "wide_strided", "merged_groups")
FLOAT32_TOO = ("1x1_strided", "stem_7x7", "merged_strided", "depthwise", "depthwise_wider")


@pytest.mark.parametrize(
  ("name", "double"), [(name, True) for name in CONVS] + [(name, False) for name in FLOAT32_TOO]
)
def test_matmul_conv_equals_native_in_value_and_gradient_under_client_vmap(name, double):
  options, *arrays = conv_case(name, clients=2)
  tolerance = 1e-11 if double else 2e-5

  @jax.jit
  def both(*arrays):
    lowered = jax.vmap(value_and_gradients(options, "matmul"))(*arrays)
    # One client at a time: nothing of the vmap under test in the reference.
    native = jax.lax.map(lambda client: value_and_gradients(options, "native")(*client), arrays)
    return lowered, native

  with jax.enable_x64(double):
    results = both(*(np.asarray(x, np.float64 if double else np.float32) for x in arrays))
    for ours, theirs in zip(*jax.tree.map(np.asarray, results), strict=True):
      assert ours.dtype == theirs.dtype == (np.float64 if double else np.float32)
      assert np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("clients", [1, 2])
@pytest.mark.parametrize("name", NATIVE_TOO)
def test_auto_conv_equals_native_in_value_and_gradient_with_one_kernel_and_with_many(name, clients):
  options, *arrays = conv_case(name, clients)
  run = value_and_gradients(options, "auto")
  run = jax.vmap(run) if clients > 1 else run
  arrays = [x if clients > 1 else x[0] for x in arrays]
  with jax.enable_x64(True):
    ours = jax.jit(run)(*arrays)
    reference = value_and_gradients(options, "native")
    theirs = jax.lax.map(lambda client: reference(*client), arrays) if clients > 1 else None
    for one, other in zip(ours, theirs or reference(*arrays), strict=True):
      assert np.abs(one - other).max() < 1e-11 * np.abs(other).max()


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_auto_conv_under_two_vmaps_and_with_one_kernel_for_all_equals_native(axes):
  options, inputs, kernel, _ = conv_case("wide", clients=2)

  def each(lowering):
    def run(inputs, kernel):
      return jax.grad(
        lambda x, k: jnp.square(ops.conv(x, k, lowering=lowering, **options)).sum(), (0, 1)
      )(inputs, kernel)

    return run

  arrays = [x if axis == 0 else x[0] for x, axis in zip((inputs, kernel), axes, strict=True)]
  swept = [np.stack([x, 2 * x]).astype(np.float32) for x in arrays]
  ours = jax.jit(jax.vmap(jax.vmap(each("auto"), axes)))(*swept)
  for s in range(2):
    for c in range(2):
      one = [x[s][c] if axis == 0 else x[s] for x, axis in zip(swept, axes, strict=True)]
      for got, want in zip(ours, each("native")(*one), strict=True):
        assert np.abs(got[s, c] - want).max() < 1e-5 * np.abs(want).max()


def test_a_configured_matmul_lowering_runs_no_native_convolution():
  options, inputs, kernel, cotangent = conv_case("wide", clients=1)
  geometry = ops.Geometry((3, 3), options["strides"], options["padding"])
  sums = jax.make_jaxpr(
    lambda x, g: ops.conv_gradients(x, g, geometry, units=1, lowering="matmul")
  )(inputs[0], cotangent[0])
  whole = jax.make_jaxpr(value_and_gradients(options, "matmul"))(inputs[0], kernel[0], cotangent[0])
  assert not equations(sums, "conv_general_dilated")
  assert not equations(whole, "conv_general_dilated")


def test_auto_conv_is_native_for_one_kernel_in_the_order_of_axes_that_is_fast_in_loops():
  options, *arrays = conv_case("wide", clients=2)
  one, many = (
    jax.make_jaxpr(run)(*args)
    for run, args in (
      (value_and_gradients(options, "auto"), [x[0] for x in arrays]),
      (jax.vmap(value_and_gradients(options, "auto")), arrays),
    )
  )
  orders = [eqn.params["dimension_numbers"] for eqn in equations(one, "conv_general_dilated")]
  # NHWC, HWIO, NHWC: any other order is 20 to 60 times slower in a loop on a CPU.
  assert [tuple(order) for order in orders] == [((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))] * 3
  assert not equations(many, "conv_general_dilated")
  assert equations(many, "dot_general")


def equations(program, name):
  """All operations of that name that run, inner programs included."""
  found = []
  for eqn in program.jaxpr.eqns:
    if eqn.primitive.name == name:
      found.append(eqn)
    for value in eqn.params.values():
      if hasattr(value, "jaxpr"):
        found += equations(value, name)
  return found


@pytest.mark.parametrize("lowering", ["auto", "matmul", "native"])
def test_conv_equals_loops_over_every_index(lowering):
  options, inputs, kernel, _ = conv_case("dilated_uneven", clients=1)
  inputs, kernel = inputs[0], kernel[0]
  (top, bottom), (left, right) = options["padding"]
  padded = np.pad(inputs, ((0, 0), (top, bottom), (left, right), (0, 0)))
  out = ops.conv(jnp.float32(inputs), jnp.float32(kernel), lowering=lowering, **options)
  width_in, width_out = kernel.shape[2], kernel.shape[3] // options["groups"]
  expected = np.zeros(out.shape)
  for b, y, x, o in np.ndindex(*out.shape):
    first = o // width_out * width_in
    for i, j, c in np.ndindex(*kernel.shape[:3]):
      row = y * options["strides"][0] + i * options["dilation"][0]
      column = x * options["strides"][1] + j * options["dilation"][1]
      expected[b, y, x, o] += padded[b, row, column, first + c] * kernel[i, j, c, o]
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axes", [1, 2], ids=["clients", "sweep_and_clients"])
def test_narrow_groups_survive_a_client_axis_of_one(axes):
  # 8-channel groups merged by a product with an identity crashed XLA's CPU backend at these shapes.
  options = {"padding": ONE, "groups": 32}
  shapes = ((8, 8, 8, 256), (3, 3, 8, 256), (8, 8, 8, 256))
  arrays = [jnp.ones((1,) * axes + shape) for shape in shapes]
  run = value_and_gradients(options, "matmul")
  for _ in range(axes):
    run = jax.vmap(run)
  out, d_inputs, d_kernel = jax.jit(run)(*arrays)
  assert out.reshape(shapes[0])[0, 1, 1, 0] == 72  # 9 shifts x 8 channels of ones
  assert d_inputs.reshape(shapes[0])[0, 1, 1, 0] == 72
  assert d_kernel.reshape(shapes[1])[1, 1, 0, 0] == 512  # 8 images x 64 positions


@pytest.mark.parametrize("window", [(1, 1), (3, 3)])
def test_bfloat16_conv_sums_in_float32(window):
  inputs = jnp.ones((1, 3, 3, 1024), jnp.bfloat16)
  kernel = jnp.ones((*window, 1024, 1), jnp.bfloat16)
  out, *gradients = jax.jit(value_and_gradients({}, "matmul"))(
    inputs, kernel, jnp.ones((1, 4 - window[0], 4 - window[1], 1), jnp.bfloat16)
  )
  assert [x.dtype for x in (out, *gradients)] == [jnp.bfloat16] * 3
  # A running sum in bfloat16 stops at 256, where adding 1 no longer changes it.
  assert float(out[0, 0, 0, 0]) == 1024 * window[0] * window[1]


def test_native_bfloat16_conv_has_gradients():
  inputs, kernel = jnp.ones((1, 3, 3, 4), jnp.bfloat16), jnp.ones((3, 3, 2, 4), jnp.bfloat16)
  run = value_and_gradients({"padding": ONE, "groups": 2}, "native")
  results = jax.eval_shape(run, inputs, kernel, inputs)
  assert [x.dtype for x in results] == [jnp.bfloat16] * 3


def test_patches_follow_the_order_of_kernel_axes():
  inputs = np.arange(2 * 5 * 6 * 3, dtype=np.float32).reshape(2, 5, 6, 3)
  found = ops.patches(jnp.asarray(inputs), (3, 2), (2, 1), ((1, 1), (0, 0)), (1, 3))
  padded = np.pad(inputs, ((0, 0), (1, 1), (0, 0), (0, 0)))
  assert found.shape == (2, 3, 3, 18)
  for y, x in itertools.product(range(3), range(3)):
    covered = padded[:, 2 * y : 2 * y + 3, [x, x + 3]]  # [B, 3, 2, C]
    np.testing.assert_array_equal(found[:, y, x], covered.reshape(2, -1))


@pytest.mark.parametrize("values", ["distinct", "tied"])
@pytest.mark.parametrize(
  ("window", "strides", "padding"),
  [
    ((3, 3), (2, 2), ((0, 1), (0, 1))),
    ((2, 2), (2, 2), ops.NO_PADDING),
    ((3, 2), (1, 2), ((1, 1), (1, 0))),
  ],
)
def test_max_pool_equals_reduce_window_in_value_and_gradient(values, window, strides, padding):
  rng = np.random.default_rng(4)
  shape = (2, 8, 6, 3)
  pixels = rng.permutation(288) if values == "distinct" else rng.integers(0, 3, 288)
  x = jnp.float32(pixels).reshape(shape) - 100  # a fill of 0 in place of -inf would win

  def reference(x):
    sizes = ((1, *window, 1), (1, *strides, 1), ((0, 0), *padding, (0, 0)))
    return lax.reduce_window(x, -jnp.inf, lax.max, *sizes)

  def both(x, cotangent):
    pools = (lambda x: ops.max_pool(x, window, strides, padding), reference)
    return [(pool(x), jax.vjp(pool, x)[1](cotangent)[0]) for pool in pools]

  # Whole numbers: their sums have no rounding.
  cotangent = jnp.float32(rng.integers(1, 9, jax.eval_shape(reference, x).shape))
  (out, gradient), (expected, gradient_expected) = jax.jit(both)(x, cotangent)
  np.testing.assert_array_equal(out, expected)
  np.testing.assert_array_equal(gradient, gradient_expected)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_max_pool_passes_nan_on(place):
  x = jnp.arange(4.0).at[place].set(jnp.nan).reshape(1, 2, 2, 1)
  assert jnp.isnan(ops.max_pool(x, (2, 2), (2, 2))).all()
