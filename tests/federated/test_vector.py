"""Trees as vectors: nothing is lost, and layers can be taken out and put back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from fedjax_med.federated import vector as vectors
from fedjax_med.federated.vector import (
  ARRAYS,
  PIECES,
  cut,
  joined,
  merge,
  opened,
  pieces_of,
  ravel,
  select,
  spec_of,
  unravel,
)

TREE = {"b": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}, "a": jnp.zeros(())}


def test_a_vector_is_that_of_jax_and_gives_its_tree_back():
  vector, spec = ravel(TREE), spec_of(TREE)
  np.testing.assert_array_equal(vector, ravel_pytree(TREE)[0])
  assert spec.size == vector.size
  assert spec.names == ("a", "b/bias", "b/kernel")
  jax.tree.map(np.testing.assert_array_equal, unravel(vector, spec), TREE)


def test_a_tree_without_arrays_is_an_empty_vector():
  assert ravel({}).shape == (0,)
  assert unravel(ravel({}), spec_of({})) == {}


def test_a_leaf_that_is_not_float32_is_refused_with_its_name():
  with pytest.raises(ValueError, match=r"\['b'\] is int32, not float32"):
    spec_of({"a": jnp.ones(2), "b": jnp.ones(2, jnp.int32)})


@pytest.fixture
def small_is_two(monkeypatch):
  """Arrays of more than two numbers are large."""
  monkeypatch.setattr(vectors, "SMALL", 2)


def test_small_arrays_come_first_and_names_and_shapes_follow(small_is_two):
  spec = spec_of(TREE | {"c": jnp.full(2, 7.0)})
  assert spec.names == ("a", "c", "b/bias", "b/kernel")
  assert spec.shapes == ((), (2,), (3,), (2, 3))
  vector = ravel(TREE | {"c": jnp.full(2, 7.0)})
  np.testing.assert_array_equal(vector[:6], [0, 7, 7, 1, 1, 1])


@pytest.mark.parametrize("names", ["a", "abc", "ab", "b"])
def test_pieces_are_the_small_arrays_as_one_and_each_large_one(small_is_two, names):
  tree = {"a": jnp.arange(2.0), "b": jnp.arange(6.0).reshape(2, 3), "c": jnp.full((1, 1), 9.0)}
  tree = {name: tree[name] for name in names}
  spec, vector, pieces = spec_of(tree), ravel(tree), pieces_of(tree)
  assert [piece.shape for piece in pieces] == [
    (sum(tree[name].size for name in names if name != "b"),),
    *([(2, 3)] if "b" in names else []),
  ]
  np.testing.assert_array_equal(joined(pieces), vector)
  jax.tree.map(np.testing.assert_array_equal, cut(vector, spec), pieces)
  jax.tree.map(np.testing.assert_array_equal, opened(pieces, spec), tree)


LEAVES = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=6)


@pytest.mark.parametrize("small", [0, 2, 2**14])
@settings(
  deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(leaves=LEAVES)
def test_marked_arrays_are_taken_out_in_order_and_put_back(monkeypatch, small, leaves):
  monkeypatch.setattr(vectors, "SMALL", small)
  random = np.random.default_rng(0)
  tree = {f"{k}": random.normal(size=size).astype(np.float32) for k, (size, _) in enumerate(leaves)}
  marked_names = {f"{k}" for k, (_, mark) in enumerate(leaves) if mark}
  spec, vector = spec_of(tree), ravel(tree)
  marks = tuple(name in marked_names for name in spec.names)
  others = tuple(not mark for mark in marks)
  marked = select(vector, spec, marks)
  parts = [tree[name] for name in spec.names if name in marked_names]
  np.testing.assert_array_equal(marked, np.concatenate([np.zeros(0, np.float32), *parts]))
  back = merge(marked, select(vector, spec, others), spec, marks)
  np.testing.assert_array_equal(back, vector)
  for holding in (PIECES, ARRAYS):
    ours, negated = holding.cut(vector, spec), holding.cut(-vector, spec)
    mixed = holding.chosen(ours, negated, spec, marks)
    expected = {name: leaf if name in marked_names else -leaf for name, leaf in tree.items()}
    jax.tree.map(np.testing.assert_array_equal, holding.opened(mixed, spec), expected)
    np.testing.assert_array_equal(holding.joined(mixed), ravel(expected))
