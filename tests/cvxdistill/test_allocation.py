"""The allocation of a budget against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvxdistill.allocation import Allocation, Option, largest_budget


def every_choice(costs, options):
    """All ways to cover the layers: (cost, error, options)."""

    def extend(stop, cost, error, taken):
        if stop == len(costs):
            yield cost, error, taken
            return
        yield from extend(stop + 1, cost + costs[stop], error, taken)
        for option in options:
            if option.start == stop:
                yield from extend(
                    option.stop, cost + option.cost, error + option.error, [*taken, option]
                )

    return list(extend(0, 0, 0.0, []))


@st.composite
def problems(draw):
    layers = draw(st.integers(1, 5))
    costs = draw(st.lists(st.integers(0, 60), min_size=layers, max_size=layers))
    options = []
    for _ in range(draw(st.integers(0, 7))):
        start = draw(st.integers(0, layers - 1))
        stop = draw(st.integers(start + 1, layers))
        options.append(Option(start, stop, draw(st.integers(0, 40)), draw(st.integers(0, 30)) / 7))
    return costs, options, draw(st.integers(0, sum(costs) + 10))


@settings(max_examples=200, deadline=None)
@given(problems())
def test_no_allocation_within_the_budget_errs_less(problem):
    costs, options, budget = problem
    allocation = Allocation(costs, options, sum(costs) + 10)
    ways = every_choice(costs, options)
    assert allocation.smallest == min(cost for cost, _, _ in ways)
    within = [error for cost, error, _ in ways if cost <= budget]
    if not within:
        assert allocation.error(budget) == np.inf
        with pytest.raises(ValueError, match="smallest possible cost"):
            allocation.choose(budget)
        return
    chosen = allocation.choose(budget)
    kept = set(range(len(costs))) - {k for o in chosen for k in range(o.start, o.stop)}
    assert sum(o.cost for o in chosen) + sum(costs[k] for k in kept) <= budget
    assert all(a.stop <= b.start for a, b in itertools.pairwise(chosen))
    assert sum(o.error for o in chosen) == pytest.approx(min(within))
    assert allocation.error(budget) == pytest.approx(min(within))


@settings(max_examples=50, deadline=None)
@given(problems())
def test_the_curve_falls_and_each_point_is_the_least_cost_of_its_error(problem):
    costs, options, _ = problem
    allocation = Allocation(costs, options, sum(costs) + 10)
    sizes, errors = allocation.curve()
    assert (np.diff(sizes) > 0).all()
    assert (np.diff(errors) < 0).all()
    ways = every_choice(costs, options)
    for size, error in zip(sizes, errors, strict=True):
        assert min(e for c, e, _ in ways if c <= size) == pytest.approx(error)
        assert all(e > error - 1e-12 for c, e, _ in ways if c < size)


def test_rounding_never_passes_the_budget():
    costs = [1_000_003, 2_000_001, 999_999]
    options = [Option(0, 1, 333_337, 1.0), Option(1, 3, 500_009, 2.0), Option(1, 2, 77, 5.0)]
    allocation = Allocation(costs, options, sum(costs))
    assert allocation.unit > 1
    for budget in np.linspace(allocation.smallest * 1.01, sum(costs), 50).astype(int):
        chosen = allocation.choose(budget)
        kept = set(range(3)) - {k for o in chosen for k in range(o.start, o.stop)}
        assert sum(o.cost for o in chosen) + sum(costs[k] for k in kept) <= budget


def test_the_smallest_budget_can_be_met_where_costs_are_rounded():
    costs = [1_000_003] * 9
    options = [Option(k, k + 1, 700_001 + k, 0.1) for k in range(9)]
    options.append(Option(2, 4, 1_300_001, 5.0))
    allocation = Allocation(costs, options, 9_000_027)
    smallest = Allocation(costs, options, allocation.smallest)
    chosen = smallest.choose(allocation.smallest)
    assert sum(option.cost for option in chosen) == allocation.smallest
    assert options[-1] in chosen and len(chosen) == 8
    with pytest.raises(ValueError, match="smallest possible cost"):
        smallest.choose(allocation.smallest - 1)


def test_a_budget_of_all_layers_keeps_them_where_costs_are_rounded():
    costs = [1_000_003] * 9
    options = [Option(k, k + 1, 700_001, 0.1) for k in range(9)]
    assert Allocation(costs, options, sum(costs)).choose(sum(costs)) == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3_000_000), min_size=1, max_size=300))
def test_all_layers_fit_into_the_largest_budget(costs):
    budget = largest_budget(costs)
    assert Allocation(costs, [], budget).error(budget) == 0
    assert budget <= 1.1 * sum(costs) + 2 * len(costs) + 10
