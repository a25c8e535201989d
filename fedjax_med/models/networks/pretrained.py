"""Initial weights from a PyTorch state dict of SE-ResNeXt, kept as a .safetensors file."""

import functools
import hashlib
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_med.core.errors import UserError, require

_REMEDY = (
  "save model.float().state_dict() of pretrainedmodels' se_resnext50_32x4d, or of timm's"
  " legacy_seresnext50_32x4d or seresnext50_32x4d, with safetensors.torch.save_file"
)


class Naming(NamedTuple):
  """Names of our layers in the files of one origin.

  Attributes:
    layers: their name of each of our layers; of one in a block, the part after 'layerS.B.'.
    stem_pool_padding: padding of the max pool that they were trained with (see ``SEResNeXt``).
  """

  layers: dict[str, str]
  stem_pool_padding: str


_BLOCK = {
  "conv1": "conv1",
  "norm1": "bn1",
  "conv2": "conv2",
  "norm2": "bn2",
  "conv3": "conv3",
  "norm3": "bn3",
  "downsample": "downsample.0",
  "downsample_norm": "downsample.1",
}
NAMINGS = {
  # Cadene's port of the Caffe original, and timm's copy of it (legacy_seresnext50_32x4d).
  "pretrainedmodels": Naming(
    {
      **_BLOCK,
      "stem": "layer0.conv1",
      "stem_norm": "layer0.bn1",
      "squeeze": "se_module.fc1",
      "excite": "se_module.fc2",
      "head": "last_linear",
    },
    stem_pool_padding="ceil",
  ),
  # timm's ResNet family (seresnext50_32x4d).
  "timm": Naming(
    {
      **_BLOCK,
      "stem": "conv1",
      "stem_norm": "bn1",
      "squeeze": "se.fc1",
      "excite": "se.fc2",
      "head": "fc",
    },
    stem_pool_padding="around",
  ),
}
_LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}


class File(NamedTuple):
  """A .safetensors file as it was read.

  Attributes:
    path: as configured.
    arrays: values by their PyTorch name.
    sha256: digest of the file's bytes, hexadecimal.
  """

  path: str
  arrays: dict[str, np.ndarray]
  sha256: str


class Overlay(NamedTuple):
  """Initial values that replace fresh ones, layer by layer.

  Attributes:
    params: by layer; a layer that stays fresh is absent.
    state: collections as a whole.
    origin: origin of the values, for people; empty if nothing is replaced.
  """

  params: dict[str, Any]
  state: dict[str, Any]
  origin: str


def load_safetensors(path: str) -> File:
  """Reads a file once and caches it; UserError if it is not .safetensors."""
  place = pathlib.Path(path).expanduser()
  require(place.is_file(), f"model.pretrained='{path}' is not a file", _REMEDY)
  status = place.stat()
  return _read(path, place, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=1)
def _read(path: str, place: pathlib.Path, modified: int, size: int) -> File:
  from safetensors import SafetensorError  # here: few starts need it
  from safetensors.numpy import load

  del modified, size  # another file under the same name is read again
  data = place.read_bytes()
  try:
    return File(path=path, arrays=load(data), sha256=hashlib.sha256(data).hexdigest())
  except (SafetensorError, KeyError) as error:  # KeyError: a type NumPy has not, such as BF16
    reason = " ".join(str(error).split())
    raise UserError(
      f"model.pretrained='{path}' cannot be read as .safetensors ({reason}); {_REMEDY}"
    ) from error


def naming_of(arrays: Mapping[str, Any], source: str) -> Naming:
  """The naming whose stem is among ``arrays``; UserError naming ``source`` if there is none."""
  for naming in NAMINGS.values():
    if f"{naming.layers['stem']}.weight" in arrays:
      return naming
  stems = " nor ".join(f"'{naming.layers['stem']}.weight'" for naming in NAMINGS.values())
  raise UserError(f"model.pretrained='{source}' has neither {stems}; {_REMEDY}")


def convert_state_dict(
  arrays: Mapping[str, np.ndarray], params: Any, state: Any, source: str
) -> tuple[dict[str, Any], dict[str, Any]]:
  """PyTorch arrays in the places, layouts and dtype (float32) of an SEResNeXt.

  Kernels go from OIHW to HWIO, matrices from [out, in] to [in, out]. The stem of a network for one
  channel gets the sum over the file's channels: its result for a grey image is that of the file's
  network for that image repeated in every channel.

  Args:
    arrays: a whole state dict in one of ``NAMINGS``; ``num_batches_tracked`` is ignored.
    params: arrays or shapes of the network's parameters.
    state: arrays or shapes of its {'batch_stats': ...}.
    source: name of the file for errors.

  Returns:
    (params, state) of the same nesting; without 'head' where the file has other classes.

  Raises:
    UserError: a key is missing or left over, or a shape is another.
  """
  naming = naming_of(arrays, source)
  used = set()

  def take(path: tuple[Any, ...], like: Any) -> np.ndarray:
    names = [entry.key for entry in path]
    key = _their_name(naming, names)
    require(key in arrays, f"model.pretrained='{source}' has no '{key}'", _REMEDY)
    used.add(key)
    array = np.asarray(arrays[key], np.float32)
    if names[-2:] == ["stem", "kernel"] and like.shape[2] == 1 and array.ndim == 4:
      array = array.sum(axis=1, keepdims=True)
    needed = _their_shape(names, like.shape)
    require(
      array.shape == needed,
      f"model.pretrained='{source}' has '{key}' of shape {arrays[key].shape} where"
      f" {'/'.join(names)} needs {needed}",
      _REMEDY,
    )
    return _to_ours(array, len(like.shape))

  head = f"{naming.layers['head']}."
  classes = params["head"]["kernel"].shape[1]
  matrix = arrays.get(f"{head}weight")
  if matrix is not None and matrix.shape[:1] != (classes,):
    params = {layer: leaves for layer, leaves in params.items() if layer != "head"}
    used |= {key for key in arrays if key.startswith(head)}
  params = jax.tree_util.tree_map_with_path(take, params)
  state = {
    name: jax.tree_util.tree_map_with_path(take, collection) for name, collection in state.items()
  }
  left = [k for k in arrays if k not in used and not k.endswith(".num_batches_tracked")]
  require(
    not left,
    f"model.pretrained='{source}' has {len(left)} arrays that the network has no place for, first"
    f" '{min(left, default='')}'",
    _REMEDY,
  )
  return params, state


def overlay(path: str, params: Any, state: Any) -> Overlay:
  """The values in the file at ``path`` for a network with such ``params`` and ``state``."""
  file = load_safetensors(path)
  new_params, new_state = convert_state_dict(file.arrays, params, state, path)
  head = "with its head" if "head" in new_params else "with a new head, its classes being others"
  origin = f"the weights of {path} (SHA-256 {file.sha256[:12]}), {head}"
  return Overlay(params=new_params, state=new_state, origin=origin)


def to_state_dict(
  params: Any, state: Any, stem_pool_padding: str
) -> tuple[dict[str, np.ndarray], str]:
  """Weights as PyTorch names and lays them out; the inverse of ``convert_state_dict``.

  A network with the layers of this package's SE-ResNeXt, gates or not, gets the names of the file
  that its stem's pool belongs to (``NAMINGS``; ResNet-50 those of timm, which are torchvision's),
  any other one its path in Flax with dots. Convolution kernels become
  OIHW and matrices [out, in]; 'kernel' and 'scale' are called 'weight', 'mean' and 'var'
  'running_mean' and 'running_var'. Arrays of other shapes and names stay as they are.

  Args:
    params: parameters of the network.
    state: its {'batch_stats': ...}, or {}.
    stem_pool_padding: see ``SEResNeXt``; empty for another network.

  Returns:
    arrays by name, and the name of the naming: one of ``NAMINGS`` or 'flax'.
  """
  leaves = {}
  for tree in (params, *state.values()):
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
      names = [str(getattr(entry, "key", getattr(entry, "idx", entry))) for entry in path]
      leaves[tuple(names)] = np.asarray(leaf)
  for name, naming in NAMINGS.items():
    if naming.stem_pool_padding == stem_pool_padding and ("stem", "kernel") in leaves:
      try:
        return {
          _their_name(naming, list(names)): np.ascontiguousarray(_to_theirs(list(names), leaf))
          for names, leaf in leaves.items()
        }, name
      except KeyError:  # a layer that SE-ResNeXt has not
        continue
  arrays = {}
  for names, leaf in leaves.items():
    if names[-1] == "kernel" and leaf.ndim in (2, 4):
      leaf = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
    key = ".".join([*names[:-1], _LEAVES.get(names[-1]) or names[-1]])
    # Where one module has both 'kernel' and 'scale'.
    key = ".".join(names) if key in arrays else key
    arrays[key] = np.ascontiguousarray(leaf)
  return arrays, "flax"


def _to_theirs(names: list[str], array: np.ndarray) -> np.ndarray:
  """Inverse of ``_to_ours``."""
  if array.ndim == 4:
    return array.transpose(3, 2, 0, 1)
  return array.T.reshape(_their_shape(names, array.shape)) if array.ndim == 2 else array


def _their_name(naming: Naming, names: list[str]) -> str:
  """PyTorch's key for one of our leaves: ['stage2_block1', 'conv2', 'kernel'] and the like."""
  block = re.fullmatch(r"stage(\d+)_block(\d+)", names[0])
  prefix = f"layer{block[1]}.{int(block[2]) - 1}." if block else ""
  return f"{prefix}{naming.layers[names[-2]]}.{_LEAVES[names[-1]]}"


def _their_shape(names: list[str], shape: tuple[int, ...]) -> tuple[int, ...]:
  if len(shape) == 4:
    height, width, inputs, outputs = shape
    return outputs, inputs, height, width
  if len(shape) == 2:
    inputs, outputs = shape
    return (outputs, inputs) if names[0] == "head" else (outputs, inputs, 1, 1)  # 1x1 convolutions
  return shape


def _to_ours(array: np.ndarray, rank: int) -> np.ndarray:
  if rank == 4:
    return array.transpose(2, 3, 1, 0)
  return array.reshape(array.shape[:2]).T if rank == 2 else array
