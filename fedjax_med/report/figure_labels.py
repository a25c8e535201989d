"""Labels of figures: any name as one short line, in letters that an installed font has."""

import contextlib
import functools
import unicodedata
from collections.abc import Sequence
from typing import Any

from fedjax_med.core.text import escaped, visible

# Families that are taken where they are installed: Chinese, Japanese, Korean, then other scripts.
FALLBACKS = (
  *("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans CJK TC", "Noto Sans CJK KR"),
  *("Noto Sans JP", "Noto Sans SC", "Noto Sans TC", "Noto Sans KR", "Source Han Sans"),
  *("WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "IPAexGothic", "IPAGothic", "TakaoGothic"),
  *("Droid Sans Fallback", "Hiragino Sans", "PingFang SC", "Apple SD Gothic Neo"),
  *("Yu Gothic", "Meiryo", "MS Gothic", "Microsoft YaHei", "SimHei", "Malgun Gothic"),
  *("NanumGothic", "AR PL UMing CN", "Arial Unicode MS", "Noto Sans", "Noto Sans Devanagari"),
  *("Noto Sans Thai", "Noto Sans Hebrew", "Noto Sans Arabic", "Noto Sans Bengali"),
  *("Noto Emoji", "Symbola", "Unifont"),
)
MOST = {"class": 20, "target": 24, "hospital": 32}  # columns of a label; a wide letter takes two


@functools.cache
def families() -> list[str]:
  """Fonts of a figure: matplotlib's own, and those of ``FALLBACKS`` that are installed."""
  from matplotlib import font_manager

  installed = {font.name for font in font_manager.fontManager.ttflist}
  found = ["DejaVu Sans"]
  for name in FALLBACKS:
    if name in installed:
      with contextlib.suppress(OSError, RuntimeError, ValueError):  # one that FreeType cannot open
        for weight in ("normal", "bold"):
          _font(name, weight)
        found.append(name)
  return found


def drawable(text: str, most: int = 150) -> str:
  """A text as matplotlib draws it letter by letter: one line, shortened in the middle.

  A letter that no font has is drawn as an escape such as ``\\u8105``. A dollar starts no formula,
  and an underscore in front does not hide an entry of a legend.
  """
  line = " ".join(visible(text.replace("\n", " ")).split())
  line = "".join(letter if letter in _letters() else escaped(letter) for letter in line)
  line = _shortened(line, most).replace("$", "\\$")
  return f" {line}" if line.startswith("_") else line


def labels(names: Sequence[str], kind: str) -> list[str]:
  """A label for each name, no two alike; ``class 2`` for a name that cannot be drawn.

  Args:
    names: of all classes or hospitals.
    kind: class, target or hospital.
  """
  known = [drawable(name, MOST[kind]) for name in names]
  ours = [
    known.count(label) == 1 and set(visible(name)) <= _letters() | {"\n"}
    for name, label in zip(names, known, strict=True)
  ]
  taken = {label for label, own in zip(known, ours, strict=True) if own}
  made = []
  for number, (label, own) in enumerate(zip(known, ours, strict=True), 1):
    stand_in = f"{kind} {number}"
    made.append(label if own else f"[{stand_in}]" if stand_in in taken else stand_in)
  return made


def stand_ins(names: Sequence[str], kind: str) -> list[tuple[str, str]]:
  """(label, name) of those that figures show under another label than the name."""
  pairs = zip(labels(names, kind), names, strict=True)
  plain = ((label.strip().replace("\\$", "$"), name) for label, name in pairs)
  return [(label, name) for label, name in plain if label != name]


def inches(made: Sequence[str], size: float = 10.0) -> float:
  """Width of the widest of some labels at that size of letters, in points; rather too much."""
  lines = [line for label in made for line in label.splitlines()]
  return max((sum(map(_columns, line)) for line in lines), default=0) * 0.0085 * size


@functools.cache
def _letters() -> frozenset[str]:
  """Letters that the fonts of a figure have both in regular and in bold."""
  found = []
  for weight in ("normal", "bold"):
    maps = [_font(name, weight).get_charmap() for name in families()]
    found.append({chr(code) for letters in maps for code in letters})
  # Before 3.11 matplotlib writes from left to right and joins no letters.
  both = found[0] & found[1]
  if not _shapes_text():
    both = {letter for letter in both if unicodedata.bidirectional(letter) not in ("R", "AL")}
  return frozenset(both)


def _font(family: str, weight: str) -> Any:
  from matplotlib import font_manager

  wanted = font_manager.FontProperties(family=family, weight=weight)
  return font_manager.get_font(font_manager.findfont(wanted, fallback_to_default=False))


def _shapes_text() -> bool:
  import matplotlib

  return tuple(map(int, matplotlib.__version__.split(".")[:2])) >= (3, 11)


def _columns(letter: str) -> int:
  return 2 if unicodedata.east_asian_width(letter) in ("W", "F") else 1


def _shortened(line: str, most: int) -> str:
  """The beginning and the end of a long line: names of hospitals often differ in the last word."""
  if sum(map(_columns, line)) <= most:
    return line
  start, end, room = "", "", most - 1
  while True:
    front, back = line[len(start)], line[-len(end) - 1]
    if _columns(front) + _columns(back) > room:
      return f"{start.rstrip()}…{end.lstrip()}"
    start, end = start + front, back + end
    room -= _columns(front) + _columns(back)
