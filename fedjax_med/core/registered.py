"""Names that presets register, by the field that takes them; --help lists them."""

REGISTERED: dict[str, list[str]] = {}  # tasks too, which no field takes but datasets name
_heard: list[str] = []


def heard() -> int:
  """Number of registrations so far; the same name once more counts too."""
  return len(_heard)


def add_name(path: str, name: str) -> None:
  """Lists a name under the field at ``path``, once: config files are read several times."""
  _heard.append(name)
  names = REGISTERED.setdefault(path, [])
  if name not in names:
    names.append(name)


def listed(path: str) -> str:
  """A sentence on the names that were registered for a field; empty without any."""
  names = REGISTERED.get(path, [])
  return f" Registered here: {', '.join(names)}." if names else ""
