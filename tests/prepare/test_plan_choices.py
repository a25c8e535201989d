"""The execution plan: what is chosen, on which backend, with which reason."""

import numpy as np
import pytest

from fedjax_med.core.errors import UserError
from fedjax_med.federated.vector import ARRAYS, PIECES
from fedjax_med.prepare.plan import (
  Choice,
  Freedom,
  best_microbatch,
  choose_holding,
  choose_layout,
  choose_lowering,
  choose_microbatch,
  fit_memory,
  lighter,
)


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


def test_lowering_follows_the_flag_and_else_the_cores_of_a_device():
  assert choose_lowering("auto", 1)[0] == "auto"
  assert choose_lowering("auto", 2)[0] == "matmul"
  assert choose_lowering("auto", 1, "gpu")[0] == "matmul"
  assert choose_lowering("matmul", 1)[0] == "matmul"
  assert choose_lowering("native", 2)[0] == "native"


def test_plain_steps_on_a_cpu_hold_the_tree_and_others_pieces():
  assert choose_holding(False, "cpu") is ARRAYS
  assert {choose_holding(True, name) for name in ("cpu", "gpu", "tpu")} == {PIECES}
  assert {choose_holding(False, name) for name in ("gpu", "tpu")} == {PIECES}


@pytest.mark.parametrize(
  ("counts", "rates", "cap"),
  [((50,), (0.16,), 22), ((12, 900), (1.0, 0.01), 14), ((30,), (0.9,), 8)],
)
def test_best_microbatch_costs_least_over_simulated_draws(counts, rates, cap):
  random = np.random.default_rng(0)
  draws = [random.binomial(n, q, 200_000) for n, q in zip(counts, rates, strict=True)]
  drawn = np.minimum(np.concatenate(draws), cap)
  cost = {m: np.ceil(drawn / m).mean() * (m + 2) for m in range(1, cap + 1)}
  best = best_microbatch(counts, rates, cap, 2)
  assert cost[best] <= min(cost.values()) * 1.005


def test_memory_is_saved_in_order_and_only_where_nobody_configured():
  free = Freedom(True, True, True, True)
  choice, seen = Choice(2, 4, 4, False, "book_keeping"), []
  while choice is not None:
    seen.append(choice)
    choice = lighter(choice, free)
  assert [tuple(c) for c in seen] == [
    (2, 4, 4, False, "book_keeping"),
    (2, 2, 4, False, "book_keeping"),
    (2, 1, 4, False, "book_keeping"),
    (1, 1, 4, False, "book_keeping"),
    (1, 1, 2, False, "book_keeping"),
    (1, 1, 1, False, "book_keeping"),
    (1, 1, 1, True, "book_keeping"),
  ]
  assert lighter(seen[0], Freedom(False, False, False, False)) is None


def test_a_plan_fits_its_budget_or_is_refused_and_an_ample_budget_compiles_nothing():
  def size(choice):
    return 100.0 * choice.chunk * choice.microbatch

  compiled = []

  def measure(choice):
    compiled.append(choice)
    return size(choice)

  def same(choice):
    return choice

  start, free = Choice(1, 4, 4, False, "none"), Freedom(False, True, True, False)
  assert fit_memory(start, free, 1e5, size, measure, same) == start
  assert compiled == []
  fitted = fit_memory(start, free, 250, size, measure, same)
  assert size(fitted) == 200
  with pytest.raises(UserError, match=r"over the budget of .*; raise execution.memory_gib"):
    fit_memory(start, free, 50, size, measure, same)
  with pytest.raises(UserError, match=r"over the budget"):
    fit_memory(start, Freedom(False, False, False, False), 250, size, measure, same)


def test_a_microbatch_that_would_change_results_is_refused_with_the_remedy():
  about = {"private": True, "fixed": True, "counts": [100], "rates": [0.2]}
  with pytest.raises(UserError, match=r"execution\.microbatch=8 is under the 40 slots.*dropout=0"):
    choose_microbatch(8, 40, 1, **about)
  # The whole batch at once changes nothing.
  assert choose_microbatch(40, 40, 1, **about)[0] == 40
  assert choose_microbatch(0, 40, 1, **about)[0] == 40
