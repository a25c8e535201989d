"""How like reconstructed inputs are to the records: correlation, PSNR, SSIM, and identification."""

import math

import numpy as np

WINDOW = 7  # pixels a side, over which SSIM takes means and variances


def correlations(made: np.ndarray, records: np.ndarray) -> np.ndarray:
  """[R, n] Pearson correlations of inputs [R, ...] with records [n, ...]; of a constant one 0."""

  def units(values: np.ndarray) -> np.ndarray:
    flat = np.asarray(values, np.float64).reshape(len(values), -1)
    flat = flat - flat.mean(1, keepdims=True)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    return flat / np.where(norms > 0, norms, 1)

  return units(made) @ units(records).T


def psnr(made: np.ndarray, record: np.ndarray) -> float:
  """Peak signal-to-noise ratio, dB, whose peak is the range of the record; at most 200."""
  error = float(np.mean(np.square(np.asarray(made, np.float64) - record)))
  span = float(record.max() - record.min())
  return min(200.0, 10 * math.log10(max(span**2, 1e-300) / max(error, 1e-300)))


def ssim(made: np.ndarray, record: np.ndarray) -> float:
  """Structural similarity (Wang et al. 2004) of images [H, W, C], mean over channels.

  Uniform windows of ``WINDOW`` pixels (fewer in a smaller image), sample covariances, and the range
  of the record; windows that leave the image are left out: ``structural_similarity`` of
  scikit-image.
  """
  from scipy.ndimage import uniform_filter

  size = min(WINDOW, *(side - 1 + side % 2 for side in record.shape[:2]))
  count, span = size**2, float(record.max() - record.min()) or 1.0

  def mean(values: np.ndarray) -> np.ndarray:
    return uniform_filter(values, size, axes=(0, 1))

  x, y = np.asarray(made, np.float64), np.asarray(record, np.float64)
  x_mean, y_mean, factor = mean(x), mean(y), count / max(count - 1, 1)
  x_var, y_var = (factor * (mean(v * v) - m * m) for v, m in ((x, x_mean), (y, y_mean)))
  both = factor * (mean(x * y) - x_mean * y_mean)
  first, second = (0.01 * span) ** 2, (0.03 * span) ** 2
  top = (2 * x_mean * y_mean + first) * (2 * both + second)
  values = top / ((x_mean**2 + y_mean**2 + first) * (x_var + y_var + second))
  edge = size // 2
  inside = values[edge : values.shape[0] - edge, edge : values.shape[1] - edge]
  return float(inside.mean())


def named(similarity: np.ndarray, count: int) -> np.ndarray:
  """[count] records that an attacker names, by the similarity [R, n] of what was reconstructed.

  The most similar pair comes first; a reconstruction and a record stand in one pair each, until no
  reconstruction is left and all may name another record. By chance a share of count / n is right.
  """
  left, free, found = similarity.astype(np.float64).copy(), similarity.shape[0], []
  taken = np.zeros(len(left), bool)
  while len(found) < min(count, left.shape[1]):
    if free == 0:
      taken[:], free = False, len(taken)
    row, column = np.unravel_index(np.argmax(np.where(taken[:, None], -np.inf, left)), left.shape)
    found.append(int(column))
    left[:, column], taken[row], free = -np.inf, True, free - 1
  return np.array(found)
