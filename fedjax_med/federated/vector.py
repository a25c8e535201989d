"""The weights of a network as one vector: what travels, is noised and is aggregated is an array."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Tree = Any  # a pytree of arrays


class Layout(NamedTuple):
  """Places of a tree's arrays in its vector: one after the other, in the order of the leaves.

  Attributes:
    structure: treedef of the tree.
    shapes: shape of each leaf.
    names: path of each leaf, such as head/kernel.
  """

  structure: Any
  shapes: tuple[tuple[int, ...], ...]
  names: tuple[str, ...]

  @property
  def sizes(self) -> tuple[int, ...]:
    """Numbers in each leaf."""
    return tuple(math.prod(shape) for shape in self.shapes)

  @property
  def size(self) -> int:
    """Numbers in the vector."""
    return sum(self.sizes)


def layout_of(tree: Tree) -> Layout:
  """The layout of a tree of arrays or shapes.

  Raises:
    ValueError: a leaf is not float32.
  """
  leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
  for path, leaf in leaves:
    if leaf.dtype != jnp.float32:
      raise ValueError(f"{jax.tree_util.keystr(path)} is {leaf.dtype}, not float32")
  names = tuple("/".join(str(getattr(key, "key", key)) for key in path) for path, _ in leaves)
  return Layout(
    structure=structure, shapes=tuple(tuple(leaf.shape) for _, leaf in leaves), names=names
  )


class NetworkLayout(NamedTuple):
  """Layouts of a network's two vectors.

  Attributes:
    params: layout of the trained weights.
    state: layout of the non-trained state.
  """

  params: Layout
  state: Layout

  def trees(self, params: jax.Array, state: jax.Array) -> tuple[Tree, Tree]:
    """The network's arrays, unravelled from its two vectors."""
    return unravel(params, self.params), unravel(state, self.state)


def network_layout(params: Tree, state: Tree) -> NetworkLayout:
  """The layout of a network's arrays or shapes."""
  return NetworkLayout(params=layout_of(params), state=layout_of(state))


def ravel(tree: Tree) -> jax.Array:
  """The arrays of a tree one after the other, [P] float32; [0] of a tree without any."""
  leaves = jax.tree.leaves(tree)
  if not leaves:
    return jnp.zeros((0,), jnp.float32)
  return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])


def unravel(vector: jax.Array, layout: Layout) -> Tree:
  """The tree of a vector [P]."""
  leaves = [
    part.reshape(shape)
    for part, shape in zip(_split(vector, layout.sizes), layout.shapes, strict=True)
  ]
  return jax.tree.unflatten(layout.structure, leaves)


def select(vector: jax.Array, layout: Layout, marks: Sequence[bool]) -> jax.Array:
  """The marked leaves of a vector, one after the other.

  Args:
    vector: [P].
    layout: layout of the vector.
    marks: one mark for each leaf.
  """
  parts = [part for part, mark in _runs(vector, layout, marks) if mark]
  return jnp.concatenate(parts) if parts else vector[:0]


def merge(marked: jax.Array, others: jax.Array, layout: Layout, marks: Sequence[bool]) -> jax.Array:
  """The vector [P] whose marked leaves are ``marked``, and the rest ``others``, both in order."""
  sizes = [(mark, sum(size for _, size in run)) for mark, run in _grouped(layout, marks)]
  parts = {
    True: iter(_split(marked, [size for mark, size in sizes if mark])),
    False: iter(_split(others, [size for mark, size in sizes if not mark])),
  }
  return jnp.concatenate([next(parts[mark]) for mark, _ in sizes])


def _grouped(layout: Layout, marks: Sequence[bool]):
  """(mark, [(mark, size)]) of neighbours that share a mark, as lists."""
  pairs = zip(marks, layout.sizes, strict=True)
  return [(mark, list(run)) for mark, run in itertools.groupby(pairs, key=lambda pair: pair[0])]


def _runs(vector: jax.Array, layout: Layout, marks: Sequence[bool]) -> list[tuple[jax.Array, bool]]:
  sizes = [(mark, sum(size for _, size in run)) for mark, run in _grouped(layout, marks)]
  parts = _split(vector, [size for _, size in sizes])
  return [(part, mark) for part, (mark, _) in zip(parts, sizes, strict=True)]


def _split(vector: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
  ends = list(itertools.accumulate(sizes))
  return [vector[end - size : end] for size, end in zip(sizes, ends, strict=True)]
