"""Network operations as matrix products, which stay fast when every client has its own kernel.

Shapes: B images of H x W pixels and C channels; H' x W' output positions. Sizes, strides, dilations
are (height, width); padding is ((top, bottom), (left, right)), in pixels. Everything is a pure
function that may be vmapped and differentiated. No product that is summed has more than four axes:
XLA's CPU backend in jaxlib 0.10.2 and 0.11.0 crashes on float32 sums of products with seven or more
(jax issues 39257, 40412), and vmaps over clients and sweeps add two.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import custom_batching, lax

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]
Lowering = Literal["auto", "matmul", "native"]

NO_PADDING: Padding = ((0, 0), (0, 0))

# Groups narrower than this are merged, two 8-channel groups into one 16-channel product with zeros
# off the diagonal: wasted multiplications, but twice as fast on a CPU as 32 very thin products.
_MERGED_WIDTH = 16

# On a CPU XLA's own convolution is faster from so many inputs of an output (forward), and from so
# many channels of the image (its gradient); below, most of its vector lanes are empty.
_NATIVE_FAN_IN = 32
_NATIVE_CHANNELS = 16


class Geometry(NamedTuple):
  """A convolution without the sizes of its arrays.

  Attributes:
    window: rows and columns of the kernel.
    strides: distance of the output positions.
    padding: (before, after) pixels of rows and of columns.
    dilation: distance of the kernel's entries.
    groups: groups of channels.
  """

  window: Pair
  strides: Pair = (1, 1)
  padding: Padding = NO_PADDING
  dilation: Pair = (1, 1)
  groups: int = 1

  @property
  def pointwise(self) -> bool:
    """Whether it is one matrix product for all channels at each position."""
    return self.window == (1, 1) and self.groups == 1

  @property
  def plain(self) -> bool:
    """Whether XLA's own convolution may be the faster one: neither grouped nor dilated."""
    return not self.pointwise and self.groups == 1 and self.dilation == (1, 1)


def accumulator(dtype: Any) -> Any:
  """float32, or ``dtype`` if wider; jnp.promote_types would refuse under strict promotion."""
  return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def output_size(
  size: Pair, window: Pair, strides: Pair, padding: Padding, dilation: Pair = (1, 1)
) -> Pair:
  """Output positions of a sliding window: floor((n + padding - d (k - 1) - 1) / s) + 1 a side."""
  height, width = (
    (n + sum(pad) - d * (k - 1) - 1) // s + 1
    for n, k, s, pad, d in zip(size, window, strides, padding, dilation, strict=True)
  )
  return height, width


def shifted_views(
  inputs: jax.Array,  # [B, H, W, C]
  window: Pair,
  strides: Pair = (1, 1),
  padding: Padding = NO_PADDING,
  dilation: Pair = (1, 1),
  fill: float = 0.0,
) -> Iterator[tuple[int, int, jax.Array]]:
  """Yields (row, column, view [B, H', W', C]) for each shift of the window, row by row.

  The view at (i, j) holds the factors of kernel entry [i, j] at every output position; pixels
  outside the image read ``fill``.
  """
  height, width = output_size(
    (inputs.shape[1], inputs.shape[2]), window, strides, padding, dilation
  )
  if padding != NO_PADDING:
    edges = ((0, 0, 0), (*padding[0], 0), (*padding[1], 0), (0, 0, 0))
    inputs = lax.pad(inputs, jnp.asarray(fill, inputs.dtype), edges)
  batch, _, _, channels = inputs.shape
  for i in range(window[0]):
    for j in range(window[1]):
      top, left = i * dilation[0], j * dilation[1]
      bottom = top + (height - 1) * strides[0] + 1
      right = left + (width - 1) * strides[1] + 1
      view = lax.slice(
        inputs, (0, top, left, 0), (batch, bottom, right, channels), (1, *strides, 1)
      )
      yield i, j, view


def _views(inputs: jax.Array, geometry: Geometry) -> Iterator[tuple[int, int, jax.Array]]:
  """The shifted views of a convolution."""
  return shifted_views(
    inputs, geometry.window, geometry.strides, geometry.padding, geometry.dilation
  )


def patches(
  inputs: jax.Array,  # [B, H, W, C]
  window: Pair,
  strides: Pair = (1, 1),
  padding: Padding = NO_PADDING,
  dilation: Pair = (1, 1),
) -> jax.Array:  # [B, H', W', kh * kw * C]
  """The window's content at each output position (im2col), ordered like a kernel's axes."""
  views = shifted_views(inputs, window, strides, padding, dilation)
  return jnp.concatenate([view for _, _, view in views], axis=-1)


def conv(
  inputs: jax.Array,  # [B, H, W, C_in]
  kernel: jax.Array,  # [kh, kw, C_in / groups, C_out], dtype of inputs
  *,
  strides: Pair = (1, 1),
  padding: Padding = NO_PADDING,
  dilation: Pair = (1, 1),
  groups: int = 1,
  lowering: Lowering = "auto",
) -> jax.Array:  # [B, H', W', C_out], dtype of inputs
  """Cross-correlation, summed in at least float32.

  'native' is XLA's convolution, which under vmap over kernels becomes one with clients x groups
  groups, hundreds of times slower than need be on a CPU. 'matmul' is a dot for 1x1 kernels, a sum
  over the window's shifts for depthwise ones (a group for each channel, in and out), and one
  batched product of patches and kernel, groups leading, for all others. 'auto' chooses for output,
  input gradient and kernel gradient apart: native where no vmap gives each image or client a kernel
  of its own (nor adds any other axis) and the shapes are those at which it won on a CPU core. All
  agree to rounding.
  """
  geometry = Geometry(
    window=(kernel.shape[0], kernel.shape[1]),
    strides=strides,
    padding=padding,
    dilation=dilation,
    groups=groups,
  )
  if lowering == "native":
    return _native(inputs, kernel, geometry)
  return _conv_once(inputs, kernel, geometry, lowering == "auto")


def _native(inputs: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
  return lax.conv_general_dilated(
    inputs,
    kernel,
    geometry.strides,
    geometry.padding,
    rhs_dilation=geometry.dilation,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=geometry.groups,
  )


# The two gradients below are convolutions of NHWC images with HWIO kernels. XLA's own have the axes
# in another order, and are then 20 to 60 times slower inside a loop on a CPU (jax issue 12868).


def _native_input_gradient(
  kernel: jax.Array, cotangent: jax.Array, geometry: Geometry
) -> jax.Array:
  """With strides 1: the cotangent under the kernel turned by 180 degrees."""
  (kh, kw), ((top, bottom), (left, right)) = geometry.window, geometry.padding
  turned = kernel[::-1, ::-1].swapaxes(2, 3)
  padding = ((kh - 1 - top, kh - 1 - bottom), (kw - 1 - left, kw - 1 - right))
  return _native(cotangent, turned, Geometry(geometry.window, padding=padding))


def _native_kernel_gradient(
  inputs: jax.Array, cotangent: jax.Array, geometry: Geometry
) -> jax.Array:  # [1, kh, kw, C_in, C_out]
  """Channels as images, images as channels, and the cotangent as kernel."""
  images, kernel = inputs.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3)
  window, (kh, kw) = (kernel.shape[0], kernel.shape[1]), geometry.window
  slide = Geometry(window, padding=geometry.padding, dilation=geometry.strides)
  return _native(images, kernel, slide)[:, :kh, :kw].transpose(1, 2, 0, 3)[None]


def _unless_vmapped(native: Callable[..., jax.Array], products: Callable[..., jax.Array]):
  """``native``, or ``products`` where a vmap gives some argument another axis."""
  run = custom_batching.custom_vmap(native)

  @run.def_vmap
  def _(axis_size, in_batched, *args):
    del axis_size
    axes = [0 if batched else None for batched in in_batched]
    return jax.vmap(products, axes)(*args), True

  return run


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(inputs: jax.Array, kernel: jax.Array, geometry: Geometry, mixed: bool) -> jax.Array:
  products = functools.partial(_convolve, geometry=geometry)
  fan_in = math.prod(kernel.shape[:3])
  if mixed and geometry.plain and _is_float32(inputs) and fan_in >= _NATIVE_FAN_IN:
    return _unless_vmapped(functools.partial(_native, geometry=geometry), products)(inputs, kernel)
  return products(inputs, kernel)


def _is_float32(values: jax.Array) -> bool:
  """At least; sums of bfloat16 products would be rounded to it by a native convolution."""
  return accumulator(values.dtype) == values.dtype


def _convolve(inputs: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
  if geometry.pointwise:
    ((_, _, view),) = _views(inputs, geometry)
    return _einsum("byxc,cp->byxp", view, kernel[0, 0])
  if _depthwise(geometry, inputs.shape[3], kernel.shape[3]):
    dtype = accumulator(inputs.dtype)
    shifts = (
      view.astype(dtype) * kernel[i, j, 0].astype(dtype)[None, None, None]
      for i, j, view in _views(inputs, geometry)
    )
    return functools.reduce(jnp.add, shifts).astype(inputs.dtype)
  merged = _merged_groups(geometry.groups, kernel.shape[2])
  blocks = _kernel_blocks(kernel, geometry.groups, merged)  # [G, kh * kw * c, p]
  out = _einsum("gtd,gdp->gtp", columns(inputs, geometry, merged), blocks)
  size = output_size(
    (inputs.shape[1], inputs.shape[2]),
    geometry.window,
    geometry.strides,
    geometry.padding,
    geometry.dilation,
  )
  out = out.reshape(out.shape[0], inputs.shape[0], *size, out.shape[2])
  return out.transpose(1, 2, 3, 0, 4).reshape(inputs.shape[0], *size, -1)


def _conv_forward(inputs, kernel, geometry, mixed):
  return _conv(inputs, kernel, geometry, mixed), (inputs, kernel)


def _conv_backward(geometry, mixed, residuals, cotangent):
  """Forms the patches again rather than keep them: k² times the memory of the inputs."""
  inputs, kernel = residuals

  shape = jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)

  def products(kernel, cotangent):
    return jax.linear_transpose(lambda x: _convolve(x, kernel, geometry), shape)(cotangent)[0]

  within = all(max(pad) < k for pad, k in zip(geometry.padding, geometry.window, strict=True))
  if (
    mixed
    and geometry.plain
    and geometry.strides == (1, 1)
    and within
    and _is_float32(inputs)
    and inputs.shape[3] >= _NATIVE_CHANNELS
  ):
    native = functools.partial(_native_input_gradient, geometry=geometry)
    d_inputs = _unless_vmapped(native, products)(kernel, cotangent)
  else:
    d_inputs = products(kernel, cotangent)
  lowering = "auto" if mixed else "matmul"
  d_kernel = conv_gradients(inputs, cotangent, geometry, units=1, lowering=lowering)[0]
  return d_inputs, d_kernel.astype(kernel.dtype)


_conv.defvjp(_conv_forward, _conv_backward)
_conv_once = jax.jit(_conv, static_argnums=(2, 3), inline=True)


@functools.partial(jax.jit, static_argnames=("geometry", "units", "lowering"), inline=True)
def conv_gradients(
  inputs: jax.Array,  # [B, H, W, C_in]
  cotangent: jax.Array,  # [B, H', W', C_out], dtype of inputs
  geometry: Geometry,
  *,
  units: int,
  lowering: Lowering = "auto",
) -> jax.Array:  # [units, kh, kw, C_in / groups, C_out], at least float32
  """Gradient of the kernel, summed over each of ``units`` equal runs of images.

  One unit gives the gradient of the batch, B units one of every image. ``lowering`` as in ``conv``.
  """
  products = functools.partial(_conv_gradients, geometry=geometry, units=units)
  if units > 1 or lowering == "matmul" or not (geometry.plain and _is_float32(inputs)):
    return products(inputs, cotangent)

  native = functools.partial(_native_kernel_gradient, geometry=geometry)
  return _unless_vmapped(native, products)(inputs, cotangent)


def _conv_gradients(
  inputs: jax.Array, cotangent: jax.Array, geometry: Geometry, units: int
) -> jax.Array:
  groups, (kh, kw) = geometry.groups, geometry.window
  width_in, width_out = inputs.shape[3] // groups, cotangent.shape[3] // groups
  if geometry.pointwise:
    ((_, _, view),) = _views(inputs, geometry)
    rows = view.reshape(units, -1, width_in)
    out = _product("utd,utp->udp", rows, cotangent.reshape(units, -1, width_out))
    return out[:, None, None]
  if _depthwise(geometry, inputs.shape[3], cotangent.shape[3]):
    dtype = accumulator(inputs.dtype)
    errors = cotangent.astype(dtype).reshape(units, -1, groups)
    rows = [
      (view.astype(dtype).reshape(units, -1, groups) * errors).sum(1)
      for _, _, view in _views(inputs, geometry)
    ]
    return jnp.stack(rows, axis=1).reshape(units, kh, kw, 1, groups)
  merged = _merged_groups(groups, width_in)
  count = groups // merged
  # Groups and units are one batch axis: vmaps over clients and sweeps stay within the limit.
  rows = columns(inputs, geometry, merged).reshape(count * units, -1, kh * kw * merged * width_in)
  errors = by_group(cotangent, count).reshape(count * units, -1, merged * width_out)
  blocks = _product("ntd,ntp->ndp", rows, errors)
  blocks = blocks.reshape(count, units, kh * kw, merged, width_in, merged, width_out)
  diagonal = jnp.stack([blocks[:, :, :, m, :, m] for m in range(merged)])  # [m, G, U, k², c, p]
  return diagonal.transpose(2, 3, 4, 1, 0, 5).reshape(units, kh, kw, width_in, groups * width_out)


def by_group(values: jax.Array, groups: int) -> jax.Array:
  """[B, H, W, C] -> [groups, B, H, W, C / groups]."""
  split = values.reshape(*values.shape[:3], groups, -1)
  return split.transpose(3, 0, 1, 2, 4)


def columns(inputs: jax.Array, geometry: Geometry, merged: int = 1) -> jax.Array:
  """Patches with the groups leading: [G / merged, B * H' * W', kh * kw * merged * C / G]."""
  groups = geometry.groups // merged
  grouped = by_group(inputs, groups)
  covered = patches(
    grouped.reshape(-1, *grouped.shape[2:]),
    geometry.window,
    geometry.strides,
    geometry.padding,
    geometry.dilation,
  )
  return covered.reshape(groups, -1, covered.shape[3])


def max_pool(
  inputs: jax.Array,  # [B, H, W, C]
  window: Pair,
  strides: Pair,
  padding: Padding = NO_PADDING,
) -> jax.Array:  # [B, H', W', C]
  """Maximum under each window; outside the image counts as minus infinity, and NaN wins.

  Of equal pixels the first, row by row, receives the whole gradient, as in reduce_window. Columns
  then rows, each a chain of selects: seven times faster than reduce_window on a CPU.
  """
  across = _first_maximum(inputs, (1, window[1]), (1, strides[1]), ((0, 0), padding[1]))
  return _first_maximum(across, (window[0], 1), (strides[0], 1), (padding[0], (0, 0)))


def _first_maximum(inputs: jax.Array, window: Pair, strides: Pair, padding: Padding) -> jax.Array:
  (_, _, best), *others = shifted_views(inputs, window, strides, padding, fill=-math.inf)
  for _, _, view in others:
    best = jnp.where((view > best) | jnp.isnan(view), view, best)
  return best


def _depthwise(geometry: Geometry, channels_in: int, channels_out: int) -> bool:
  """Whether every channel has a kernel of its own: too thin for products."""
  return geometry.groups == channels_in == channels_out


def _merged_groups(groups: int, width: int) -> int:
  """Number of neighbouring groups of ``width`` input channels that become one product."""
  fitting = [m for m in range(1, groups + 1) if groups % m == 0 and m * width <= _MERGED_WIDTH]
  return max(fitting, default=1)


def _kernel_blocks(kernel: jax.Array, groups: int, merged: int) -> jax.Array:
  """[kh, kw, c, C_out] -> one matrix [kh * kw * c', p'] per block of merged narrow groups."""
  shifts, width_in = math.prod(kernel.shape[:2]), kernel.shape[2]
  width_out = kernel.shape[3] // groups
  blocks = kernel.reshape(shifts, width_in, groups // merged, merged, width_out)
  # Zeros off the diagonal by padding, not by a product with an identity: its gradient is a slice.
  rows = [
    jnp.pad(
      blocks[:, :, :, m], ((0, 0), (0, 0), (0, 0), (m * width_out, (merged - 1 - m) * width_out))
    )
    for m in range(merged)
  ]
  return (
    jnp.concatenate(rows, axis=1)
    .transpose(2, 0, 1, 3)
    .reshape(groups // merged, shifts * merged * width_in, merged * width_out)
  )


def _einsum(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
  """Einsum summed in at least float32, in the dtype of ``left``."""
  return _product(equation, left, right).astype(left.dtype)


def _product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
  """Einsum in at least float32."""
  return jnp.einsum(equation, left, right, preferred_element_type=accumulator(left.dtype))
