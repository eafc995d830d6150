"""adelie's ``grpnet`` as a worker of ``bench/group_elastic_net.py``, in the peers' environment.

Its losses of many responses carry 1 / K, and its default penalty is the square root of a group's
size: it gets alpha / K and ones. ``early_exit`` is off, because every alpha is asked for.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import adelie as ad
import numpy as np
from memory import PeakMemory
from serving import serve


def solve(job: dict[str, Any]) -> dict[str, Any]:
    """Solve one path, write its coefficients (alphas, d, c), and return seconds and counts."""
    with np.load(job["data"]) as file:
        X, Y, D = np.asfortranarray(file["X"]), file["Y"], file.get("D")
    threads, c = job["threads"], Y.shape[1]
    if D is None:
        A = ad.matrix.dense(X, n_threads=threads)
    else:
        mask = np.asfortranarray(D.astype(bool))
        A = ad.matrix.convex_relu(X, mask, gated=True, n_threads=threads)
    d = A.cols()
    loss = job["loss"] if c > 1 else f"{job['loss']} of one"
    glm = {
        "squared of one": lambda: ad.glm.gaussian(Y[:, 0].copy()),
        "squared": lambda: ad.glm.multigaussian(Y),
        "multinomial": lambda: ad.glm.multinomial(Y),
    }[loss]()
    groups = np.arange(0, d, job["groups"])
    with PeakMemory() as memory:
        start = time.perf_counter()
        limit = start + job["time_limit"]
        state = ad.grpnet(
            A,
            glm,
            groups=groups,
            penalty=np.ones(len(groups)),
            lmda_path=np.asarray(job["alphas"]) / c,
            intercept=job["intercept"],
            tol=job["tol"],
            irls_tol=job["tol"],
            adev_tol=1.0,
            early_exit=False,
            max_iters=10**9,  # Time is what ends it.
            n_threads=threads,
            progress_bar=False,
            exit_cond=lambda _: time.perf_counter() > limit,
        )
        seconds = time.perf_counter() - start
    coefs = state.betas.toarray().reshape(-1, d, c)
    np.save(job["result"], coefs)
    return {
        "seconds": seconds,
        "alphas_done": len(coefs),
        "peak_growth": memory.growth,
        "versions": f"adelie {version('adelie')}, numpy {np.__version__}",
    }


if __name__ == "__main__":
    serve(solve)
