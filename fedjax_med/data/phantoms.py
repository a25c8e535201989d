"""Seeded phantoms of brain MRI with and without a tumour, from five hospitals with unlike scanners.

Not a model of physics: enough anatomy (skull, cortex, white matter, ventricles, vessels, cysts)
and enough difference between scanners (contrast, bias field, noise, resolution, orientation) that a
classifier has to find the lesion, and pixel intensities alone do not give the answer away.
"""

import concurrent.futures
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from fedjax_med.data.dataset import Dataset
from fedjax_med.data.patients import PatientCounts


class Scanner(NamedTuple):
  """Look of one hospital's pictures; intensities are 0 to 1, lengths are shares of the image side.

  Attributes:
    name: name of the hospital.
    share: share of all patients.
    prevalence: share of its patients with a tumour.
    csf, grey, white, skull: tissue intensities.
    core, rim, oedema: intensities of a tumour's middle, edge and surroundings.
    gamma: exponent of the grey scale.
    bias: strength of the slow shading over the image.
    noise: standard deviation of the Rician noise.
    blur: standard deviation of the point spread.
    rotation: usual angle of the head, degrees.
    mirrored: whether left and right are exchanged.
    zoom: size of the head relative to the others.
  """

  name: str
  share: float
  prevalence: float
  csf: float
  grey: float
  white: float
  skull: float
  core: float
  rim: float
  oedema: float
  gamma: float
  bias: float
  noise: float
  blur: float
  rotation: float
  mirrored: bool
  zoom: float


SCANNERS = (
  Scanner(
    name="Ahorn (T1)",
    share=0.26, prevalence=0.50, csf=0.10, grey=0.34, white=0.46, skull=0.66, core=0.16, rim=1.00,
    oedema=0.24, gamma=1.0, bias=0.20, noise=0.03, blur=0.004, rotation=0, mirrored=False,
    zoom=1.00
  ),
  Scanner(
    name="Birke (T2)",
    share=0.23, prevalence=0.45, csf=0.60, grey=0.46, white=0.30, skull=0.25, core=0.78, rim=0.95,
    oedema=0.58, gamma=0.9, bias=0.25, noise=0.04, blur=0.006, rotation=8, mirrored=True, zoom=0.95
  ),
  Scanner(
    name="Clara (FLAIR)",
    share=0.20, prevalence=0.55, csf=0.08, grey=0.44, white=0.34, skull=0.50, core=0.76, rim=0.95,
    oedema=0.58, gamma=1.2, bias=0.25, noise=0.05, blur=0.006, rotation=-6, mirrored=False,
    zoom=1.06
  ),
  Scanner(
    name="Doria (T1 contrast)",
    share=0.17, prevalence=0.48, csf=0.12, grey=0.32, white=0.42, skull=0.62, core=0.14, rim=1.00,
    oedema=0.22, gamma=0.8, bias=0.35, noise=0.04, blur=0.008, rotation=180, mirrored=False,
    zoom=1.00
  ),
  Scanner(
    name="Erlen (low field)",
    share=0.14, prevalence=0.52, csf=0.50, grey=0.46, white=0.36, skull=0.40, core=0.80, rim=0.95,
    oedema=0.60, gamma=1.0, bias=0.30, noise=0.06, blur=0.010, rotation=3, mirrored=True, zoom=0.92
  ),
)  # fmt: skip
CHUNK = 256  # images drawn at once


def make_phantoms(num_examples: int, image_size: int, seed: int) -> Dataset:
  """Draws phantoms; the same arguments give the same bytes.

  A patient has 1 to 3 slices at one hospital, with one anatomy and, if any, one tumour; the label
  is 1 with a tumour. A tumour lies anywhere in the brain, its size, outline and contrast vary.

  Args:
    num_examples: images in all.
    image_size: side, pixels; everything is drawn in relative coordinates.
    seed: any non-negative number.

  Returns:
    A Dataset with sites (hospitals), patients and tumour masks.
  """
  rng = np.random.default_rng([seed, 0])
  slices = rng.integers(1, 4, num_examples)
  patients = np.repeat(np.arange(num_examples), slices)[:num_examples]
  num_patients = int(patients.max()) + 1
  shares = np.array([scanner.share for scanner in SCANNERS])
  site = rng.choice(len(SCANNERS), num_patients, p=shares / shares.sum())
  ill = rng.random(num_patients) < np.array([scanner.prevalence for scanner in SCANNERS])[site]
  anatomy = _draw_anatomy(rng, num_patients)

  images = np.empty((num_examples, image_size, image_size, 1), np.uint8)
  masks = np.empty((num_examples, image_size, image_size), bool)

  def fill(start: int) -> None:
    rows = slice(start, min(start + CHUNK, num_examples))
    who = patients[rows]
    # A generator of its own for each chunk, so that memory does not decide the pictures.
    chunk_rng = np.random.default_rng([seed, 1, start])
    part = {name: values[who] for name, values in anatomy.items()}
    images[rows, :, :, 0], masks[rows] = _draw(chunk_rng, part, site[who], ill[who], image_size)

  with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
    list(pool.map(fill, range(0, num_examples, CHUNK)))
  return Dataset(
    inputs=images,
    labels=ill[patients].astype(np.int32),
    names=tuple(f"phantom {n} of patient {p}" for n, p in enumerate(patients)),
    class_names=("healthy", "tumour"),
    sites=site[patients].astype(np.int32),
    site_names=tuple(scanner.name for scanner in SCANNERS),
    patients=patients.astype(np.int32),
    patient_counts=PatientCounts(
      named=num_examples, patients=len(np.unique(patients)), source="phantoms"
    ),
    notes=("Phantoms are drawn by a program: results on them say nothing about patients.",),
    tumour_masks=masks,
  )


def _draw_anatomy(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
  """Draws head, ventricles and tumour of each patient: one value (or row) a patient."""
  angle, radius = rng.uniform(0, 2 * np.pi, n), 0.62 * np.sqrt(rng.uniform(0.05, 1, n))
  return {
    "width": rng.uniform(0.34, 0.40, n),
    "height": rng.uniform(0.41, 0.46, n),
    "wobble": rng.normal(0, 0.015, (n, 3)),
    "ventricle_width": rng.uniform(0.5, 1.5, n),
    "ventricle_height": rng.uniform(0.6, 1.3, n),
    "ventricle_v": rng.uniform(-0.16, 0.08, n),
    "texture_seed": rng.integers(0, 2**31, n),
    "tumour_x": radius * np.cos(angle),
    "tumour_y": radius * np.sin(angle),
    "tumour_size": rng.uniform(0.19, 0.34, n),
    "tumour_wobble": rng.normal(0, 0.07, (n, 4)),
    "tumour_strength": rng.uniform(0.8, 1.0, n),
  }


def _smooth_field(noise: np.ndarray, scale: float) -> np.ndarray:
  """Random fields of standard deviation 1: [n, S, S] noise blurred at ``scale`` of the side."""
  sigma = scale * noise.shape[-1]
  field = ndimage.gaussian_filter(noise, (0, sigma, sigma), mode="wrap")
  return field / field.std((1, 2), keepdims=True)


def _edge(distance: np.ndarray, softness: float) -> np.ndarray:
  """1 inside (negative distance), 0 outside, with an edge of ``softness``."""
  return 1 / (1 + np.exp(np.clip(distance / softness, -30, 30)))


def _draw(
  rng: np.random.Generator,
  anatomy: dict[str, np.ndarray],
  site: np.ndarray,
  ill: np.ndarray,
  size: int,
) -> tuple[np.ndarray, np.ndarray]:
  """[n, size, size] uint8 pictures and the bool masks of their tumours."""
  n = len(site)

  def scanner(name: str) -> np.ndarray:
    return _column(np.array([getattr(s, name) for s in SCANNERS], np.float32)[site])

  # Head coordinates: u, v run from -1 to 1 over the head, whatever the scanner does with it.
  axis = ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)
  x = axis[None, None, :] - _column(rng.normal(0, 0.012, n))
  y = axis[None, :, None] - _column(rng.normal(0, 0.012, n))
  turn = np.deg2rad(scanner("rotation") + _column(rng.normal(0, 6, n)))
  flip = (
    np.where(scanner("mirrored") > 0, -1, 1) * scanner("zoom") * _column(rng.normal(1, 0.03, n))
  )
  u = (np.cos(turn) * x + np.sin(turn) * y) / (_column(anatomy["width"]) * flip)
  v = (np.cos(turn) * y - np.sin(turn) * x) / (_column(anatomy["height"]) * np.abs(flip))
  angle = np.arctan2(v, u)
  r = np.hypot(u, v)
  for harmonic in range(3):
    r = r * (1 + _column(anatomy["wobble"][:, harmonic]) * np.cos((harmonic + 2) * angle))

  folds = _textures(anatomy["texture_seed"], size)
  white = _edge(r - 0.62 - 0.24 * folds, 0.05)
  brain, inner = _edge(r - 0.89, 0.012), _edge(r - 0.93, 0.012)
  image = scanner("skull") * _edge(r - 1.0, 0.012)
  image += inner * (scanner("csf") - image)
  image += brain * (scanner("grey") + white * (scanner("white") - scanner("grey")) - image)
  image += brain * 0.05 * folds

  wide = 0.075 * _column(anatomy["ventricle_width"] * rng.normal(1, 0.08, n))
  tall, middle = 0.27 * _column(anatomy["ventricle_height"]), _column(anatomy["ventricle_v"])
  for side in (-1, 1):
    shape = np.hypot((u - side * (0.11 + 0.1 * np.abs(v))) / wide, (v - middle) / tall)
    image += _edge(shape - 1, 0.12) * (scanner("csf") - image)
  head = _Head(u=u, v=v, brain=brain, scanner=scanner)
  image = _distract(rng, image, head)
  tumour, image = _grow_tumour(rng, anatomy, image, head, ill)

  blur = np.array([s.blur for s in SCANNERS])[site] * size
  for number in range(n):
    ndimage.gaussian_filter(image[number], blur[number], output=image[number])
  bias = _smooth_field(rng.standard_normal((n, size, size), np.float32), 0.25)
  image *= 1 + scanner("bias") * 0.5 * np.clip(bias, -1.6, 1.6)
  image = np.clip(image, 0, 1.4) ** (scanner("gamma") * _column(rng.normal(1, 0.08, n)))
  image *= _column(rng.uniform(0.65, 0.95, n))
  noise = rng.standard_normal((2, n, size, size), np.float32) * scanner("noise")
  image = np.hypot(image + noise[0], noise[1])  # Rician: the magnitude of a complex signal
  return np.clip(image * 235, 0, 255).astype(np.uint8), tumour


def _textures(seeds: np.ndarray, size: int) -> np.ndarray:
  """[n, size, size] folds of the cortex, the same for every slice of a patient."""
  unique, inverse = np.unique(seeds, return_inverse=True)
  noise = np.stack(
    [np.random.default_rng(int(s)).standard_normal((size, size), np.float32) for s in unique]
  )
  return np.clip(_smooth_field(noise, 0.035), -2, 2)[inverse]


def _column(values: np.ndarray) -> np.ndarray:
  """One value of each picture, [n, 1, 1] float32."""
  return np.asarray(values, np.float32)[:, None, None]


class _Head(NamedTuple):
  """The heads of n pictures, drawn as far as the brain.

  Attributes:
    u: [n, S, S] horizontal position, -1 .. 1 over the head.
    v: [n, S, S] vertical position, the same.
    brain: [n, S, S] 1 inside the brain, 0 outside.
    scanner: name of a field of Scanner -> its value for each picture, [n, 1, 1].
  """

  u: np.ndarray
  v: np.ndarray
  brain: np.ndarray
  scanner: Callable[[str], np.ndarray]


def _distract(rng: np.random.Generator, image: np.ndarray, head: _Head) -> np.ndarray:
  """Adds vessels (tiny, bright) and cysts (small, smooth, like liquid) to healthy and ill heads."""
  n = len(image)
  for kind, chance, low, high in (("vessel", 0.6, 0.03, 0.05), ("vessel", 0.6, 0.03, 0.05),
                                  ("cyst", 0.4, 0.06, 0.10)):  # fmt: skip
    there = (rng.random(n) < chance)[:, None, None]
    angle, far = rng.uniform(0, 2 * np.pi, n), rng.uniform(0.2, 0.75, n)
    du = head.u - (far * np.cos(angle)).astype(np.float32)[:, None, None]
    dv = head.v - (far * np.sin(angle)).astype(np.float32)[:, None, None]
    radius = rng.uniform(low, high, n).astype(np.float32)[:, None, None]
    value = 0.95 if kind == "vessel" else head.scanner("csf")
    spot = _edge(np.hypot(du, dv) / radius - 1, 0.15)
    image = image + there * head.brain * spot * (value - image)
  return image


def _grow_tumour(
  rng: np.random.Generator,
  anatomy: dict[str, np.ndarray],
  image: np.ndarray,
  head: _Head,
  ill: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  """Adds core, rim and oedema where ``ill``; returns the tumour masks and the images."""
  n, scanner = len(image), head.scanner
  du = head.u - _column(anatomy["tumour_x"] + rng.normal(0, 0.015, n))
  dv = head.v - _column(anatomy["tumour_y"] + rng.normal(0, 0.015, n))
  angle = np.arctan2(dv, du)
  outline = np.ones_like(head.u)
  for harmonic in range(4):
    outline += _column(anatomy["tumour_wobble"][:, harmonic]) * np.cos((harmonic + 2) * angle)
  size = _column(anatomy["tumour_size"] * rng.normal(1, 0.06, n))
  distance = np.hypot(du, dv) / (size * np.maximum(outline, 0.4))
  there = _column(ill & True) * head.brain * _column(anatomy["tumour_strength"])
  image = image + there * 0.8 * _edge(distance - 1.35, 0.12) * (scanner("oedema") - image)
  image = image + there * _edge(distance - 1.0, 0.05) * (scanner("rim") - image)
  image = image + there * _edge(distance - 0.62, 0.06) * (scanner("core") - image)
  return (distance < 1) & (head.brain > 0.5) & ill[:, None, None], image
