"""pyscnn's approximate cone decomposition as a worker of ``bench/cone_decomposition.py``.

In the peers' environment. Programme, penalty, optimiser and loop are those of its
``ApproximateConeDecomposition`` with its default tolerance and iteration limit, begun at a gated
solution that is given; only a time limit is added, because it has none. What the weights are worth
is measured by the caller.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import lab
import numpy as np
from pyscnn_al import Limited
from scnn.models import ConvexGatedReLU
from scnn.private.interface import build_internal_regularizer, build_prox_operator, set_device
from scnn.private.methods import ApproximateConeDecomposition
from scnn.private.models.convex.convex_mlp import ConvexMLP
from scnn.regularizers import NeuronGL1
from scnn.solvers import ApproximateConeDecomposition as Defaults
from serving import serve


def solve(job: dict[str, Any]) -> dict[str, Any]:
    """Decompose weights V (p, d, c), write the pairs to the ``result`` file, return seconds."""
    with np.load(job["data"]) as file:
        X, D, G, V = (file[name] for name in "XDGV")
    set_device("cpu", "float64")
    (p, d, c), defaults = V.shape, Defaults(ConvexGatedReLU(G))
    patterns = lab.tensor(D, dtype=lab.get_dtype())
    model = ConvexMLP(d, patterns, lab.tensor(G), "einsum", c=c)
    model.weights = lab.tensor(np.ascontiguousarray(V.transpose(2, 0, 1)))
    penalty = NeuronGL1(defaults.rho)
    decomposition = ApproximateConeDecomposition(
        build_internal_regularizer(penalty),
        build_prox_operator(penalty),
        defaults.d_max_iters,
        defaults.d_tol,
    )
    procedure = decomposition.opt_proc
    procedure.metric_freq = 10**9
    limited = Limited(procedure.term_criterion, job["time_limit"])
    procedure.term_criterion = limited
    rows = lab.tensor(X)
    start = limited.start = time.perf_counter()
    network = decomposition(model, rows, lab.zeros((len(X), c)))
    seconds = time.perf_counter() - start
    weights = lab.to_np(network.weights).reshape(2, c, p, d)
    np.save(job["result"], weights.transpose(0, 2, 3, 1))
    status = "limit" if seconds > job["time_limit"] else "iterations"
    return {
        "seconds": seconds,
        "n_iter": limited.iterations,
        "status": "converged" if limited.met else status,
        "versions": f"pyscnn {version('pyscnn')}, numpy {np.__version__}",
    }


if __name__ == "__main__":
    serve(solve)
