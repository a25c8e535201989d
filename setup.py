"""Package metadata; tool settings are in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).resolve().parent
VERSION = re.search(
  r'^__version__ = "([^"]+)"',
  (ROOT / "fedjax_med" / "__init__.py").read_text("utf-8"),
  re.MULTILINE,
)
assert VERSION is not None, "fedjax_med/__init__.py defines no __version__"
README = ROOT / "README.md"

# Tried on Python 3.11 with jax 0.10.2 and flax 0.12.8 and on Python 3.12 with jax 0.11.2 and flax
# 0.12.12, which is what pip takes there. The lower bounds are a judgement, not tested; an upper
# bound is the next version that may break an API.
INSTALL = [
  "absl-py>=2.1,<3",
  "array_record>=0.8,<0.9; platform_system != 'Windows'",
  "chex>=0.1.90,<0.2",
  "dp-accounting>=0.6,<0.7",
  "flatbuffers>=24,<27",  # used by jax.export, which does not declare it
  "flax>=0.12,<0.13",
  "importlib_resources>=6",  # used by tensorflow-datasets, which does not declare it
  "jax>=0.10,<0.12",
  "jinja2>=3.1,<4",
  "matplotlib>=3.9,<4",
  "ml_collections>=1.0,<2",
  "numpy>=2.0,<3",
  "optax>=0.2.5,<0.3",
  "orbax-checkpoint>=0.11.30,<0.13",
  "pandas>=3.0,<4",
  "pillow>=10",
  "pyarrow>=20",  # pandas' parquet
  "rich>=13.7,<16",
  "safetensors>=0.5,<0.9",
  "scipy>=1.13,<2",
  "tensorflow-datasets>=4.9.10,<5",
]
# What the test of converted weights compares with.
TORCH = ["torch>=2.13,<2.14"]
# What the benchmarks compare with; pfl-research needs an environment of its own, since it holds
# dp-accounting below 0.6 (benchmarks/README.md).
PEERS = [
  "fedjax==0.0.17",
  "flwr[simulation]>=1.42,<1.43",
  "opacus>=1.6,<1.7",
  *TORCH,
]
SUBMIT = ["submitit>=1.5,<2"]
DICOM = ["pydicom>=3.0,<4"]
NIFTI = ["nibabel>=5.2,<6"]
# Homomorphic encryption; a wheel of 5 MB for Python 3.11 to 3.14. A ciphertext's size is tested.
HE = ["tenseal>=0.3.18,<0.4"]
TENSORBOARD = ["tensorboardX>=2.6,<3"]
TEST = [
  "hypothesis>=6.100,<7",
  "jax-privacy>=2.0,<2.1",  # clips the other way; its API still changes
  "pytest>=8.3,<10",
  "pytest-xdist>=3.6,<4",
  "scikit-image>=0.25,<0.27",  # what texture features are compared with
  "scikit-learn>=1.5,<2",
  *DICOM,
  *HE,
  *NIFTI,
  *SUBMIT,
  *TENSORBOARD,
]
# The one place where the versions of the tools stand: git hook, make and CI all use them.
TOOLS = [
  "pandas-stubs==3.1.0.261029",
  "pre-commit==4.7.0",
  "pyright[nodejs]==1.1.414",  # with Node.js from PyPI: nothing else to install or download
  "ruff==0.17.6",
]

setup(
  name="fedjax_med",
  version=VERSION[1],
  description="Federated learning across hospitals with exact DP-SGD, simulated in JAX.",
  long_description=README.read_text("utf-8") if README.exists() else "",
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  python_requires=">=3.11",
  packages=find_packages(include=["fedjax_med", "fedjax_med.*"]),
  package_data={"fedjax_med": ["data/*.toml", "report/templates/*"]},
  install_requires=INSTALL,
  extras_require={
    "test": TEST,
    "dev": TEST + TOOLS,
    "peers": PEERS,
    "torch": TORCH,
    "dicom": DICOM,
    "he": HE,
    "nifti": NIFTI,
    "submit": SUBMIT,
    "tensorboard": TENSORBOARD,
    "wandb": ["wandb>=0.30,<1"],
    "mlflow": ["alembic>=1.13,<2", "mlflow-skinny>=3,<4", "sqlalchemy>=2,<3"],
    "gpu": ["jax[cuda12]>=0.10,<0.12"],
    "tpu": ["jax[tpu]>=0.10,<0.12"],
  },
  classifiers=[
    "Intended Audience :: Science/Research",
    "Programming Language :: Python :: 3 :: Only",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Topic :: Scientific/Engineering :: Medical Science Apps.",
  ],
)
