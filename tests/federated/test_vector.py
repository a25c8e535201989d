"""Trees as vectors: nothing is lost, and layers can be taken out and put back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from fedjax_med.federated.vector import layout_of, merge, ravel, select, unravel

TREE = {"b": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}, "a": jnp.zeros(())}


def test_a_vector_is_that_of_jax_and_gives_its_tree_back():
  vector, layout = ravel(TREE), layout_of(TREE)
  np.testing.assert_array_equal(vector, ravel_pytree(TREE)[0])
  assert layout.size == vector.size
  assert layout.names == ("a", "b/bias", "b/kernel")
  jax.tree.map(np.testing.assert_array_equal, unravel(vector, layout), TREE)


def test_a_tree_without_arrays_is_an_empty_vector():
  assert ravel({}).shape == (0,)
  assert unravel(ravel({}), layout_of({})) == {}


def test_a_leaf_that_is_not_float32_is_refused_with_its_name():
  with pytest.raises(ValueError, match=r"\['b'\] is int32, not float32"):
    layout_of({"a": jnp.ones(2), "b": jnp.ones(2, jnp.int32)})


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=6))
def test_marked_leaves_are_taken_out_in_order_and_put_back(leaves):
  random = np.random.default_rng(0)
  tree = [random.normal(size=size).astype(np.float32) for size, _ in leaves]
  marks = tuple(mark for _, mark in leaves)
  others = tuple(not mark for mark in marks)
  layout = layout_of(tree)
  vector = ravel(tree)
  marked = select(vector, layout, marks)
  chosen = [leaf for leaf, mark in zip(tree, marks, strict=True) if mark]
  np.testing.assert_array_equal(marked, np.concatenate([np.zeros(0, np.float32), *chosen]))
  back = merge(marked, select(vector, layout, others), layout, marks)
  np.testing.assert_array_equal(back, vector)
