"""Work that is shared out over devices is the same work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.core.keys import base_key
from fedjax_med.simulation.mesh import map_over_devices


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_rows_over_devices_are_each_worked_on_once_and_in_order(devices):
  keys = jax.vmap(lambda number: jax.random.fold_in(base_key(0), number))(np.arange(5))

  def one(shared, row):
    number, key = row
    return {"sum": shared["x"] + number, "draw": jax.random.normal(key, (2,))}

  several = map_over_devices(one, devices, 2)
  for count in (5, 3):  # neither is a multiple of the devices
    found = several({"x": jnp.float32(10)}, (np.arange(count, dtype=np.float32), keys[:count]))
    np.testing.assert_array_equal(found["sum"], 10 + np.arange(count))
    expected = np.stack([jax.random.normal(key, (2,)) for key in keys[:count]])
    np.testing.assert_array_equal(found["draw"], expected)
