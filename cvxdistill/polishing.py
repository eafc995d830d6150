"""``polish``: the same network with fewer hidden units, its second layer by a group elastic net."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from cvxdistill.polishing_input import read_neurons, read_student
from cvxdistill.solvers import Neurons, Polishing, polish_neurons

if TYPE_CHECKING:
    import pandas as pd

    from cvxdistill.adapters import GatedStudent

COLUMNS = ("alpha", "n_neurons", "n_gates", "parameters", "error", "refitted", "duality_gap")


@dataclass(frozen=True)
class PolishedNetwork:
    """What ``polish`` returns; ``print`` it for the path.

    Attributes
    ----------
    network : GatedStudent or Neurons
        Of the kind that was given; the very network that was given if none was better.
    polishing : Polishing
        Neurons, parameters and held-out error before and after, and the whole path.
    """

    network: GatedStudent | Neurons
    polishing: Polishing = field(repr=False)

    @property
    def changed(self) -> bool:
        """False if the network is the one that was given."""
        return self.polishing.changed

    @property
    def intercept(self) -> np.ndarray:
        """(c,); of Neurons, which do not hold it themselves."""
        return self.polishing.intercept

    def to_frame(self) -> pd.DataFrame:
        """Return the network given and those tried as a pandas frame, with a column ``chosen``."""
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError('to_frame needs pandas: pip install "cvxdistill[plot]"') from error
        points = (self.polishing.before, *self.polishing.path)
        rows = [{name: getattr(point, name) for name in COLUMNS} for point in points]
        frame = pd.DataFrame(rows, columns=list(COLUMNS))
        frame["chosen"] = [point is self.polishing.after for point in points]
        return frame

    def __str__(self) -> str:
        return str(self.polishing)


def polish(
    network: GatedStudent | Neurons,
    X: Any,
    Y: Any,
    *,
    gates: Any = None,
    intercept: Any = None,
    max_neurons: int | None = None,
    max_error: float | None = None,
    l1_ratio: float = 1.0,
    validation_fraction: float = 0.1,
    validation_data: tuple[Any, Any] | None = None,
    random_state: int | np.random.Generator | None = 0,
    tol: float = 1e-3,
    verbose: int = 0,
) -> PolishedNetwork:
    """Make a two-layer network smaller: freeze W1, recompute W2, drop the units that are not used.

        minimise over W2, b   1/(2n) ||H W2 + 1 b^T - Y||_F^2
                              + alpha * sum_h w_h (rho ||B[h, :]|| + (1 - rho)/2 ||B[h, :]||^2),
        H[:, h] = D[:, gate[h]] * (X W1[:, h]),   B[h, :] = s_h W2[h, :],

    with s_h the standard deviation of H[:, h], and w_h = 1 / ||B[h, :]|| of least squares on all
    units (an adaptive group elastic net; scaling a unit's layers changes nothing). A unit with a
    zero row goes, and a gate with its last unit. Along a path of alphas least squares on the units
    that are left replaces the elastic net's shrunken W2, unless that is better by 0.5 %; the
    held-out activation error ||Y' - Y||_F / ||Y||_F decides.

    Parameters
    ----------
    network : GatedStudent or Neurons
        A deployed student, or the units of a gated ReLU or (without ``gates``) a ReLU network.
    X : array, tensor or row source
        Rows (n, d). For a student the block's inputs (N, *input_shape), or rows (n, d) with a last
        column of ones. Best are the rows that the network was fitted to: on others least squares
        shrinks W2, because W1 was fitted to those.
    Y : array or tensor
        Targets (n, c). For a student the block's outputs (N, *output_shape) beside its inputs.
    gates : array of shape (d, p) or (d + 1, p), optional
        Of Neurons. Without them unit h is relu(X W1[:, h]). A student has its own.
    intercept : array of shape (c,), optional
        Of Neurons, zero by default.
    max_neurons : int, optional
        Choose the best held-out error among networks of at most so many units.
    max_error : float, optional
        Otherwise choose the fewest units with at most this held-out error, by default that of the
        network given: what comes back is never worse.
    l1_ratio : float in (0, 1], default=1.0
        rho.
    validation_fraction : float, default=0.1
        Share of the rows (of a student's inputs: of the examples) that is held out. These choose,
        so the error reported for them is a little too good. A network that was itself fitted to
        them is judged too well: pass ``validation_data`` then.
    validation_data : (X, Y), optional
        Rows that are held out, instead of some of X.
    random_state : int, Generator or None, default=0
        Of the held-out rows.
    tol : float, default=1e-3
        Relative duality gap of each group elastic net.
    verbose : int, default=0
        1 shows a progress bar.

    Returns
    -------
    PolishedNetwork
        With the network as it was given where nothing smaller met the criterion. The given network
        is not changed.

    Raises
    ------
    ValueError, TypeError
        If an argument is not valid, before any work.

    References
    ----------
    Varshney and Pilanci 2024, section 4.3 and appendix A.2; Wang and Leng 2008 (weights).
    """
    _check_options(max_neurons, max_error, l1_ratio, validation_fraction, tol)
    if isinstance(network, Neurons):
        read = read_neurons(network, gates, intercept)
    else:
        read = read_student(network)
        for name, value in (("gates", gates), ("intercept", intercept)):
            if value is not None:
                raise ValueError(f"{name} is for Neurons; a student has its own.")
    data = read.rows(X, Y, "")
    if validation_data is None:
        fitted, held_out = data.split(validation_fraction, np.random.default_rng(random_state))
    else:
        if not isinstance(validation_data, (tuple, list)) or len(validation_data) != 2:
            raise TypeError(
                f"validation_data must be a pair (X, Y), got {type(validation_data).__name__}."
            )
        fitted, held_out = data.all(), read.rows(*validation_data, "validation ").all()
    polishing = polish_neurons(
        read.neurons,
        read.intercept,
        read.operator(fitted[0]),
        fitted[1],
        read.operator(held_out[0]),
        held_out[1],
        max_neurons=max_neurons,
        max_error=max_error,
        l1_ratio=l1_ratio,
        tol=tol,
        measure=read.measure,
        verbose=verbose,
    )
    return PolishedNetwork(read.build(polishing) if polishing.changed else network, polishing)


def _check_options(
    max_neurons: Any, max_error: Any, l1_ratio: Any, validation_fraction: Any, tol: Any
) -> None:
    if max_neurons is not None and (
        isinstance(max_neurons, bool)
        or not isinstance(max_neurons, (int, np.integer))
        or max_neurons < 1
    ):
        raise ValueError(f"max_neurons must be a positive integer, got {max_neurons!r}.")
    if max_neurons is not None and max_error is not None:
        raise ValueError("max_neurons and max_error are two criteria: give one of them.")
    bounds = {
        "max_error": (0 if max_error is None else max_error, lambda x: 0 <= x < np.inf, ">= 0"),
        "l1_ratio": (l1_ratio, lambda x: 0 < x <= 1, "in (0, 1]"),
        "validation_fraction": (validation_fraction, lambda x: 0 < x < 1, "in (0, 1)"),
        "tol": (tol, lambda x: 0 < x < np.inf, "positive and finite"),
    }
    for name, (value, fits, expected) in bounds.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r}.")
        if not fits(value):
            raise ValueError(f"{name} must be {expected}, got {value!r}.")
