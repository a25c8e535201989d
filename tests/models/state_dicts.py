"""PyTorch state dicts of small SE-ResNeXts, written out by hand, with another number everywhere."""

import numpy as np

# What a Flax layer is called in the files of both namings: of the network, then of a block.
OUTER = {
  "pretrainedmodels": {"stem": "layer0.conv1", "stem_norm": "layer0.bn1", "head": "last_linear"},
  "timm": {"stem": "conv1", "stem_norm": "bn1", "head": "fc"},
}
GATES = {"pretrainedmodels": "se_module", "timm": "se"}


def weights(place, name, shape, bias=False):
  yield f"{place}/kernel", f"{name}.weight", shape
  if bias:
    yield f"{place}/bias", f"{name}.bias", shape[:1]


def norm(place, name, channels):
  for ours, theirs in (
    ("scale", "weight"),
    ("bias", "bias"),
    ("mean", "running_mean"),
    ("var", "running_var"),
  ):
    yield f"{place}/{ours}", f"{name}.{theirs}", (channels,)


def block(naming, place, name, inputs, width, outputs, groups, squeezed):
  yield from weights(f"{place}/conv1", f"{name}.conv1", (width, inputs, 1, 1))
  yield from norm(f"{place}/norm1", f"{name}.bn1", width)
  yield from weights(f"{place}/conv2", f"{name}.conv2", (width, width // groups, 3, 3))
  yield from norm(f"{place}/norm2", f"{name}.bn2", width)
  yield from weights(f"{place}/conv3", f"{name}.conv3", (outputs, width, 1, 1))
  yield from norm(f"{place}/norm3", f"{name}.bn3", outputs)
  gates = f"{name}.{GATES[naming]}"
  yield from weights(f"{place}/se/squeeze", f"{gates}.fc1", (squeezed, outputs, 1, 1), True)
  yield from weights(f"{place}/se/excite", f"{gates}.fc2", (outputs, squeezed, 1, 1), True)
  if place.endswith("block1"):
    yield from weights(f"{place}/downsample", f"{name}.downsample.0", (outputs, inputs, 1, 1))
    yield from norm(f"{place}/downsample_norm", f"{name}.downsample.1", outputs)


def entries(naming, *, channels, stem, blocks, groups, classes):
  """(our path, their key, their shape) of every array.

  Args:
    naming: pretrainedmodels or timm.
    channels: of the images.
    stem: channels of the stem, whose kernel is 3x3.
    blocks: (stage, number in the stage from 1, inputs, width, outputs, squeezed) of each block.
    groups: of the 3x3 convolutions.
    classes: of the head.
  """
  names = OUTER[naming]
  yield from weights("stem", names["stem"], (stem, channels, 3, 3))
  yield from norm("stem_norm", names["stem_norm"], stem)
  outputs = stem
  for stage, number, inputs, width, outputs, squeezed in blocks:
    place, name = f"stage{stage}_block{number}", f"layer{stage}.{number - 1}"
    yield from block(naming, place, name, inputs, width, outputs, groups, squeezed)
  yield from weights("head", names["head"], (classes, outputs), True)


def numbered(listed):
  """State dict of ``entries``: float32 arrays that together count up from 1."""
  arrays, start = {}, 1
  for _, key, shape in listed:
    size = int(np.prod(shape))
    arrays[key] = np.arange(start, start + size, dtype=np.float32).reshape(shape)
    start += size
    if key.endswith("running_var"):
      arrays[key.replace("running_var", "num_batches_tracked")] = np.asarray(7, np.int64)
  return arrays


# se_resnext_micro: two stages of one block.
MICRO = {"stem": 8, "blocks": ((1, 1, 8, 8, 16, 4), (2, 1, 16, 16, 32, 8)), "groups": 4}
