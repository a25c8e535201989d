"""Command line of the entry points: flags, --help from the fields' declarations, one-line errors.

An entry point is three lines: ``define_config()`` at module level, a ``main`` that calls
``load_config()``, and ``run_main(main)``. An error that the user can put right is one sentence on
stderr and exit code 2; only our own bugs print a traceback.
"""

import contextlib
import errno
import inspect
import os
import pathlib
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Collection
from typing import NoReturn

from absl import flags
from ml_collections import config_flags

from fedjax_med.core import presets
from fedjax_med.core.config import Config, declared, sections
from fedjax_med.core.errors import UserError, nearest, require
from fedjax_med.core.presets import KINDS, check_values, drop_inherited, nearest_field, read_preset
from fedjax_med.core.registered import listed
from fedjax_med.core.text import use_any_terminal, visible
from fedjax_med.core.validation import validate

_HELP = ("--help", "-help", "-h", "--helpfull", "--helpshort")
_WIDTH = 100
_PASS_A_PRESET = "start with a preset: --config=configs/quickstart.py"

flags.DEFINE_bool("debug", False, "Print the traceback of an error too.")


def define_config() -> None:
  """Defines --config (with every --config.section.field) and --workdir."""
  config_flags.DEFINE_config_file(
    "config", None, "Python file whose get_config() returns a Config, such as configs/quickstart.py"
  )
  flags.DEFINE_string("workdir", None, "Folder of the run: results, checkpoints, report.")


def define_noise_key() -> None:
  """Defines --noise_key."""
  flags.DEFINE_string(
    "noise_key",
    None,
    "File with the secret of a private run, 32 hexadecimal digits: the same secret, flags and data"
    " give the same noise. Left out, a new run draws one and keeps it as noise.key in its workdir.",
  )


def define_network() -> None:
  """Defines --network, whose file ``core.presets.register_parts`` reads."""
  flags.DEFINE_string(
    "network",
    "",
    "Python file that registers the run's network, source, task or other parts, if they are yours:"
    " usually the --config of the run.",
  )


def noise_key() -> pathlib.Path | None:
  """The file of --noise_key; None without it."""
  name = flags.FLAGS["noise_key"].value
  return pathlib.Path(name).expanduser() if name else None


def load_config(whole: bool = True) -> Config:
  """The Config of the command line, checked; call it inside ``main``.

  A setting of the preset that the flags leave without effect falls back to its default, and stderr
  says so.

  Args:
    whole: True checks every rule, False the types of values only.

  Raises:
    UserError: --config is missing, or a value breaks a rule of ``core.validation.validate``.
  """
  config = flags.FLAGS["config"].value
  if config is None:
    raise UserError(f"--config is missing; {_PASS_A_PRESET}")
  check_values(config, "the config file", "--config.")
  if whole:
    notes = drop_inherited(config, *_preset_and_flags(), "these flags")
    validate(config)
    for sentence in notes:  # of a mistake in the flags, that alone is said
      print(f"note: {sentence}", file=sys.stderr)
  return config


def inherited() -> set[str]:
  """Fields that the preset reads as it is written, and that no flag sets."""
  return presets.inherited(*_preset_and_flags())


def _preset_and_flags() -> tuple[Config, Collection[str]]:
  """The preset as it is written, and the fields that flags set."""
  flag = flags.FLAGS["config"]
  preset = read_preset(config_flags.get_config_filename(flag), "--config")
  return preset, config_flags.get_override_values(flag)


def run_main(main: Callable[[list[str]], None]) -> None:
  """Parses the command line and runs ``main`` with what is left of it (program name first).

  Exits with code 2 after a UserError, a file that the system refuses or a wrong command line (one
  line on stderr, with --debug the traceback as well), 130 after Ctrl-C, 0 after --help. Other
  exceptions are bugs and pass. Letters that a terminal's encoding lacks are spelt out.
  """
  use_any_terminal()
  if any(argument in _HELP for argument in sys.argv[1:]):
    with contextlib.suppress(UserError):  # --help answers beside a wrong preset too
      _register(sys.argv)
    try:
      print(help_text(main), flush=True)
    except BrokenPipeError:  # "--help | head" closed the pipe: nothing more can be written
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return
  try:
    main(_parse(sys.argv))
  except UserError as error:
    if flags.FLAGS["debug"].value or "--debug" in sys.argv:  # the latter if parsing failed
      traceback.print_exc()
    _fail(f"error: {error}", 2)
  except BrokenPipeError:  # "... | head" closed the pipe
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except OSError as error:  # whatever the file system refuses, a full disk for one
    if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    if flags.FLAGS["debug"].value:
      traceback.print_exc()
    _fail(
      f"error: {error.filename or 'a file'}: {error.strerror or error}; make it readable and"
      " writable, free space, or name other folders (--workdir, data.path, data.cache_dir)",
      2,
    )
  except KeyboardInterrupt:
    _fail("interrupted", 130)


def require_company(name: str, there: bool, company: str) -> None:
  """Raises UserError where the flag ``name`` was given and its ``company`` is not ``there``.

  Args:
    name: name of the flag, without dashes.
    there: whether the flag or setting that this one needs was given.
    company: name of that one, for people, such as ``--maps``.
  """
  require(
    there or not flags.FLAGS[name].present,
    f"--{name} is read with {company} only",
    f"add that, or leave out --{name}",
  )


def help_text(main: Callable[[list[str]], None]) -> str:
  """The text of --help: the module docstring of ``main``, its flags, every config field."""
  module = inspect.getmodule(main)
  spec = getattr(module, "__spec__", None)
  command = f"python -m {spec.name}" if spec else f"python {sys.argv[0]}"
  required = "--config=FILE " if "config" in flags.FLAGS else ""
  doc = inspect.cleandoc(getattr(module, "__doc__", None) or "")
  lines = [f"Usage: {command} {required}[flags]", "", doc]
  lines += ["", "Flags:"]
  for name, flag in _own_flags().items():
    value = "" if flag.boolean else "=..."
    lines += [f"  --{name}{value}", *_indented(flag.help)]
  lines += ["  --help", *_indented("This text.")]
  if "config" not in flags.FLAGS:
    return "\n".join(lines)

  lines += [
    "",
    "Fields of the configuration, with the default that a preset in configs/ may replace.",
    "Give them after --config, for example --config.server.num_rounds=5:",
  ]
  section, records = "", sections()
  for path, field in declared().items():
    if field.section != section:
      section = field.section
      doc = inspect.getdoc(records[section]) or ""
      lines += ["", f"{section}: {doc.splitlines()[0]}"]
    lines += [f"  --config.{path}={field.default}  ({field.kind.__name__})"]
    rules = " and ".join(rule.wording for rule in field.read)
    lines += _indented(field.doc + (f" Read with {rules}." if rules else "") + listed(path))
  return "\n".join(lines)


def _indented(text: str) -> list[str]:
  indent = " " * 6
  return textwrap.wrap(
    text, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
  )


def _own_flags() -> dict[str, flags.Flag]:
  """Flags defined by this package or the script that runs, not by the libraries it imports."""
  own = {}
  for module, found in flags.FLAGS.flags_by_module_dict().items():
    if module.startswith("fedjax_med") or module == sys.argv[0]:
      own |= {flag.name: flag for flag in found if "." not in flag.name}
  return own


def _parse(argv: list[str]) -> list[str]:
  """Parses absl flags; every way to get them wrong is a UserError with the remedy."""
  _register(argv)
  _check_config_names(argv)
  try:
    program, *arguments = flags.FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    name = f"--{error.flagname}"
    known = [f"--{flag}" for flag in _own_flags()]
    raise UserError(f"{name} is unknown; {nearest(name, [*known, '--help'])}") from None
  except flags.IllegalFlagValueError as error:
    raise UserError(_bad_value(str(error))) from None
  except flags.Error as error:
    raise UserError(f"{' '.join(str(error).split())}; see --help") from None
  require(
    not arguments or "config" not in flags.FLAGS,
    f"'{' '.join(arguments)}' is not a flag",
    "pass a preset as --config=configs/quickstart.py; see --help",
  )
  return [program, *arguments]


def _register(argv: list[str]) -> None:
  """Reads the preset, which may register algorithms: their options are fields from then on."""
  path = _config_path(argv)
  if path is not None and "config" in flags.FLAGS:
    read_preset(path, "--config")


def _bad_value(message: str) -> str:
  """absl's ``flag --config.seed=x: reason``, with the type a config field should have."""
  message = message.removeprefix("flag ")
  match = re.match(r"--config\.([\w.]+)=(.*?): ", message)
  if match is None:
    return f"{message}; see --help"
  path, value = match.groups()
  field = declared()[path]
  return f"--config.{path}={value} must be {KINDS[field.kind]}; its default is {field.default}"


def _check_config_names(argv: list[str]) -> None:
  """Names the nearest field for a --config.section.field that does not exist."""
  if "config" not in flags.FLAGS:
    return
  known = declared()
  has_config = False
  for argument in _flags_of(argv):
    has_config |= re.match(r"--?config(=|$)", argument) is not None
    match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
    if match is None:
      continue
    name = match[1]
    require(has_config, f"--config.{name} needs a --config before it", _PASS_A_PRESET)
    if name in known:
      continue
    inside = [f"--config.{path}" for path in known if path.startswith(f"{name}.")]
    require(not inside, f"--config.{name} is a section", f"set its fields: {', '.join(inside)}")
    remedy = nearest_field(name, known, "--config.") or "see --help for all fields"
    raise UserError(f"--config.{name} is unknown; {remedy}")


def _flags_of(argv: list[str]) -> list[str]:
  """Arguments before a bare ``--``, where absl stops looking for flags."""
  return argv[1 : argv.index("--")] if "--" in argv else argv[1:]


def _config_path(argv: list[str]) -> str | None:
  """Value of --config=FILE or --config FILE; the last one counts."""
  path = None
  arguments = _flags_of(argv)
  for index, argument in enumerate(arguments):
    if argument in ("--config", "-config") and index + 1 < len(arguments):
      path = arguments[index + 1]
    elif re.match(r"--?config=", argument):
      path = argument.partition("=")[2]
  return path


def _fail(message: str, code: int) -> NoReturn:
  print(visible(message), file=sys.stderr)
  sys.exit(code)
