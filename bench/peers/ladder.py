"""When tolerances, or an oracle that knows the optimum, would have stopped one and the same run."""

from __future__ import annotations


class Ladder:
    """Stop where the loosest tolerance does whose result is good enough, or at the time limit.

    Parameters
    ----------
    tolerances : list of float
    target : float
        The largest objective that is good enough.
    time_limit : float
        Seconds.

    Attributes
    ----------
    seconds : float
        Of the last look.
    seconds_to_objective : float or None
        When the objective first was good enough: an oracle would have stopped there.
    stopped_by : float or None
        The tolerance that stopped the run with a good result.
    """

    def __init__(self, tolerances: list[float], target: float, time_limit: float) -> None:
        self._left = sorted(tolerances)
        self.target = target
        self.time_limit = time_limit
        self.seconds = 0.0
        self.seconds_to_objective: float | None = None
        self.stopped_by: float | None = None

    def stop(self, measure: float, objective: float, seconds: float) -> bool:
        """Whether to stop at an iterate whose optimality measure and objective are these."""
        self.seconds = seconds
        good = objective <= self.target
        if good and self.seconds_to_objective is None:
            self.seconds_to_objective = seconds
        met = None
        # A tolerance that is met here would end the run here, good or not: it has had its chance.
        while self._left and measure <= self._left[-1]:
            tolerance = self._left.pop()
            met = tolerance if met is None else met
        if met is not None and good:
            self.stopped_by = met
            return True
        return not self._left or seconds > self.time_limit


class Marks:
    """When a run first had objectives that are good enough, each for itself.

    Parameters
    ----------
    targets : list of float
        Objectives.
    time_limit : float
        Seconds.

    Attributes
    ----------
    seconds : list of float or None
        For each target.
    """

    def __init__(self, targets: list[float], time_limit: float) -> None:
        self.targets = targets
        self.time_limit = time_limit
        self.seconds: list[float | None] = [None] * len(targets)

    def stop(self, objective: float, seconds: float) -> bool:
        """Whether to stop at an iterate: all targets are met, or time is up."""
        for k, target in enumerate(self.targets):
            if self.seconds[k] is None and objective <= target:
                self.seconds[k] = seconds
        return None not in self.seconds or seconds > self.time_limit
