"""The execution plan: what is chosen, on which backend, with which reason."""

import pytest

from fedjax_med.simulation.plan import choose_layout, choose_lowering


@pytest.mark.parametrize(
  ("layout", "chunk_size", "cohort", "backend", "expected"),
  [
    ("auto", 0, 5, "cpu", ("scan", 1)),
    ("auto", 0, 5, "gpu", ("vmap", 5)),
    ("auto", 0, 5, "tpu", ("vmap", 5)),
    ("auto", 0, 1000, "gpu", ("chunk", 16)),
    ("vmap", 0, 5, "cpu", ("vmap", 5)),
    ("scan", 0, 5, "gpu", ("scan", 1)),
    ("chunk", 2, 5, "cpu", ("chunk", 2)),
    ("chunk", 9, 5, "cpu", ("chunk", 5)),
  ],
)
def test_layout_follows_the_flag_and_else_the_backend(
  layout, chunk_size, cohort, backend, expected
):
  name, chunk, reason = choose_layout(layout, chunk_size, cohort, backend)
  assert (name, chunk) == expected
  assert ("as configured" in reason) == (layout != "auto")


def test_lowering_follows_the_flag_and_else_takes_matrix_products():
  assert [choose_lowering(name)[0] for name in ("auto", "matmul", "native")] == [
    "matmul",
    "matmul",
    "native",
  ]
