"""Declarations of the fields of layout and evaluation, which shape no weights."""

import dataclasses

from fedjax_med.core import conditions as when
from fedjax_med.core.fields import field, least


@dataclasses.dataclass
class ExecutionConfig:
  """Layout of the program on the machine; it changes results by rounding only."""

  layout: str = field(
    "auto",
    doc="auto, vmap (all clients at once), chunk (chunk_size at once) or scan (one by one).",
    choices=("auto", "vmap", "chunk", "scan"),
  )
  chunk_size: int = field(
    0,
    doc="clients at once on a device under layout=chunk.",
    bounds=least(0, 100_000, remedy="use 0 unless layout=chunk"),
    read=(when.CHUNKS,),
  )
  devices: int = field(
    0,
    doc=(
      "devices that clients are dealt over; 0 means every accelerator (of all processes), or"
      " one for each core of a CPU, at most 16 and fewer where memory is short."
    ),
    bounds=least(0, 100_000, remedy="use 0 to let them be chosen"),
  )
  lowering: str = field(
    "auto",
    doc="auto, matmul (convolutions as sums of batched products) or native.",
    choices=("auto", "matmul", "native"),
  )
  microbatch: int = field(
    0,
    doc=(
      "examples in memory at once in a local step; 0 lets it be chosen. Refused where the"
      " model has dropout, whose draws it would change."
    ),
    bounds=least(0, 1_000_000, remedy="use 0 to let it be chosen"),
  )
  memory_gib: float = field(
    0.0,
    doc=(
      "memory budget of a device, GiB, which the plan keeps to; 0 means 80% of an"
      " accelerator's, and half of a CPU's free memory."
    ),
    bounds=least(0, 1_000_000, remedy="use 0 for a share of what the device has"),
  )
  remat: str = field(
    "auto",
    doc=(
      "auto (where memory forbids else), off or blocks (the backward pass computes each block"
      " of the network again)."
    ),
    choices=("auto", "off", "blocks"),
  )
  probe: str = field(
    "auto",
    doc=(
      "auto (where a run is long enough to repay it), on or off: time a local step to choose"
      " how many clients train at once under layout=auto."
    ),
    choices=("auto", "on", "off"),
    read=(when.CHUNK_OPEN,),
  )
  compilation_cache: str = field(
    "~/.cache/fedjax_med/xla", doc="folder of XLA's persistent cache; empty turns it off."
  )


@dataclasses.dataclass
class EvalConfig:
  """Measurements of a run, and when they are made."""

  every: int = field(
    1,
    doc="rounds between log points (metrics, checkpoint, progress).",
    bounds=least(1, 1_000_000, remedy="use 1"),
  )
  batch_size: int = field(
    64, doc="test images a forward pass.", bounds=least(1, 1_000_000, remedy="use 64")
  )
  local_baselines: bool = field(
    False, doc="also train each hospital alone and one model on pooled data."
  )
  tracker: str = field(
    "none",
    doc=(
      "none, tensorboard (event files in the workdir), wandb (sends test metrics to Weights &"
      " Biases) or mlflow (a database in the workdir); each needs the extra of its name."
    ),
    choices=("none", "tensorboard", "wandb", "mlflow"),
  )
