"""PyTorch weights land where they belong, or one sentence says why they cannot."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from fedjax_med.core.config import ModelConfig
from fedjax_med.core.errors import UserError
from fedjax_med.models.networks.cnn import cnn_small
from fedjax_med.models.networks.pretrained import (
  NAMINGS,
  convert_state_dict,
  load_safetensors,
  naming_of,
  overlay,
  to_state_dict,
)
from fedjax_med.models.networks.se_resnext import SEResNeXt, se_resnext_micro
from fedjax_med.models.registry import create_module
from tests.models.state_dicts import MICRO, entries, numbered

# Every number of channels is another one, so that no transposition goes unnoticed.
DIMENSIONS = {
  "stem": 4,
  "blocks": ((1, 1, 4, 6, 10, 5), (1, 2, 10, 6, 10, 5), (2, 1, 10, 12, 14, 7)),
  "groups": 2,
}
CLASSES = 3


def shapes(channels=3, classes=CLASSES):
  """Parameter and state shapes of the network that ``DIMENSIONS`` describes."""
  module = SEResNeXt(
    classes,
    stage_blocks=(2, 1),
    widths=(6, 12),
    features=(10, 14),
    groups=2,
    reduction=2,
    stem_features=4,
    stem_kernel=3,
    stem_pool=True,
    norm="frozen_batch",
  )
  images = jnp.zeros((1, 8, 8, channels))
  variables = jax.eval_shape(module.init, jax.random.key(0), images)
  return variables["params"], {"batch_stats": variables["batch_stats"]}


def named(naming, channels=3, classes=CLASSES):
  listed = list(entries(naming, **DIMENSIONS, channels=channels, classes=classes))
  return listed, numbered(listed)


def by_place(params, state):
  """Leaves by 'layer/.../leaf', of both trees."""
  leaves = {}
  for tree in (params, state["batch_stats"]):
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
      leaves["/".join(entry.key for entry in path)] = leaf
  return leaves


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_array_lands_in_its_place_and_layout(naming):
  listed, arrays = named(naming)
  expected = shapes()
  params, state = convert_state_dict(arrays, *expected, "a file")
  assert jax.tree.structure((params, state)) == jax.tree.structure(expected)
  leaves = by_place(params, state)
  assert len(leaves) == len(listed)
  wanted = by_place(*expected)
  for place, key, shape in listed:
    theirs = arrays[key]
    if place == "head/kernel":
      theirs = np.einsum("oi->io", theirs)
    elif "/se/" in place and place.endswith("kernel"):
      theirs = np.einsum("oi->io", theirs[:, :, 0, 0])
    elif len(shape) == 4:
      theirs = np.einsum("oihw->hwio", theirs)
    assert leaves[place].shape == wanted[place].shape
    assert leaves[place].dtype == np.float32
    np.testing.assert_array_equal(leaves[place], theirs)


def test_the_stem_of_a_grey_network_sums_over_the_channels_of_the_file():
  _, arrays = named("timm")
  params, _ = convert_state_dict(arrays, *shapes(channels=1), "a file")
  red, green, blue = np.moveaxis(arrays["conv1.weight"], 1, 0)
  np.testing.assert_array_equal(
    params["stem"]["kernel"][:, :, 0], np.moveaxis(red + green + blue, 0, 2)
  )


def test_a_head_of_other_classes_stays_fresh_and_one_of_as_many_is_kept():
  for classes in (CLASSES, 1000):
    _, arrays = named("pretrainedmodels", classes=classes)
    params, state = convert_state_dict(arrays, *shapes(), "a file")
    assert ("head" in params) == (classes == CLASSES)
    assert state["batch_stats"].keys() == shapes()[1]["batch_stats"].keys()


def test_a_missing_key_a_wrong_shape_and_a_key_left_over_are_sentences():
  def refusal(change):
    _, arrays = named("timm")
    change(arrays)
    with pytest.raises(UserError) as caught:
      convert_state_dict(arrays, *shapes(), "w.safetensors")
    return sentence(caught)

  missing = refusal(lambda arrays: arrays.pop("layer1.1.bn2.running_var"))
  assert "'w.safetensors' has no 'layer1.1.bn2.running_var'" in missing
  other = refusal(lambda arrays: arrays.update({"layer2.0.conv1.weight": np.zeros((12, 9, 1, 1))}))
  assert "'layer2.0.conv1.weight' of shape (12, 9, 1, 1)" in other
  assert "stage2_block1/conv1/kernel needs (12, 10, 1, 1)" in other
  deeper = refusal(
    lambda arrays: arrays.update({"layer2.1.conv1.weight": np.zeros((12, 14, 1, 1))})
  )
  assert "1 arrays that the network has no place for, first 'layer2.1.conv1.weight'" in deeper
  headless = refusal(lambda arrays: arrays.pop("fc.weight"))
  assert "has no 'fc.weight'" in headless
  stem = refusal(lambda arrays: arrays.update({"conv1.weight": np.zeros((4, 1, 3, 3))}))
  assert "'conv1.weight' of shape (4, 1, 3, 3) where stem/kernel needs (4, 3, 3, 3)" in stem
  foreign = refusal(lambda arrays: arrays.pop("conv1.weight"))
  assert "has neither 'layer0.conv1.weight' nor 'conv1.weight'" in foreign


def sentence(caught):
  """The message, which must be one sentence: a problem; a remedy."""
  problem, remedy = str(caught.value).split("; ")
  assert "\n" not in problem + remedy
  assert remedy.startswith("save model.float().state_dict()")
  return problem


def bfloat16_file():
  header = json.dumps({"x": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
  return len(header).to_bytes(8, "little") + header + b"\0\0"


@pytest.mark.parametrize(
  ("content", "reason"),
  [
    (b"PK\x03\x04 a pickle of torch.save, long enough", "cannot be read as .safetensors ("),
    (b"", "cannot be read as .safetensors ("),
    (bfloat16_file(), "cannot be read as .safetensors ('BF16')"),
    (None, "is not a file"),
  ],
)
def test_what_is_no_safetensors_file_is_a_sentence_with_the_remedy(content, reason, tmp_path):
  path = tmp_path / "weights.safetensors"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(UserError) as caught:
    load_safetensors(str(path))
  assert f"model.pretrained='{path}' {reason}" in sentence(caught)


def test_a_file_is_read_once_and_again_when_it_changed(tmp_path):
  path = str(tmp_path / "weights.safetensors")
  save_file({"x": np.zeros(2, np.float16)}, path)
  first = load_safetensors(path)
  assert load_safetensors(path) is first
  save_file({"x": np.zeros(3, np.float16)}, path)
  second = load_safetensors(path)
  assert second.arrays["x"].shape == (3,)
  assert second.sha256 != first.sha256


@pytest.mark.parametrize(("naming", "padding"), [("pretrainedmodels", "ceil"), ("timm", "around")])
def test_the_network_and_its_start_follow_the_file(naming, padding, tmp_path):
  path = str(tmp_path / "weights.safetensors")
  arrays = numbered(entries(naming, **MICRO, channels=3, classes=1000))
  save_file({key: array.astype(np.float16) for key, array in arrays.items()}, path)
  config = ModelConfig(name="se_resnext_micro", norm="frozen_batch", pretrained=path)
  module = create_module(config, CLASSES)
  assert isinstance(module, SEResNeXt)
  assert module.stem_pool_padding == padding
  variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
  found = overlay(path, variables["params"], {"batch_stats": variables["batch_stats"]})
  assert variables["params"].keys() - found.params.keys() == {"head"}
  assert {leaf.dtype for leaf in jax.tree.leaves((found.params, found.state))} == {
    np.dtype("float32")
  }
  assert path in found.origin
  assert "with a new head" in found.origin


def numbered_variables(module):
  """Parameters and state of a network for 8 grey pixels a side, another number everywhere."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
  leaves, structure = jax.tree.flatten(shapes)
  ends = np.cumsum([leaf.size for leaf in leaves])
  arrays = [
    np.arange(end - leaf.size, end, dtype=np.float32).reshape(leaf.shape)
    for leaf, end in zip(leaves, ends, strict=True)
  ]
  variables = jax.tree.unflatten(structure, arrays)
  return variables["params"], {k: v for k, v in variables.items() if k != "params"}


@pytest.mark.parametrize(("padding", "naming"), [("ceil", "pretrainedmodels"), ("around", "timm")])
@pytest.mark.parametrize("norm", ["group", "frozen_batch"])
def test_exported_weights_are_read_back_as_they_were(padding, naming, norm):
  module = se_resnext_micro(2, norm=norm, stem_pool_padding=padding)
  params, state = numbered_variables(module)
  arrays, used = to_state_dict(params, state, padding)
  assert used == naming
  assert naming_of(arrays, "it") == NAMINGS[naming]
  chex.assert_trees_all_equal(convert_state_dict(arrays, params, state, "it"), (params, state))


def test_other_networks_are_exported_under_their_path_in_pytorchs_layout():
  params, state = numbered_variables(cnn_small(3, norm="batch"))
  arrays, used = to_state_dict(params, state, "ceil")
  assert used == "flax"
  assert arrays["conv2.weight"].shape == (32, 16, 3, 3)
  assert arrays["conv2.weight"][5, 4, 1, 2] == params["conv2"]["kernel"][1, 2, 4, 5]
  np.testing.assert_array_equal(arrays["head.weight"], params["head"]["kernel"].T)
  np.testing.assert_array_equal(arrays["norm1.weight"], params["norm1"]["scale"])
  np.testing.assert_array_equal(arrays["norm1.running_var"], state["batch_stats"]["norm1"]["var"])
  assert len(arrays) == len(jax.tree.leaves((params, state)))
