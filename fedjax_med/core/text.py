"""Text that any terminal, file and page can hold."""


def readable(name: str) -> str:
  """A file name as printable text."""
  text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
