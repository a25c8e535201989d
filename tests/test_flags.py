"""The command line: what is wrong is named in one sentence, and --help never drifts."""

import os
import pathlib
import subprocess
import sys

import pytest

from fedjax_med.core.config import Config, declared, get_field
from tests.command import start

ROOT = pathlib.Path(__file__).resolve().parents[1]

ENTRY_POINT = '''
"""Prints the configuration it was given."""

from fedjax_med.core.config import declared, get_field
from fedjax_med.flags import define_config, load_config, run_main

define_config()


def main(argv):
  config = load_config()
  if config.seed == 130:
    raise KeyboardInterrupt
  if config.seed == 1:
    raise RuntimeError("a bug of ours")
  for path in declared():
    print(f"{path}={get_field(config, path)!r}")


if __name__ == "__main__":
  run_main(main)
'''

PRESET = """
from fedjax_med.core.config import ClientConfig, Config


def get_config():
  config = Config(client=ClientConfig(batch_size=16))
{body}
  return config
"""


@pytest.fixture
def folder(tmp_path):
  """A working folder with an entry point module and a preset configs/good.py."""
  (tmp_path / "entry.py").write_text(ENTRY_POINT.lstrip())
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "good.py").write_text(PRESET.format(body=""))
  return tmp_path


def run(folder, *arguments):
  """Runs the entry point as a user would; returns exit code, stdout and stderr."""
  done = subprocess.run(
    [sys.executable, "-m", "entry", *arguments],
    cwd=folder,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  return done.returncode, done.stdout, done.stderr


def test_overrides_reach_the_config_and_the_last_one_counts(folder):
  code, out, err = run(
    folder,
    "--config=configs/good.py",
    "--config.seed=3",
    "--config.server.num_rounds=4",
    "--config.server.num_rounds=5",
    "--config.client.learning_rate",
    "1",
    "--config.data.source=folder",
    "--config.data.path=scans",
    "--config.data.strict",
    "--config.data.patient_pattern=(p[0-9]+)=x",
  )
  assert (code, err) == (0, "")
  expected = {path: get_field(Config(), path) for path in declared()}
  expected |= {
    "seed": 3,
    "server.num_rounds": 5,
    "client.batch_size": 16,
    "client.learning_rate": 1.0,
    "data.source": "folder",
    "data.path": "scans",
    "data.strict": True,
    "data.patient_pattern": "(p[0-9]+)=x",
  }
  assert out.splitlines() == [f"{path}={value!r}" for path, value in expected.items()]


GOOD = "--config=configs/good.py"
WRONG = {
  "missing config": ([], "--config is missing; start with a preset"),
  "config without value": (["--config"], "Missing value for flag --config"),
  "unknown flag": (["--conifg=x"], "--conifg is unknown; did you mean '--config'?"),
  "missing file": (["--config=configs/god.py"], "did you mean 'configs/good.py'?"),
  "folder for a file": (["--config=configs"], "--config=configs is not a file"),
  "forgotten --config": (["configs/good.py"], "'configs/good.py' is not a flag; pass a preset as"),
  "misspelt field": ([GOOD, "--config.client.bach_size=3"], "'--config.client.batch_size'?"),
  "misspelt section": ([GOOD, "--config.clint.batch_size=3"], "'--config.client.batch_size'?"),
  "half a field": ([GOOD, "--config.privacy.noise_mult=1"], "'--config.privacy.noise_multiplier'?"),
  "misspelt switch": ([GOOD, "--noconfig.data.strct"], "'--config.data.strict'?"),
  "no section": (
    [GOOD, "--config.learning_rate=1"],
    "choose one of --config.client.learning_rate, --config.server.learning_rate",
  ),
  "section for a field": ([GOOD, "--config.eval=3"], "set its fields: --config.eval.every, "),
  "nothing alike": ([GOOD, "--config.zzz=1"], "--config.zzz is unknown; see --help"),
  "field before config": (["--config.seed=1", GOOD], "--config.seed needs a --config before it"),
  "text for a whole number": (
    [GOOD, "--config.client.batch_size=abc"],
    "--config.client.batch_size=abc must be a whole number; its default is 32",
  ),
  "fraction for a whole number": ([GOOD, "--config.seed=1.5"], "must be a whole number"),
  "text for a switch": ([GOOD, "--config.data.strict=x"], "must be true or false"),
  "not a number": ([GOOD, "--config.client.learning_rate=nan"], "learning_rate=nan must be above"),
  "without effect": (
    [GOOD, "--config.client.momentum=0.5"],
    "client.momentum=0.5 is read with client.optimizer=momentum only, and it is 'sgd'; use"
    " --config.client.optimizer=momentum,",
  ),
  "broken rule": ([GOOD, "--config.client.schedule=cosin"], "did you mean 'cosine'?"),
}


@pytest.mark.parametrize(("arguments", "sentence"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_command_line_is_one_sentence_and_exit_2(folder, arguments, sentence):
  code, out, err = run(folder, *arguments)
  assert (code, out) == (2, "")
  assert err.startswith("error: ")
  assert err.count("\n") == 1
  assert sentence in err


BROKEN = {
  "syntax error": ("x = = 1\n", "configs/bad.py, line 1: invalid syntax"),
  "name error": (
    "def get_config():\n  return foo\n",
    "configs/bad.py, line 2: NameError: name 'foo'",
  ),
  "wrong argument": (
    "from fedjax_med.core.config import Config\ndef get_config():\n  return Config(clint=1)\n",
    "configs/bad.py, line 3: TypeError",
  ),
  "missing file inside": ("open('no_such_file')\n", "line 1: FileNotFoundError"),
  "no get_config": ("x = 1\n", "configs/bad.py has no get_config()"),
  "forgotten return": ("def get_config():\n  pass\n", "returned NoneType, not Config"),
  "another type": ("def get_config():\n  return {}\n", "returned dict, not Config"),
  "misspelt field": (
    PRESET.format(body="  config.client.bach_size = 3"),
    "client.bach_size, set by the config file, is unknown; did you mean '--config.client.batch_",
  ),
  "text for a number": (
    PRESET.format(body="  config.client.batch_size = '64'"),
    "client.batch_size='64' is str; give a whole number such as 32",
  ),
  "switch for a number": (
    PRESET.format(body="  config.client.batch_size = True"),
    "client.batch_size=True is bool; give a whole number",
  ),
  "section replaced": (
    PRESET.format(body="  config.privacy = config.data"),
    "privacy is DataConfig, not PrivacyConfig",
  ),
}


@pytest.mark.parametrize(("source", "sentence"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_config_file_is_one_sentence_and_exit_2(folder, source, sentence):
  (folder / "configs" / "bad.py").write_text(source)
  code, out, err = run(folder, "--config=configs/bad.py")
  assert (code, out) == (2, "")
  assert err.startswith("error: ")
  assert err.count("\n") == 1
  assert sentence in err


def test_whole_numbers_for_fractions_become_float_so_that_the_run_id_is_the_same(folder):
  preset = PRESET.format(body="  config.client.learning_rate = 1")
  (folder / "configs" / "good.py").write_text(preset)
  _, out, _ = run(folder, GOOD)
  assert "client.learning_rate=1.0" in out.splitlines()


@pytest.mark.parametrize("arguments", [["--config.client.schedule=cosin"], ["--config.zzz=1"]])
def test_debug_adds_the_traceback_and_keeps_the_sentence_and_the_code(folder, arguments):
  code, _, err = run(folder, GOOD, *arguments, "--debug")
  assert code == 2
  assert err.startswith("Traceback")
  assert err.splitlines()[-1].startswith("error: ")


def test_ctrl_c_is_a_short_line_and_exit_130(folder):
  assert run(folder, GOOD, "--config.seed=130") == (130, "", "interrupted\n")


def test_a_bug_keeps_its_traceback(folder):
  code, _, err = run(folder, GOOD, "--config.seed=1")
  assert code == 1
  assert "RuntimeError: a bug of ours" in err
  assert "entry.py" in err


LIVELY = """
  config.client.optimizer = 'momentum'
  config.client.momentum = 0.8
"""


def test_a_flag_takes_away_what_the_preset_set_beside_it_and_says_so(folder):
  (folder / "configs" / "good.py").write_text(PRESET.format(body=LIVELY))
  code, out, err = run(folder, GOOD, "--config.client.optimizer=sgd")
  assert code == 0
  assert "client.momentum=0.9" in out.splitlines()
  assert err == (
    "note: client.momentum=0.8 of the preset is not read with these flags, and back at 0.9\n"
  )
  named = run(folder, GOOD, "--config.client.optimizer=sgd", "--config.client.momentum=0.8")
  assert named[0] == 2
  assert "leave client.momentum at 0.9" in named[2]


def test_what_a_preset_sets_without_effect_is_refused_until_a_flag_gives_it_one(folder):
  unread = PRESET.format(body="  config.client.momentum = 0.8")
  (folder / "configs" / "good.py").write_text(unread)
  code, _, err = run(folder, GOOD)
  assert code == 2
  assert "client.momentum=0.8 is read with client.optimizer=momentum only" in err
  code, out, err = run(folder, GOOD, "--config.client.optimizer=momentum")
  assert (code, err) == (0, "")
  assert "client.momentum=0.8" in out.splitlines()


def test_help_describes_the_command_and_every_field_with_type_and_default(folder):
  code, out, err = run(folder, "--config=configs/missing.py", "--help")
  assert (code, err) == (0, "")
  assert "Usage: python -m entry --config=FILE [flags]" in out
  assert "Prints the configuration it was given." in out
  words = " ".join(out.split())
  for flag in ("--config=", "--workdir=", "--debug", "--help"):
    assert f"\n  {flag}" in out
  for path, field in declared().items():
    assert f"--config.{path}={field.default} ({field.kind.__name__}) {field.doc}" in words
  assert "of optimizer=adamw. Read with client.optimizer=adamw." in words


def test_every_config_field_has_a_meaning():
  fields = declared()
  assert len(fields) > 50
  assert [path for path, field in fields.items() if len(field.doc) < 4] == []
  assert fields["privacy.clip_norm"].doc == "C, largest l2 norm of one example's gradient."
  assert fields["data.path"].default == ""
  assert "``" not in "".join(field.doc for field in fields.values())


def test_main_gets_arguments_that_are_not_flags_when_there_is_no_config(folder):
  (folder / "other.py").write_text(
    '"""Prints its arguments."""\n'
    "from fedjax_med.flags import run_main\n"
    "if __name__ == '__main__':\n"
    "  run_main(lambda argv: print(argv[1:]))\n"
  )
  done = subprocess.run(
    [sys.executable, "other.py", "runs/a", "--debug", "runs/b"],
    cwd=folder,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=60,
    check=True,
  )
  assert done.stdout == "['runs/a', 'runs/b']\n"


@pytest.mark.parametrize(
  ("module", "arguments", "sentence"),
  [
    (
      "predict",
      ["--images=scans", "--layer=conv1"],
      "--layer is read with --maps only; add that, or leave out --layer",
    ),
    ("report", ["--out=both"], "--out is read with several folders in --workdir only; add that,"),
    ("explain", ["--images=scans", "--data_path=x"], "--data_path with --images=scans, which is"),
    ("explain", ["--images=scans", "--show_patients"], "--show_patients with --images=scans, whi"),
  ],
)
def test_flags_of_commands_without_effect_are_refused(module, arguments, sentence):
  result = start(module, "--workdir=run", *arguments)
  assert (result.returncode, result.stdout) == (2, "")
  assert result.stderr.startswith(f"error: {sentence}")
