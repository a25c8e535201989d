"""Order of the classes: of two the positive one comes last, as the names or the user say."""

import re
import unicodedata
from collections.abc import Sequence

from fedjax_med.core.errors import UserError, require

NEGATIONS = frozenset({"no", "non", "not", "without", "never"})
NEGATIVE = frozenset(
  {"normal", "healthy", "control", "controls", "benign", "negative", "neg", "uninfected"}
  | {"unaffected", "undamaged", "absent", "absence", "gesund", "kontrolle", "sain", "sano", "sana"}
  | {"正常", "健康", "陰性", "阴性", "良性"}
)
NEGATIVE_NAMES = frozenset({"false", "none", "nothing", "clear"})  # as the whole name only
POSITIVE = frozenset(
  {"yes", "positive", "pos", "true", "abnormal", "disease", "diseased", "sick", "case", "cases"}
  | {"malignant", "pathological", "pathology", "infected", "affected", "present", "unhealthy"}
)
WILD_TYPE, MUTANT = frozenset({"wt", "wildtype"}), frozenset({"mutant", "mutated", "mut"})


def order_classes(names: Sequence[str], positive: str = "") -> tuple[str, ...]:
  """Sorted names; of two the positive class comes last, and label 1 is positive everywhere.

  Args:
    names: of the classes.
    positive: ``data.positive``; empty lets the names decide: the one that sounds negative (normal,
      healthy, control, benign, no_..., non-...) comes first.

  Raises:
    UserError: ``positive`` is none of two classes; two names do not say which is positive; or two
      classes differ in nothing but case, spaces and punctuation.
  """
  ordered, positive = sorted(names), unicodedata.normalize("NFC", positive)
  require_distinct(ordered, "classes")
  if positive:
    require(
      len(ordered) == 2,
      f"data.positive='{positive}' with {len(ordered)} classes ({', '.join(ordered)}): their"
      " metrics are averages over all classes",
      "leave data.positive empty",
    )
    require(
      positive in ordered,
      f"data.positive='{positive}' is none of the classes {ordered[0]} and {ordered[1]}",
      f"use --config.data.positive='{ordered[0]}' or '{ordered[1]}'",
    )
    return tuple(sorted(ordered, key=lambda name: name == positive))
  if len(ordered) != 2:
    return tuple(ordered)
  signs = _signs(ordered)
  if signs[0] == signs[1]:
    raise UserError(
      f"the names of the classes '{ordered[0]}' and '{ordered[1]}' do not say which one is"
      " positive, and sensitivity, precision and F1 are of that one; say it with"
      f" --config.data.positive='{ordered[0]}' or --config.data.positive='{ordered[1]}'"
    )
  return tuple(ordered if signs[0] < signs[1] else ordered[::-1])


def sign(name: str, other: str = "") -> int:
  """-1 if a name sounds negative, 1 if positive, 0 if it does not say.

  A negation turns the words after it, and "free" those before: no_DR and tumour-free are negative,
  not-normal is positive. A name that is no or not and the other name, such as notumor beside
  tumor, is its opposite.
  """
  words, others = _words(name), _words(other)
  whole, rest = "".join(words), "".join(others)
  if rest and len(words) == 1 and whole in {"no" + rest, "not" + rest}:
    return 1 if sign(other) < 0 else -1
  if set(words) & WILD_TYPE and set(others) & MUTANT:
    return -1
  if whole in NEGATIVE_NAMES:
    return -1
  place = next((k for k, word in enumerate(words) if word in NEGATIONS), None)
  negated = words[place + 1 :] if place is not None else []
  if "free" in words[1:]:
    negated += words[: words.index("free", 1)]
    place = 0
  if place is not None:
    return 1 if set(negated) & NEGATIVE else -1
  if set(words) & NEGATIVE:
    return -1
  return 1 if set(words) & POSITIVE else 0


def _signs(names: Sequence[str]) -> tuple[int, int]:
  """Signs of two names, one of which sounds negative; if no word does, the number 0 does.

  A positive sound alone decides nothing: the other class may be a disease too.
  """
  first, second = names
  signs = sign(first, second), sign(second, first)
  if -1 in signs:
    return signs
  first_zero, second_zero = ("0" in _words(name) for name in names)
  return -int(first_zero), -int(second_zero)


def _words(name: str) -> list[str]:
  """Words and numbers of a name in small letters; capitals inside it begin a word."""
  spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
  return re.findall(r"[^\W\d_]+|\d+", spaced.lower())


def require_distinct(names: Sequence[str], kind: str) -> None:
  """Raises UserError where two names differ in case, spaces or punctuation only; signs count."""
  known: dict[str, str] = {}
  for name in names:
    key = re.sub(r"[^\w+<>]|_|-(?=.)", "", name.strip()).casefold() or name
    require(
      key not in known,
      f"the {kind} '{known.get(key)}' and '{name}' differ in case, spaces or punctuation only",
      "give them one name",
    )
    known[key] = name
