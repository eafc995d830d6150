"""Which blocks to replace, and how large each student is: the best allocation of a budget.

A model runs its layers in order. Each is kept, at its own cost, or a run of them is replaced by one
of several students. Costs add up; so do squared errors of the model's output, to first order, where
students err independently. The least sum of errors for every budget is then a shortest path,

    f[stop, b] = min( f[stop - 1, b - cost[stop - 1]],
                      min over options (start, stop, cost, error) of f[start, b - cost] + error ),

exact up to the rounding of costs to ``BINS`` units, which is upwards: no budget is passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 6000


@dataclass(frozen=True)
class Option:
    """One student for the layers ``range(start, stop)``.

    Attributes
    ----------
    start, stop : int
    cost : int
        In the unit of the budget, not negative.
    error : float
        What it adds to the sum, not negative.
    student : Any
        Whatever says how to make it.
    """

    start: int
    stop: int
    cost: int
    error: float
    student: Any = None


def largest_budget(layer_costs: Sequence[int]) -> int:
    """A budget within which all layers can be kept, although each cost is rounded up."""
    spare = len(layer_costs) + 1
    return -(-(sum(layer_costs) + spare) * BINS // max(1, BINS - spare))


class Allocation:
    """The best choices among options, for every budget up to a largest one.

    Parameters
    ----------
    layer_costs : sequence of int
        Of the layers, kept, in order.
    options : sequence of Option
    budget : int
        The largest.
    """

    def __init__(self, layer_costs: Sequence[int], options: Sequence[Option], budget: int):
        self.layer_costs, self.options = [int(cost) for cost in layer_costs], [*options]
        self.budget = int(budget)
        self.unit = max(1, -(-self.budget // BINS))
        ending: list[list[int]] = [[] for _ in range(len(self.layer_costs) + 1)]
        for k, option in enumerate(self.options):
            ending[option.stop].append(k)
        bins = self.budget // self.unit + 1
        # From the start of the model to before each layer: the least error within each budget.
        self._least = np.full((len(ending), bins), np.inf)
        self._least[0] = 0
        # What was chosen last on the way: an option, -1 for a layer that is kept.
        self._choice = np.full((len(ending), bins), -2)
        for stop in range(1, len(ending)):
            cost = self.layer_costs[stop - 1]
            self._offer(stop, -1, self._shifted(stop - 1, cost))
            for k in ending[stop]:
                option = self.options[k]
                self._offer(stop, k, self._shifted(option.start, option.cost) + option.error)

    def _shifted(self, start: int, cost: int) -> np.ndarray:
        """Least errors up to ``start`` where ``cost`` of each budget is kept for what follows."""
        steps = -(-cost // self.unit)
        least = np.full_like(self._least[start], np.inf)
        if steps < len(least):
            least[steps:] = self._least[start, : len(least) - steps]
        return least

    def _offer(self, stop: int, choice: int, errors: np.ndarray) -> None:
        better = errors < self._least[stop]
        self._least[stop][better] = errors[better]
        self._choice[stop][better] = choice

    @property
    def smallest(self) -> int:
        """The least cost of all, whatever the error: no budget below it can be met."""
        return self._smallest()[0]

    def _smallest(self) -> tuple[int, list[Option]]:
        """The least cost, not rounded, and the students that give it."""
        least: list[tuple[int, list[Option]]] = [(0, [])]
        for stop in range(1, len(self.layer_costs) + 1):
            cost, chosen = least[-1]
            ways = [(cost + self.layer_costs[stop - 1], chosen)]
            for option in self.options:
                if option.stop == stop:
                    cost, chosen = least[option.start]
                    ways.append((cost + option.cost, [*chosen, option]))
            least.append(min(ways, key=lambda way: way[0]))
        return least[-1]

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Costs at which the least sum of errors falls, and the sums, both (points,)."""
        errors = self._least[-1]
        falls = np.flatnonzero(np.isfinite(errors) & (errors < np.append(np.inf, errors[:-1])))
        return falls * self.unit, errors[falls]

    def error(self, budget: int) -> float:
        """The least sum of errors within a budget; infinite where there is none."""
        return float(self._least[-1, min(budget, self.budget) // self.unit])

    def choose(self, budget: int) -> list[Option]:
        """The students of the best allocation within a budget, in order of their layers.

        Raises
        ------
        ValueError
            If the budget is below ``smallest``.
        """
        if sum(self.layer_costs) <= budget:
            return []
        left = min(int(budget), self.budget) // self.unit
        cost, smallest = self._smallest()
        if cost <= budget and (left < 0 or not np.isfinite(self._least[-1, left])):
            # Within the budget, but not once it is rounded up.
            return smallest
        if left < 0 or not np.isfinite(self._least[-1, left]):
            raise ValueError(f"the smallest possible cost is {self.smallest:,}, got {budget:,}.")
        chosen: list[Option] = []
        stop = len(self.layer_costs)
        while stop:
            k = int(self._choice[stop, left])
            if k == -1:
                stop -= 1
                left -= -(-self.layer_costs[stop] // self.unit)
            else:
                option = self.options[k]
                chosen.append(option)
                stop = option.start
                left -= -(-option.cost // self.unit)
        return chosen[::-1]
