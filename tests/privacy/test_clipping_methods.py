"""What each method of clipping covers and computes, and which one a config gets."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from fedjax_med.core.errors import UserError
from fedjax_med.models.gradients import keeps_factors
from fedjax_med.models.model import from_flax
from fedjax_med.privacy.clipping import METHODS, Rows, clipped_sum, resolve_method
from tests.privacy.clipping_cases import CASES, NUM_CLASSES, loss, setting


class Layer(nn.Module):
  """A dense layer and a nonlinearity, as nn.scan wants it."""

  @nn.compact
  def __call__(self, x, _):
    return jnp.tanh(nn.Dense(40)(x)), None


class Wide(nn.Module):
  """Three such layers under nn.scan."""

  @nn.compact
  def __call__(self, x):
    stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    return nn.Dense(NUM_CLASSES)(stack()(x, None)[0])


@pytest.mark.parametrize("name", CASES)
def test_every_layer_is_covered_and_a_loop_by_taps_alone(name):
  params, state, inputs, _ = setting(name)
  model = from_flax(CASES[name][0])
  reasons = model.uncovered(params, state, inputs, len(inputs))
  assert reasons["two_pass"] == ()
  looped = reasons["book_keeping"]
  assert bool(looped) == (name == "scanned_se_blocks")
  assert all("in a loop" in reason for reason in looped)


def test_cases_reach_both_forms_of_the_kernel_norm():
  factors = [(4, 9 * 16, 16), (4, 32, 32), (3, 20, 24)]
  formed = [(6 * 5, 49, 8), (5 * 8, 9 * 2, 4), (4 * 6, 9 * 12, 6)]
  assert all(keeps_factors(*sizes) for sizes in factors)
  assert not any(keeps_factors(*sizes) for sizes in formed)


def test_one_trace_serves_every_mask_and_clip_norm():
  traces = []
  model = from_flax(nn.Dense(NUM_CLASSES))
  params, state = model.init(jax.random.key(0), jnp.ones((1, 4)))

  @jax.jit
  def run(mask, clip_norm):
    traces.append(None)
    inputs, labels = jnp.ones((2, 4)), jnp.zeros(2, jnp.int32)
    rows = Rows(inputs, labels, mask)
    return clipped_sum("two_pass", model, loss, params, state, rows, clip_norm, None)

  for mask in ([True, True], [False, True], [False, False]):
    for clip_norm in (0.1, 10.0):
      run(jnp.array(mask), jnp.float32(clip_norm))
  assert len(traces) == 1


def test_the_norm_pass_forms_no_weight_gradient():
  """Of a scanned layer wider than the batch, XLA keeps the products each pass needs and no more."""
  model = from_flax(Wide())
  inputs = jnp.ones((3, 40))
  params, state = model.init(jax.random.key(0), inputs[:1])

  def norms(params):
    def losses(params, taps):
      return jnp.square(model.tapped_apply(params, state, inputs, taps)).sum(1)

    return jax.vjp(losses, params, jnp.zeros(3))[1](jnp.ones(3))[1]

  program = jax.jit(norms).lower(params).compile().as_text()
  assert program is not None
  assert " dot(" in program
  assert "f32[40,40]{1,0} dot(" not in program


@pytest.mark.parametrize("method", METHODS)
def test_only_the_reference_holds_the_gradient_of_every_example_of_a_wide_layer(method):
  model = from_flax(nn.Sequential([nn.Dense(96), nn.relu, nn.Dense(96), nn.relu, nn.Dense(3)]))
  inputs, labels, mask = jnp.ones((5, 96)), jnp.zeros(5, jnp.int32), jnp.ones(5, bool)
  params, state = model.init(jax.random.key(0), inputs[:1])

  def run(params):
    rows = Rows(inputs, labels, mask)
    return clipped_sum(method, model, loss, params, state, rows, jnp.float32(1), None)

  program = jax.jit(run).lower(params).compile().as_text()
  assert program is not None
  assert ("f32[5,96,96]" in program) == (method == "reference")


CLEAR: dict[str, tuple[str, ...]] = {"book_keeping": (), "two_pass": ()}
TWICE = ("Dense_0/kernel is used twice",)
LOOPED = ("blocks runs layers in a loop",)


def test_auto_takes_the_cheapest_method_that_covers_the_model():
  assert resolve_method("auto", CLEAR)[0] == "book_keeping"
  method, reason = resolve_method("auto", {"book_keeping": LOOPED, "two_pass": ()})
  assert method == "reference"  # two_pass has no bound for adversarial numbers
  assert LOOPED[0] in reason
  for name in METHODS:
    assert resolve_method(name, CLEAR) == (name, "asked for")


def test_auto_falls_back_to_the_reference_and_says_why():
  method, reason = resolve_method("auto", dict.fromkeys(CLEAR, TWICE))
  assert method == "reference"
  assert "Dense_0/kernel is used twice" in reason


@pytest.mark.parametrize("method", ["book_keeping", "two_pass"])
def test_a_method_that_does_not_cover_the_model_is_refused_with_the_remedy(method):
  with pytest.raises(UserError, match=r"Dense_0/kernel is used twice.*privacy\.clipping=auto"):
    resolve_method(method, dict.fromkeys(CLEAR, TWICE))


def test_a_method_that_does_not_exist_is_refused():
  with pytest.raises(UserError, match="did you mean 'two_pass'"):
    resolve_method("two_passes", CLEAR)
