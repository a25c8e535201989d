"""Kinds of compression by name, and what they go together with: a new kind is a file and a line."""

from collections.abc import Callable

from fedjax_med.core.config import Config
from fedjax_med.core.errors import require
from fedjax_med.core.exchange_sections import CompressionConfig
from fedjax_med.exchange.compression.compressor import Compressor
from fedjax_med.exchange.compression.feedback import compressed, sketched
from fedjax_med.exchange.compression.quantise import quantise
from fedjax_med.exchange.compression.randk import randk
from fedjax_med.exchange.compression.sign import sign
from fedjax_med.exchange.compression.sketch import sketch
from fedjax_med.exchange.compression.topk import topk
from fedjax_med.exchange.compression.way_down import differences
from fedjax_med.exchange.download import Download
from fedjax_med.exchange.transform import Transform

# name: (section, whether what is left out is sent later) -> Compressor. With feedback an unbiased
# kind takes its contractive variant: the memory of scaled errors grows without end.
KINDS: dict[str, Callable[[CompressionConfig, bool], Compressor]] = {
  "int": lambda section, feedback: quantise(section.bits, nearest=feedback),
  "sign": lambda section, feedback: sign(),
  "topk": lambda section, feedback: topk(section.share, section.value_bits),
  "randk": lambda section, feedback: randk(section.share, unscaled=feedback),
  "sketch": lambda section, feedback: sketch(section.rows, section.columns, section.share),
}

FEEDBACK = {
  "none": "",
  "ef": ", with error feedback",
  "ef21": ", of differences (EF21)",
}
STAYS_AT_HOME = ("fedbn", "fedper", "finetune")  # algorithms that send a part of the weights


def upward(section: CompressionConfig) -> Compressor | None:
  """The compressor of updates; None without one."""
  if section.kind == "none":
    return None
  return KINDS[section.kind](section, section.error_feedback != "none")


def downward(section: CompressionConfig) -> Compressor | None:
  """The compressor of the model on its way to clients; None without one."""
  return None if section.download == "none" else KINDS[section.download](section, True)


def compression_parts(section: CompressionConfig, *, counted: bool) -> list[Transform]:
  """The transform of updates, or none; ``counted`` as of ``compressed``."""
  compressor = upward(section)
  if compressor is None:
    return []
  make = sketched if compressor.linear else compressed
  return [make(compressor, section.error_feedback, counted=counted)]


def download_of(section: CompressionConfig) -> Download | None:
  """The way of the model to clients; None where it travels as it is."""
  compressor = downward(section)
  return None if compressor is None else differences(compressor)


def require_compression(config: Config) -> None:
  """Raises UserError where compression does not go with other parts, whatever the size."""
  section, protocol = config.compression, config.secure.protocol
  compressor = upward(section)
  require(
    compressor is None or compressor.linear or protocol not in ("masking", "ckks"),
    f"compression.kind='{section.kind}' with secure.protocol='{protocol}': a message that is to be"
    " decoded before it is added cannot be hidden in a sum, and what is hidden has all numbers"
    " again, so that nothing would be saved"
    + ("" if section.error_feedback == "none" else ", nor any error be left to feed back"),
    "use compression.kind=none, sketch (whose tables add up), or secure.protocol=none or grid",
  )
  require(
    section.kind != "sketch" or section.error_feedback != "ef21",
    "compression.error_feedback='ef21' with compression.kind='sketch': the server knows no single"
    " update that a difference could be taken to",
    "use error_feedback=ef, which the server does on the mean table",
  )
  require(
    section.download == "none" or config.server.participation == "full",
    f"compression.download='{section.download}' with server.participation="
    f"'{config.server.participation}': a hospital that was absent lacks the differences of the"
    " rounds it missed",
    "use compression.download=none, or server.participation=full",
  )
  require(
    section.download == "none" or config.server.algorithm not in STAYS_AT_HOME,
    f"compression.download='{section.download}' with server.algorithm='{config.server.algorithm}':"
    " only a part of the weights travels, and the difference is of all",
    "use compression.download=none, or server.algorithm=fedavg",
  )


def require_size(section: CompressionConfig, size: int) -> None:
  """Raises UserError where messages of ``size`` weights cannot be made.

  A share leaves no number, or a sketch is no smaller than what it stands for.
  """
  numbers = section.rows * section.columns
  require(
    section.kind != "sketch" or numbers < size,
    f"compression.rows={section.rows} x compression.columns={section.columns} is a sketch of"
    f" {numbers} numbers, for {size} weights",
    f"use fewer columns, such as {max(1, size // (10 * section.rows))}",
  )
  for compressor in filter(None, (upward(section), downward(section))):
    compressor.fields(size)


def compression_notes(section: CompressionConfig) -> list[str]:
  """Sentences of warning that stand beside every result."""
  notes = []
  if section.kind == "sign" and section.error_feedback == "none":
    notes.append(
      "Signs are sent without error feedback (compression.error_feedback=none): the bias of each"
      " round stays, and training may stop short of what compression.error_feedback=ef reaches."
    )
  if section.kind in ("int", "randk") and section.error_feedback != "none":
    how = "rounds to the nearest level" if section.kind == "int" else "sends numbers unscaled"
    notes.append(
      f"compression.kind={section.kind} {how} under error feedback: its unbiased variant is no"
      " contraction, and its memory could grow without end."
    )
  return notes


def compression_words(section: CompressionConfig) -> dict[str, str]:
  """What is done to messages, in words: ``up`` and ``down``, where something is."""
  words, up, down = {}, upward(section), downward(section)
  if up is not None:
    words["up"] = up.words + FEEDBACK[section.error_feedback]
  if down is not None:
    words["down"] = f"differences to what hospitals hold: {down.words}"
  return words
