"""Rules across examples that depend on the number of rows are refused at the sizes that run."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from fedjax_med.core.config import ModelConfig
from fedjax_med.core.keys import base_key
from fedjax_med.models import coverage
from fedjax_med.models.model import from_flax
from fedjax_med.models.registry import create_model
from fedjax_med.privacy.clipping import Rows, clipped_sum, resolve_method, uncovered
from fedjax_med.tasks.classification import cross_entropy
from tests.models.test_model import Inner, Wrapped

SIZE = 16  # features, as many as the rows of some batches
ROWS = (1, 2, 3, 4, 5, 8, 12, 15, 16, 24, 1009)
Rule = Callable[[jax.Array], jax.Array]


def groups(number: int) -> Rule:
  """Batch norm over ``number`` rows at a time."""

  def normed(x):
    ghost = x.reshape(-1, number, x.shape[1])
    return (ghost - ghost.mean(1, keepdims=True)).reshape(x.shape)

  return lambda x: x if x.shape[0] % number else normed(x)


def pair_deviation(x):
  """The last layer of StyleGAN's discriminator, left out where the batch is odd."""
  if x.shape[0] % 2:
    return x
  pairs = x.reshape(2, -1, x.shape[1])
  spread = jnp.sqrt(jnp.square(pairs - pairs.mean(0, keepdims=True)).mean(0) + 1e-8)
  return x + jnp.tile(spread.mean(1, keepdims=True), (2, 1))


def halves(x):
  """Images and their reconstructions in one batch."""
  if x.shape[0] % 2:
    return x
  first, second = jnp.split(x, 2)
  return jnp.concatenate([first - second, second])


def one_size(x):
  return x - x.mean(0, keepdims=True) if x.shape[0] == 16 else x


def another_operand(x):
  """As many operations at each size, but rows and features are exchanged at one of them."""
  grid = x[:, :, None] + jnp.cos(x)[:, None, :]
  turned = jnp.transpose(grid, (1, 0, 2))
  return (turned if x.shape[0] == SIZE else grid).sum(2)


def another_order(x):
  """The same, by a parameter of one operation."""
  grid = x[:, :, None] + jnp.cos(x)[:, None, :]
  return jnp.transpose(grid, (1, 0, 2) if x.shape[0] == SIZE else (0, 2, 1)).sum(2)


def only_whole_groups(x):
  """Does not run where 16 is no divisor of the rows, but for one row alone."""
  if x.shape[0] == 1:
    return x
  grouped = x.reshape(x.shape[0] // 16, 16, x.shape[1])
  return (grouped - grouped.mean(1, keepdims=True)).reshape(x.shape)


# The rule, and whether it looks across a batch of so many rows.
RULES: dict[str, tuple[Rule, Callable[[int], bool]]] = {
  "standard deviation of pairs": (pair_deviation, lambda rows: rows % 2 == 0),
  "halves": (halves, lambda rows: rows % 2 == 0),
  "groups of 3": (groups(3), lambda rows: rows % 3 == 0),
  "groups of 4": (groups(4), lambda rows: rows % 4 == 0),
  "groups of 8": (groups(8), lambda rows: rows % 8 == 0),
  "16 rows": (one_size, lambda rows: rows == 16),
  "another operand": (another_operand, lambda rows: rows == SIZE),
  "another order": (another_order, lambda rows: rows == SIZE),
}


def problems(rule: Rule, rows: int) -> str:
  model = from_flax(Wrapped(lambda m, x, train: rule(x)))
  image = jax.ShapeDtypeStruct((1, SIZE), jnp.float32)
  params, state = jax.eval_shape(model.init, jax.random.key(0), image)
  return "; ".join(model.uncovered(params, state, image, rows)["book_keeping"])


def leak(rule: Rule, rows: int) -> float:
  """What a change of the last row does to others."""
  x = jnp.asarray(np.random.default_rng(rows).normal(size=(rows, SIZE)), jnp.float32)
  return float(jnp.abs(rule(x.at[-1].add(1.0)) - rule(x))[:-1].max(initial=0))


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_refused_at_exactly_the_sizes_at_which_it_looks_across_the_batch(name):
  rule, across = RULES[name]
  for rows in ROWS:
    found = problems(rule, rows)
    assert bool(found) == across(rows), (rows, found)
    assert found or leak(rule, rows) == 0


@pytest.mark.parametrize("rows", [8, 16, 17])
def test_a_network_that_does_not_run_at_the_other_size_is_refused_and_none_crashes(rows):
  found = problems(only_whole_groups, rows)
  size = 17 if rows == 17 else 8 if rows == 8 else 1009
  assert f"the network cannot be traced with {size} rows (TypeError: " in found


def test_the_reason_names_both_sizes():
  assert problems(one_size, 16) == "the program depends on the batch size (16 rows against 1009)"
  assert "1009 rows against 1013" in problems(lambda x: x[:, ::-1] if len(x) == 1009 else x, 1009)


@pytest.mark.parametrize(
  "name", ["standard deviation of pairs", "groups of 8", "16 rows", "another operand"]
)
def test_auto_clips_unit_by_unit_where_a_rule_would_carry_a_record_past_the_clip_norm(name):
  rule, _ = RULES[name]
  model = from_flax(Wrapped(lambda m, x, train: rule(Inner()(x) @ jnp.ones((4, SIZE)))))
  x = jnp.asarray(np.random.default_rng(0).normal(size=(16, SIZE)), jnp.float32)
  params, state = model.init(base_key(0), x[:1])
  method, reason = resolve_method("auto", uncovered(model, params, state, x, len(x)))
  assert method == "reference"
  assert "batch size" in reason

  @jax.jit
  def total(x, present):
    rows, clip_norm = Rows(x, jnp.arange(16) % 2, present), jnp.float32(0.1)
    arguments = (model, cross_entropy(0.0), params, state, rows, clip_norm, None)
    return ravel_pytree(clipped_sum(method, *arguments)[0])[0]

  present = jnp.ones(16, bool)
  moved = total(x, present) - total(x, present.at[3].set(False))
  assert float(jnp.linalg.norm(moved)) <= 0.1 * (1 + 1e-4)


def broadcast(x):
  """One row less to copy where there is one row, and so another program."""
  return x + jnp.broadcast_to(jnp.cos(jnp.zeros((1, SIZE))), x.shape)


def test_one_row_mixes_with_none_and_what_cannot_be_followed_there_is_refused():
  assert problems(lambda x: nn.softmax(x.reshape(-1, 4, 4)).reshape(-1, SIZE), 1) == ""
  assert "batch size" in problems(broadcast, 1)
  assert problems(lambda x: jnp.squeeze(x[None]), 1) != ""


def test_no_rows_are_no_batch():
  with pytest.raises(ValueError, match="rows is 0; a batch has one or more"):
    coverage.examine(lambda *_: jnp.zeros((0, 2)), {}, {}, jnp.zeros((1, SIZE)), 0)


@pytest.mark.parametrize(
  "name",
  [
    "linear", "mlp", "cnn_small", "se_resnext_micro",
    pytest.param("fedxnet", marks=pytest.mark.slow),
  ],
)  # fmt: skip
def test_networks_are_covered_whatever_the_number_of_rows(name):
  model = create_model(ModelConfig(name, dropout=0.0 if name == "linear" else 0.1), 2)
  image = jax.ShapeDtypeStruct((1, 32, 32, 1), jnp.float32)
  params, state = jax.eval_shape(model.init, jax.random.key(0), image)
  for rows in (2, 7, 16, 32, 96):
    assert not any(model.uncovered(params, state, image, rows).values())
