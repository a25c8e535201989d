"""Names of data sources, and the facts about each that rules of the configuration use.

The sources themselves are in data/sources.py, which adds to this table those that users register.
"""

from typing import NamedTuple

DEFAULT = "pictures"  # modality of a source that names none
# Values of client.augmentation that change something, by modality.
AUGMENTATIONS = {
  DEFAULT: ("none", "flip", "shift", "flip_shift"),
  "series": ("none", "jitter", "scale", "time_shift", "jitter_scale_shift"),
}

# Values of data.split that are drawn of any examples; others a source draws itself.
DRAWN_SPLITS = ("grouped", "recording", "paper")


class SourceFacts(NamedTuple):
  """Facts about a source.

  Attributes:
    reads_files: whether data.path is read, and files under data.min_size are left out.
    modality: name of what its examples are, of ``data.modality.MODALITIES``.
    own_split: whether data.split=paper is a split of its own, which nothing else decides.
    splits: values of data.split.
    task: name of what is predicted, of ``tasks.registry.TASKS``; a manifest may say another one.
    has_sites: whether it always says which hospital, scanner or person each example comes from.
  """

  reads_files: bool = True
  has_sites: bool = False
  modality: str = DEFAULT
  task: str = "classification"
  own_split: bool = False
  splits: tuple[str, ...] = ("grouped", "paper")


SOURCE_FACTS: dict[str, SourceFacts] = {
  "phantoms": SourceFacts(reads_files=False, has_sites=True),
  "folder": SourceFacts(),
  "manifest": SourceFacts(),
  "npz": SourceFacts(),
  "br35h": SourceFacts(),
  "sars_cov2_ct": SourceFacts(),
  "table": SourceFacts(modality="table"),
  "series": SourceFacts(
    has_sites=True, modality="series", splits=("grouped", "paper", "recording")
  ),
  "heart_disease": SourceFacts(has_sites=True, modality="table", own_split=True),
  "lung": SourceFacts(has_sites=True, modality="table", task="survival_cox"),
  "gdsc": SourceFacts(
    has_sites=True, modality="table", task="regression", splits=("grouped", "tissue", "pairs")
  ),
}
