"""Names of data sources, and what the rules of the configuration need to know of each.

The sources themselves are in data/sources.py, which adds to this table those that users register.
"""

from typing import NamedTuple


class SourceFacts(NamedTuple):
  """Facts about a source.

  Attributes:
    reads_files: whether data.path is read, and files under data.min_size are left out.
    has_sites: whether it always says which hospital or scanner each example comes from.
  """

  reads_files: bool = True
  has_sites: bool = False


SOURCE_FACTS: dict[str, SourceFacts] = {
  "phantoms": SourceFacts(reads_files=False, has_sites=True),
  "folder": SourceFacts(),
  "manifest": SourceFacts(),
  "npz": SourceFacts(),
  "br35h": SourceFacts(),
  "sars_cov2_ct": SourceFacts(),
}
