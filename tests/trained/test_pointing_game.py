"""The pointing game on maps that are known to hit, to miss, or to know nothing."""

import numpy as np
import pytest

from fedjax_med.trained.heat_pictures import enlarge
from fedjax_med.trained.pointing_game import hits, score


def test_the_tolerance_is_allowed_and_no_more():
  maps, masks = np.zeros((5, 6, 6), np.float32), np.zeros((5, 6, 6), bool)
  maps[:4, 2, 2] = 1
  masks[0, 2, 2] = masks[1, 2, 3] = masks[2, 2, 4] = True  # 0, 1 and 2 pixels away; 3 has none
  masks[4] = True  # a map that points nowhere
  assert hits(maps, masks, 1).tolist() == [True, True, False, False, False]


def test_a_coarse_map_points_at_the_middle_of_its_hottest_cell():
  coarse = np.zeros((2, 2), np.float32)
  coarse[0, 1] = 1
  masks = np.zeros((1, 16, 16), bool)
  masks[0, 2, 13] = True  # the cell's middle is at (1.5, 13.5): beyond its centre all is as hot
  assert hits(enlarge(coarse, (16, 16))[None], masks, 1).all()


def phantoms():
  rng = np.random.default_rng(0)
  masks = np.zeros((60, 16, 16), bool)
  for mask in masks:
    row, column = rng.integers(2, 13, 2)
    mask[row : row + 3, column : column + 3] = True
  return masks


def test_maps_of_their_own_image_score_one_and_maps_that_ignore_it_chance():
  masks = phantoms()
  own, chance = score(masks.astype(np.float32), masks, 1)
  assert own == 1
  assert chance < 0.3
  always = np.broadcast_to(masks.mean(0, dtype=np.float32), masks.shape)
  hit, chance = score(always, masks, 1)
  assert hit == pytest.approx(chance, abs=0.05)


def test_enlarging_keeps_the_place_and_the_range():
  coarse = np.zeros((4, 4), np.float32)
  coarse[3, 1] = 2
  large = enlarge(coarse, (16, 16))
  row, column = np.unravel_index(large.argmax(), large.shape)
  assert (row // 4, column // 4) == (3, 1)
  assert large.min() >= 0
  assert large.max() <= 2
