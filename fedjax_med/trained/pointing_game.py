"""The pointing game: whether the hottest point of a map lies on the tumour."""

import numpy as np

from fedjax_med.trained.heat_pictures import enlarge

OTHERS = 16  # images whose masks each map is laid over to learn what chance is


def hits(
  maps: np.ndarray,  # [N, H, W]
  masks: np.ndarray,  # [N, H, W] bool
  tolerance: int,  # pixels
) -> np.ndarray:  # [N] bool
  """Whether the largest value of each map lies within ``tolerance`` pixels of its mask.

  The game of Zhang et al. (2018), who allow 15 pixels on photographs some 500 wide. Where several
  pixels are the largest, as in a coarse map that was enlarged, their middle counts. A map that is
  the same everywhere, and so points nowhere, is a miss, as is any map of an empty mask.
  """
  _, height, width = maps.shape
  top, low = maps.max((1, 2)), maps.min((1, 2))
  is_top = maps == top[:, None, None]
  rows, columns = np.arange(height)[:, None], np.arange(width)[None, :]
  middle = [
    ((is_top * where).sum((1, 2)) / is_top.sum((1, 2)))[:, None, None] for where in (rows, columns)
  ]
  near = np.square(rows - middle[0]) + np.square(columns - middle[1]) <= tolerance**2
  return (near & masks).any((1, 2)) & (top > low)


def score(maps: np.ndarray, masks: np.ndarray, tolerance: int) -> tuple[float, float]:
  """Share of maps that point at their own mask, and at that of another image.

  The second is chance with all that a map can know without looking at its image: where in a picture
  tumours usually lie. Each map is laid over the masks of ``OTHERS`` images, or of all there are.

  Args:
    maps: [N, H', W'], at least 0.
    masks: [N, H, W] bool.
    tolerance: pixels of a mask.
  """
  large = np.stack([enlarge(heat, masks.shape[1:]) for heat in maps])
  others = [
    hits(large, np.roll(masks, shift, 0), tolerance)
    for shift in range(1, min(OTHERS + 1, len(maps)))
  ]
  chance = float(np.mean(others)) if others else 0.0
  return float(hits(large, masks, tolerance).mean()), chance
