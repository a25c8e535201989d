"""Proof from the traced program that norm taps see every parameter of every example (fail closed).

The program is traced with each tapped layer marked, at the number of rows that it runs with: shapes
are static, so this is the program that runs. Taps are exact if every parameter goes into at
most one marked layer and nowhere else, and if no operation mixes examples of a batch. Examples are
followed by shape: a second trace at another number of rows tells the example axis of every array
apart, also where another axis is as long, and each operation must pass on exactly that axis. That
holds if both traces are one program: the same operations, wired alike, with parameters that differ
at most in the number of rows. A network that is another program for one of the two sizes (pairs
where the rows are even, groups where they divide, a special size) is refused. So are unknown
operations, which count as mixing, and those that this version of jax describes in an unknown way.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from fedjax_med.models.gradients import Layer

_MARK = "fedjax_med_tapped_layer"
_OTHERS = (1009, 1013)  # rows of the second trace, unlike the first: primes, which hold no groups

# Value by value, operands of one shape: examples stay where they are.
# fmt: off
_ELEMENTWISE = frozenset([
  "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
  "bitcast_convert_type", "cbrt", "ceil", "clamp", "convert_element_type", "copy", "copy_p",
  "cos", "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1",
  "floor", "ge", "gt", "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "log2",
  "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "one_minus_square",
  "optimization_barrier", "or", "pow", "reduce_precision", "rem", "round", "rsqrt", "select_n",
  "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt",
  "square", "stop_gradient", "sub", "tan", "tanh", "xor",
])
# Losing, doubling or resizing the example axis shows in the shape of the result.
_SEEN_BY_SHAPE = frozenset([
  "argmax", "argmin", "broadcast_in_dim", "concatenate", "dot_general", "dynamic_slice",
  "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum", "slice",
  "split", "squeeze", "stack", "transpose",
])
# Inner programs that run once, argument by argument. Not custom_vjp: its backward pass is hidden.
_CALLS = frozenset([
  "jit", "pjit", "closed_call", "core_call", "eval_jaxpr", "checkpoint", "remat", "remat2",
])
# fmt: on

# A parameter as a variable of the traced program: its name and how often the program runs.
Origins = dict[core.Var, tuple[str, int]]


def marked(layer: Layer, inputs: jax.Array) -> jax.Array:
  """Runs ``layer`` as one operation that ``examine`` recognises in the traced program."""

  def run(inputs, params, constants):
    return layer.forward(params, constants, inputs)

  run.__name__ = _MARK
  return jax.jit(run)(inputs, layer.params, layer.constants)


class Findings(NamedTuple):
  """Result of one pass over the traced program.

  Attributes:
    problems: phrases that say why taps would miss part of a gradient; empty if they see all of it.
    parameters: names of the parameters that go into marked layers.
    looped: paths of marked layers that run in a loop, so that one call has several gradients.
  """

  problems: tuple[str, ...]
  parameters: frozenset[str]
  looped: tuple[str, ...]


def examine(
  marked_apply: Callable[..., jax.Array],  # (params, state, inputs, key) -> logits
  params: Any,
  state: Any,
  inputs: Any,  # [any, ...], only shape and dtype are read
  rows: int,
) -> Findings:
  """Follows every parameter and the examples through the program that runs with ``rows`` rows."""
  if rows < 1:
    raise ValueError(f"rows is {rows}; a batch has one or more")
  leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  names = ["/".join(str(getattr(key, "key", key)) for key in path) for path, _ in leaves]
  sizes = int(rows), next(other for other in _OTHERS if other != rows)
  traces = []
  for size in sizes:
    batch = jax.ShapeDtypeStruct((size, *inputs.shape[1:]), inputs.dtype)
    try:
      traces.append(jax.make_jaxpr(marked_apply)(params, state, batch, jax.random.key(0)).jaxpr)
    except Exception as error:  # a user's network may raise anything
      text = f"{type(error).__name__}: {error}".splitlines()[0][:100]
      problem = f"the network cannot be traced with {size} rows ({text})"
      return Findings(problems=(problem,), parameters=frozenset(), looped=())
  origins: Origins = {var: (name, 1) for var, name in zip(traces[0].invars, names, strict=False)}
  walk = _Walk(sizes)
  walk.program(traces[0], traces[1], origins)
  pairs = list(zip(*(trace.outvars for trace in traces), strict=True))
  if any(walk.axes(one, other) != [0] for one, other in pairs):
    walk.found["the logits do not have one row an example"] = None
  for name, count in walk.uses.items():
    if count > 1:
      walk.found[f"{name} is used {'twice' if count == 2 else f'{count} times'}"] = None
  return Findings(
    problems=tuple(walk.found), parameters=frozenset(walk.uses), looped=tuple(walk.looped)
  )


class _Walk:
  """One pass over a program, which collects the uses of each parameter, and problems in order."""

  def __init__(self, sizes: tuple[int, int]):
    self.sizes = sizes
    self.uses: Counter[str] = Counter()
    self.found: dict[str, None] = {}
    self.looped: dict[str, None] = {}
    self.in_rule = False

  def program(self, first: Any, second: Any, origins: Origins) -> None:
    """Follows parameters and the example axis through both traces, inner programs included."""
    if not _wired_alike(first, second):
      self.depends()
      return
    for var in first.outvars:
      if _origin(var, origins):
        self.found[f"{origins[var][0]} is handed on by an inner program"] = None
    for eqn, twin in _live(first, second):
      try:
        self.equation(eqn, twin, origins)
      except (AttributeError, KeyError, TypeError, ValueError):  # jax describes it in another way
        place = f"{_place(eqn)} cannot be followed in jax {jax.__version__}"
        self.found[f"{place} ({eqn.primitive.name})"] = None

  def depends(self) -> None:
    rows, other = self.sizes
    self.found[f"the program depends on the batch size ({rows} rows against {other})"] = None

  def axes(self, first: Any, second: Any) -> list[int]:
    """Axes that follow the batch size; -1 stands for one that does but is not the batch size."""
    one, two = first.aval.shape, second.aval.shape
    if len(one) != len(two):
      return [-1]
    pairs = enumerate(zip(one, two, strict=True))
    return [axis if pair == self.sizes else -1 for axis, pair in pairs if pair[0] != pair[1]]

  def equation(self, eqn: Any, twin: Any, origins: Origins) -> None:
    name = eqn.primitive.name
    if name in ("jit", "pjit") and eqn.params["name"] == _MARK:
      self.layer(eqn, twin, origins)
    elif name in _CALLS:
      self.call(eqn, twin, origins)
    elif name == "custom_jvp_call":
      self.own_rule(eqn, twin, origins)
    elif name == "scan":
      self.scan(eqn, twin, origins)
    elif name == "cond":
      self.outside(eqn, eqn.invars[:1], origins)
      for one, two in zip(eqn.params["branches"], twin.params["branches"], strict=True):
        self.program(one.jaxpr, two.jaxpr, _inner(eqn.invars[1:], one.jaxpr.invars, origins))
    else:
      self.outside(eqn, eqn.invars, origins)
      operands = [self.axes(*pair) for pair in zip(eqn.invars, twin.invars, strict=True)]
      results = [self.axes(*pair) for pair in zip(eqn.outvars, twin.outvars, strict=True)]
      if not _keeps_examples_apart(eqn, operands, results):
        self.found[f"{_place(eqn)} may mix examples ({name})"] = None
      elif not _same(eqn.params, twin.params, self.sizes):
        self.depends()

  def layer(self, eqn: Any, twin: Any, origins: Origins) -> None:
    """A tapped layer: examples on axis 0 of inputs and outputs, parameters straight in."""
    rows = [(eqn.invars[0], twin.invars[0]), (eqn.outvars[0], twin.outvars[0])]
    if any(self.axes(one, two) != [0] for one, two in rows):
      self.found[f"{_place(eqn)} does not have one row an example"] = None
    for var, pair in zip(eqn.invars[1:], twin.invars[1:], strict=True):
      origin = _origin(var, origins)
      if origin:
        self.uses[origin[0]] += origin[1]
      if self.axes(var, pair):
        self.found[f"{_place(eqn)} has weights that depend on the examples"] = None

  def call(self, eqn: Any, twin: Any, origins: Origins) -> None:
    one, two = (_called(e) for e in (eqn, twin))
    if eqn.primitive.name in ("jit", "pjit"):
      # A jitted part may be a cached trace from before the layers were tapped.
      self.outside(eqn, eqn.invars, origins)
      origins = {}
    self.program(one, two, _inner(eqn.invars, one.invars, origins))

  def own_rule(self, eqn: Any, twin: Any, origins: Origins) -> None:
    """A function whose derivative is written beside it: neither may mix examples."""
    self.outside(eqn, eqn.invars, origins)
    self.program(_called(eqn), _called(twin), {})
    if not self.in_rule:  # what a rule calls is not differentiated again
      self.in_rule = True
      self.program(_with_tangents(eqn), _with_tangents(twin), {})
      self.in_rule = False

  def scan(self, eqn: Any, twin: Any, origins: Origins) -> None:
    if not _same(eqn.params, twin.params, self.sizes):
      self.depends()
    consts, carry = _scan_counts(eqn)
    one, two = eqn.params["jaxpr"].jaxpr, twin.params["jaxpr"].jaxpr
    self.outside(eqn, eqn.invars[consts : consts + carry], origins)
    outputs = list(zip(eqn.outvars, twin.outvars, strict=True))[carry:]
    for var, pair in list(zip(eqn.invars, twin.invars, strict=True))[consts + carry :] + outputs:
      if 0 in self.axes(var, pair):
        self.found[f"{_place(eqn)} goes through the examples one by one"] = None
    inner = _inner(eqn.invars, one.invars, origins)
    for var in one.invars[:consts]:
      if var in inner:  # the same weights in every turn of the loop
        inner[var] = (inner[var][0], inner[var][1] * eqn.params["length"])
    before = self.uses.total()
    self.program(one, two, {v: o for v, o in inner.items() if v not in one.invars[consts:][:carry]})
    if self.uses.total() > before:
      self.looped[_place(eqn)] = None

  def outside(self, eqn: Any, used: Any, origins: Origins) -> None:
    for var in used:
      origin = _origin(var, origins)
      if origin:
        self.found[f"{origin[0]} is used outside the layers that are covered"] = None


def _wired_alike(first: Any, second: Any) -> bool:
  """Whether two programs run the same operations in order, each on the same values.

  Without it an axis could follow the batch size in one trace and be another one in the other.
  Values of literals, as 1 / rows, may differ: they move no axis.
  """
  twins: dict[core.Var, core.Var] = {}

  def same(ones, others) -> bool:
    return len(ones) == len(others) and all(
      twins.get(one) is other if isinstance(one, core.Var) else isinstance(other, core.Literal)
      for one, other in zip(ones, others, strict=True)
    )

  def made(ones, others) -> bool:
    twins.update(zip(ones, others, strict=False))
    return len(ones) == len(others)

  return (
    len(first.eqns) == len(second.eqns)
    and made(first.constvars, second.constvars)
    and made(first.invars, second.invars)
    and all(
      eqn.primitive.name == twin.primitive.name
      and same(eqn.invars, twin.invars)
      and made(eqn.outvars, twin.outvars)
      for eqn, twin in zip(first.eqns, second.eqns, strict=True)
    )
    and same(first.outvars, second.outvars)
  )


def _same(one: Any, other: Any, sizes: tuple[int, int]) -> bool:
  """Whether parameters of an operation differ at most by the number of rows.

  Inner programs are followed for themselves, or else their operation is not known.
  """
  if isinstance(one, core.Jaxpr | core.ClosedJaxpr):
    return type(one) is type(other)
  if isinstance(one, dict):
    return one.keys() == other.keys() and all(_same(one[key], other[key], sizes) for key in one)
  if isinstance(one, list | tuple):
    return len(one) == len(other) and all(
      _same(*pair, sizes) for pair in zip(one, other, strict=True)
    )
  if type(one) is int and type(other) is int and (one, other) == sizes:
    return True
  return one is other or bool(one == other)


def _live(first: Any, second: Any) -> Iterator[tuple[Any, Any]]:
  """Pairs of operations whose results matter, in order."""
  needed = {var for var in first.outvars if isinstance(var, core.Var)}
  kept = []
  for eqn, twin in reversed(list(zip(first.eqns, second.eqns, strict=True))):
    if needed.intersection(eqn.outvars):
      needed.update(var for var in eqn.invars if isinstance(var, core.Var))
      kept.append((eqn, twin))
  return reversed(kept)


def _called(eqn: Any) -> Any:
  program = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
  return program.jaxpr if isinstance(program, core.ClosedJaxpr) else program


def _scan_counts(eqn: Any) -> tuple[int, int]:
  """Returns the number of arguments of a scan that stay the same, and of those that it carries.

  Raises KeyError or ValueError if this version of jax describes a scan in an unknown way.
  """
  if "num_consts" in eqn.params:
    return eqn.params["num_consts"], eqn.params["num_carry"]
  consts, carry, rows = (len(part) for part in eqn.params["ft_in"].unpack())  # since jax 0.11
  if consts + carry + rows != len(eqn.invars):
    raise ValueError(f"{consts}, {carry} and {rows} of {len(eqn.invars)} arguments")
  return consts, carry


def _with_tangents(eqn: Any) -> Any:
  """The program that a function with its own rule is when differentiated forwards.

  If it keeps examples apart, so does its transpose, the backward pass.
  """
  called = _called(eqn)
  outputs = [var for var in eqn.outvars if not isinstance(var, core.DropVar) and _smooth(var)]
  itself = called.replace(eqns=[eqn.replace(invars=called.invars)], outvars=outputs)
  program = core.jaxpr_as_fun(core.ClosedJaxpr(itself, ()))
  shapes = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in called.invars]
  moving = [i for i, var in enumerate(called.invars) if _smooth(var)]

  def run(values, tangents):
    def call(*some):
      replaced = dict(zip(moving, some, strict=True))
      return program(*(replaced.get(i, value) for i, value in enumerate(values)))

    return jax.jvp(call, [values[i] for i in moving], tangents)

  return jax.make_jaxpr(run)(shapes, [shapes[i] for i in moving]).jaxpr


def _smooth(var: Any) -> bool:
  return jnp.issubdtype(var.aval.dtype, jnp.inexact)


def _origin(var: Any, origins: Origins) -> tuple[str, int] | None:
  return origins.get(var) if isinstance(var, core.Var) else None


def _inner(outer: Any, inner: Any, origins: Origins) -> Origins:
  """The origins of an inner program's arguments."""
  pairs = ((var, _origin(arg, origins)) for arg, var in zip(outer, inner, strict=True))
  return {var: origin for var, origin in pairs if origin}


def _place(eqn: Any) -> str:
  return str(eqn.source_info.name_stack) or "the model"


def _keeps_examples_apart(eqn: Any, operands: list[list[int]], results: list[list[int]]) -> bool:
  """Whether each result row depends on the operand rows of the same example only.

  ``operands`` and ``results`` are the axes of each that follow the batch size.
  """
  if not any(operands):
    return all(len(axes) <= 1 and -1 not in axes for axes in results)
  if any(len(axes) > 1 or -1 in axes for axes in operands):
    return False
  if any(len(axes) != 1 or -1 in axes for axes in results):
    return False
  name, params, axes = eqn.primitive.name, eqn.params, [a[0] if a else None for a in operands]
  if name in _ELEMENTWISE or name in _SEEN_BY_SHAPE:
    return True
  axis, shape = axes[0], eqn.invars[0].aval.shape
  if name == "reshape":
    # As many values before the example axis as there were: the axis was not cut and re-formed.
    return math.prod(shape[:axis]) == math.prod(eqn.outvars[0].aval.shape[: results[0][0]])
  if name == "rev":
    return axis not in params["dimensions"]
  if name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"):
    return axis != params["axis"]
  if name == "sort":
    return params["dimension"] not in axes
  if name == "top_k":
    return axis != params["axis"] % len(shape)
  if name == "pad":
    return axis is not None and tuple(params["padding_config"][axis]) == (0, 0, 0)
  if name.startswith("reduce_window"):
    still = {"window_dimensions": 1, "window_strides": 1, "padding": (0, 0)}
    return axis is not None and all(params[key][axis] == value for key, value in still.items())
  if name == "conv_general_dilated":
    numbers = params["dimension_numbers"]
    return axes == [numbers.lhs_spec[0], None] and results[0] == [numbers.out_spec[0]]
  if name == "gather":
    numbers = params["dimension_numbers"]
    if axis is None or axis in numbers.operand_batching_dims:
      return True
    return params["slice_sizes"][axis] == shape[axis]
  return False
