"""The secret of a private run: kept by its folder alone, and all draws follow from it."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import stat
import zlib

import jax
import numpy as np
import pytest

from fedjax_med.core.errors import UserError
from fedjax_med.core.keys import base_key
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.folder import secret
from fedjax_med.prepare import run_id
from fedjax_med.prepare.case import baselines, federation
from fedjax_med.prepare.experiment import build, run_key
from fedjax_med.report import reported_run as runs
from fedjax_med.run.single import block_arguments
from fedjax_med.trained.exporting import export_model
from fedjax_med.trained.loading import load
from tests.command import smoke
from tests.running import run, smoke_config

ONE, OTHER = bytes(range(16)), bytes(range(1, 17))


@pytest.fixture
def really_drawn(monkeypatch):
  """Secrets of the operating system, which the other tests do without."""
  monkeypatch.setattr(secret, "draw", lambda: os.urandom(secret.BYTES))


@pytest.fixture(scope="module")
def hospitals():
  return load_hospitals(smoke_config())


def started(folder: pathlib.Path, noise_key: pathlib.Path | None = None) -> tuple[str, str]:
  """Digest of the weights and id of a run of one round."""
  runs.run(smoke_config(server__num_rounds=1), folder, "smoke", "", noise_key=noise_key)
  found = json.loads((folder / "summary.json").read_text())
  return found["weights_sha256"], found["run_id"]


@pytest.mark.slow
def test_two_runs_of_one_command_share_nothing_unless_they_share_the_secret(tmp_path, really_drawn):
  key = tmp_path / "published.key"
  key.write_text(ONE.hex())
  first, second = (started(tmp_path / name) for name in "ab")
  assert first[0] != second[0]
  assert first[1] != second[1]
  assert started(tmp_path / "c", key) == started(tmp_path / "d", key)
  assert secret.read(tmp_path / "c" / secret.FILE) == ONE


def test_only_the_owner_may_read_the_secret(tmp_path, really_drawn):
  made = [secret.folder_secret(place, None, begun=False) for place in (tmp_path,) * 2]
  assert made[0] == made[1] == secret.read(tmp_path / secret.FILE)
  assert stat.S_IMODE((tmp_path / secret.FILE).stat().st_mode) == 0o600
  assert [path.name for path in tmp_path.iterdir()] == [secret.FILE]


def test_a_run_that_lost_its_secret_does_not_go_on(tmp_path):
  run(tmp_path, server__num_rounds=1)
  (tmp_path / secret.FILE).unlink()
  with pytest.raises(UserError, match=r"noise\.key is missing, the secret .*; restore the file"):
    run(tmp_path, server__num_rounds=2)


def test_another_secret_does_not_go_on_with_a_run(tmp_path):
  (tmp_path / "other.key").write_text(OTHER.hex())
  folder = tmp_path / "run"
  run(folder, server__num_rounds=1)
  with pytest.raises(UserError, match=r"other\.key is not the secret that the run in"):
    runs.run(smoke_config(), folder, "smoke", "", noise_key=tmp_path / "other.key")


@pytest.mark.parametrize(
  ("text", "sentence"),
  [("", "holds 0 bytes"), ("abcd", "holds 2 bytes and not 16"), ("xyz", "no hexadecimal digits")],
)
def test_a_file_that_is_no_secret_is_refused(tmp_path, text, sentence):
  (tmp_path / "my.key").write_text(text)
  with pytest.raises(UserError, match=sentence):
    secret.read(tmp_path / "my.key")


def test_a_secret_without_privacy_is_refused(tmp_path):
  (tmp_path / "my.key").write_text(ONE.hex())
  config = smoke_config(privacy__mechanism="none", privacy__noise_multiplier=0.0)
  with pytest.raises(UserError, match="without privacy: there is no noise"):
    runs.run(config, tmp_path / "run", "smoke", "", noise_key=tmp_path / "my.key")


@pytest.mark.slow
def test_no_file_but_its_own_helps_to_recompute_a_draw(tmp_path):
  folder = tmp_path / "run"
  run(folder, server__num_rounds=2, eval__tracker="tensorboard", eval__local_baselines=True)
  trained = load(folder)
  for how, name in (("jax", "model.jax"), ("safetensors", "model.safetensors")):
    export_model(trained, how, folder / "exports" / name)
  own = secret.read(folder / secret.FILE)
  case = federation(smoke_config(server__num_rounds=2), load_hospitals(smoke_config()), own)
  key = np.asarray(jax.random.key_data(build(case.config, case.hospitals, own).key))
  tell_tale = [own, own.hex().encode(), key.tobytes()]
  tell_tale += [str(word).encode() for word in (*case.identity.words, *key.tolist())]
  files = [path for path in folder.rglob("*") if path.is_file() and path.name != secret.FILE]
  assert {"report.html", "privacy_statement.md", "model.jax.json", "ledger.jsonl"} < {
    path.name for path in files
  }
  for path in files:
    content = path.read_bytes()
    assert not any(telling in content for telling in tell_tale), path
  assert not list((folder / "baselines").rglob(secret.FILE))


def released(experiment, rounds: int = 4) -> np.ndarray:
  """What some rounds added to the initial weights, as one vector."""
  before = experiment.program.initial()
  start = np.asarray(before.server.params)
  after, _ = experiment.program.block(before, *block_arguments(experiment, rounds))
  return np.asarray(after.server.params) - start


def test_noise_cannot_be_recomputed_from_what_is_public(hospitals):
  config = smoke_config(privacy__noise_multiplier=30.0)
  experiment = build(config, hospitals, OTHER)
  true = released(experiment)
  same = released(build(config, hospitals, OTHER))
  np.testing.assert_array_equal(true, same)
  public = jax.random.fold_in(base_key(config.seed), int(experiment.run_id[:8], 16))
  for guess in (public, base_key(config.seed), build(config, hospitals, ONE).key):
    guessed = released(experiment._replace(key=guess))
    assert abs(np.corrcoef(true, guessed)[0, 1]) < 0.3  # 0.998 with the right key, see below
  louder = build(smoke_config(privacy__noise_multiplier=30.0, client__learning_rate=0.4), hospitals)
  right = released(louder._replace(key=experiment.key))
  assert np.corrcoef(true, right)[0, 1] > 0.95  # the attack works for whoever has the key


def identity_of(hospitals, own: bytes = ONE, **changes) -> run_id.Identity:
  return federation(smoke_config(**changes), hospitals, own).identity


def test_the_id_of_a_private_run_tells_nothing_of_its_data_without_the_secret(hospitals):
  own = os.urandom(16)
  true = identity_of(hospitals, own)
  flipped = dataclasses.replace(hospitals.dataset, labels=1 - hospitals.dataset.labels)
  other = identity_of(dataclasses.replace(hospitals, dataset=flipped), own)
  assert other.run_id != true.run_id  # a resume notices
  content = [identity_of(hospitals, guess).run_id for guess in (b"", bytes(16), ONE)]
  assert true.run_id not in content


def test_runs_of_one_secret_share_no_noise_where_anything_differs(hospitals, monkeypatch):
  first = identity_of(hospitals)
  found = [first]
  found.append(identity_of(hospitals, privacy__noise_multiplier=1.003))  # of one data and seed
  found.append(identity_of(hospitals, client__label_smoothing=0.1))
  with monkeypatch.context() as patch:
    patch.setattr(run_id, "sources_digest", lambda: "edited")
    found.append(identity_of(hospitals))
  with monkeypatch.context() as patch:
    version = importlib.metadata.version
    patch.setattr(
      importlib.metadata, "version", lambda name: "9" if name == "scipy" else version(name)
    )
    found.append(identity_of(hospitals))
  case = federation(smoke_config(), hospitals, ONE)
  found += [baseline.identity for baseline in baselines(case).values()]
  assert len({words.words for words in found}) == len(found)
  assert len({words.run_id for words in found}) == len(found)
  assert identity_of(hospitals) == first


def test_a_mechanism_that_differs_by_a_hair_has_other_noise(hospitals):
  case = federation(smoke_config(), hospitals, ONE)
  (local,) = case.guarantees
  nearly = tuple(
    dataclasses.replace(m, noise_multiplier=m.noise_multiplier * (1 + 1e-9))
    for m in local.mechanisms
  )
  words = [
    run_id.identify(case.config, hospitals, case.names, case.table, [guarantee], ONE).words
    for guarantee in (local, local._replace(mechanisms=nearly))
  ]
  assert words[0] == case.identity.words
  assert words[0] != words[1]


def test_every_bit_of_the_secret_reaches_the_key(hospitals):
  experiment = build(smoke_config(), hospitals, ONE)
  keys = set()
  for place in range(16):
    changed = bytes(byte ^ (1 if k == place else 0) for k, byte in enumerate(ONE))
    case = experiment.case._replace(secret=changed)
    key = run_key(experiment._replace(case=case), 0)
    keys.add(tuple(np.asarray(jax.random.key_data(key)).tolist()))
  assert len(keys) == 16


def test_a_run_without_privacy_has_no_secret_and_keeps_its_id(hospitals):
  config = smoke_config(privacy__mechanism="none", privacy__noise_multiplier=0.0)
  case = federation(config, hospitals, ONE)
  assert (case.secret, case.identity.words) == (b"", ())
  assert federation(config, hospitals).run_id == case.run_id


@pytest.mark.slow
def test_no_program_that_is_kept_holds_a_key_or_an_image(tmp_path):
  """Constants of a program are written into the compiler's cache, which others may read."""
  cache, folder = tmp_path / "cache", tmp_path / "run"
  for name, more in (("train", ()), ("audit", ("--trials=1000",))):
    arguments = (f"--workdir={folder}", f"--config.execution.compilation_cache={cache}", *more)
    done = smoke(("-m", f"fedjax_med.{name}"), *arguments)
    assert done.returncode == 0, done.stderr
  config = smoke_config()
  experiment = build(config, load_hospitals(config), secret.read(folder / secret.FILE))
  assert experiment.run_id == json.loads((folder / "summary.json").read_text())["run_id"]
  words = np.asarray(jax.random.key_data(experiment.key), np.uint32)
  images = [image.tobytes() for image in np.asarray(experiment.pool.inputs)]
  kept = [path for path in cache.rglob("*") if path.is_file()]
  assert sum(decompressed(path.read_bytes()) != path.read_bytes() for path in kept) > 20
  for path in kept:
    content = decompressed(path.read_bytes())
    assert words.tobytes() not in content, path
    assert not all(varint(word) in content for word in words), path
    assert not any(image in content for image in images), path


def varint(word: np.uint32) -> bytes:
  """A number as protocol buffers write it."""
  number, found = int(word), b""
  while number > 127:
    found, number = found + bytes([number & 127 | 128]), number >> 7
  return found + bytes([number])


def decompressed(content: bytes) -> bytes:
  """A program of the compiler's cache, whichever way it was packed."""
  with contextlib.suppress(zlib.error):
    return zlib.decompress(content)
  if content[:4] == b"\x28\xb5\x2f\xfd":
    return pytest.importorskip("zstandard").ZstdDecompressor().decompress(content)
  return content
