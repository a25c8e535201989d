"""Names that presets register, by the field that takes them; --help lists them."""

REGISTERED: dict[str, list[str]] = {}


def add_name(path: str, name: str) -> None:
  """Lists a name under the field at ``path``, once: config files are read several times."""
  names = REGISTERED.setdefault(path, [])
  if name not in names:
    names.append(name)


def listed(path: str) -> str:
  """A sentence on the names that were registered for a field; empty without any."""
  names = REGISTERED.get(path, [])
  return f" Registered here: {', '.join(names)}." if names else ""
