"""Settings every test runs under: eight CPU devices, strict types and shapes, cached compiles."""

import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Read by jax and matplotlib when they are imported, so set before anything imports them.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()
os.environ["MPLBACKEND"] = "Agg"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Compiled programs are kept between test runs: a rerun compiles only what changed.
_cache = os.environ.get("FEDJAX_MED_TEST_CACHE", "~/.cache/fedjax_med/xla_tests")
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(_cache).expanduser()))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


# Linux grants a process 65,530 memory maps, a compiled program takes hundreds, and one too many
# ends the process. Dropped programs come back from the cache.
MAPS, MOST_MAPS = pathlib.Path("/proc/self/maps"), 30_000


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
  """Drops compiled programs between modules where they come near the limit of a process."""
  if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="session")
def one_secret():
  """Gives every private run of this process the same secret, so that runs can be compared."""
  from fedjax_med.folder import secret

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(secret, "draw", lambda: bytes(range(secret.BYTES)))
    yield


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
  """The folder that holds Br35H/ and SARS-CoV-2-CT/; the test is skipped where it is absent."""
  default = ROOT.parent / "shared" / "data"
  folder = pathlib.Path(os.environ.get("FEDJAX_MED_DATA", default)).expanduser()
  if not folder.is_dir():
    pytest.skip(f"real data: {folder} is absent; set FEDJAX_MED_DATA to the downloaded folder")
  return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
  """A finished run, for tests that only read it."""
  folder = tmp_path_factory.mktemp("finished")
  from tests.running import run

  run(folder)
  return folder


@pytest.fixture(scope="session")
def learned(tmp_path_factory):
  """A CNN that finds most tumours, and an average of whose weights is measured."""
  folder = tmp_path_factory.mktemp("learned")
  from tests.learning import learn, learning_config

  learn(folder, learning_config())
  return folder


@pytest.fixture(scope="session")
def gated(tmp_path_factory):
  """A network with squeeze-and-excitation whose norms stay at the hospitals."""
  from tests.learning import learn, learning_config

  folder, config = tmp_path_factory.mktemp("gated"), learning_config()
  config.model.name, config.server.algorithm = "se_resnext_micro", "fedbn"
  config.server.num_rounds = config.eval.every = 1
  config.client.num_local_steps, config.server.ema_decay = 2, 0.0
  learn(folder, config)
  return folder
