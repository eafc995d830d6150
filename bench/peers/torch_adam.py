"""Adam on the non-convex form of the gated programme, a worker of ``bench/suite.py``; torch.

With the penalty "neuron" the convex programme is that of p c units u_jk with second-layer weights
a_jk and weight decay,

    1/(2n) ||sum_j diag(D_j) X U_j diag(a_j) - Y||^2 + alpha/2 (||U||^2 + ||a||^2),

whose V_j = U_j diag(a_j) has an objective of the convex programme that is no larger. That is
looked at from time to time, outside the clock.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from ladder import Marks
from memory import PeakMemory
from serving import serve

# Steps between two looks at the objective grow by this share.
LOOKS = 0.05


class Run:
    """One learning rate: its weights, its clock, and the best weights that were looked at."""

    def __init__(self, job: dict[str, Any], data: dict[str, torch.Tensor], rate: float):
        self.X, self.Y, self.D = data["X"], data["Y"], data["D"]
        self.alpha, self.batch = job["alpha"], job["batch"]
        (n, d), c, p = self.X.shape, self.Y.shape[1], self.D.shape[1]
        self.generator = torch.Generator().manual_seed(0)
        size = {"generator": self.generator, "dtype": self.X.dtype}
        self.U = (torch.randn(d, p * c, **size) / math.sqrt(d * p)).requires_grad_()
        self.a = (torch.randn(p * c, **size) / math.sqrt(p)).requires_grad_()
        self.adam = torch.optim.Adam([self.U, self.a], lr=rate)
        self.seconds, self.steps, self.next_look = 0.0, 0, 0
        self.n, self.p, self.c = n, p, c
        self.best, self.best_V = math.inf, np.zeros((p, d, c))

    def outputs(self, X: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
        """Of some rows."""
        hidden = (X @ self.U * self.a).reshape(len(X), self.p, self.c)
        return torch.einsum("npc,np->nc", hidden, D)

    def objective(self) -> float:
        """Of the convex programme."""
        with torch.no_grad():
            fit = ((self.outputs(self.X, self.D) - self.Y) ** 2).sum() / (2 * self.n)
            penalty = (self.U.norm(dim=0) * self.a.abs()).sum()
            return float(fit + self.alpha * penalty)

    def train(self, seconds: float, marks: Marks | None = None) -> float:
        """Go on until the clock shows so much, or all marks are met; the last objective."""
        found = self.objective()
        while self.seconds < seconds:
            start = time.perf_counter()
            self._step()
            self.seconds += time.perf_counter() - start
            if self.steps >= self.next_look or self.seconds >= seconds:
                self.next_look = self.steps + 1 + int(LOOKS * self.steps)
                found = self.objective()
                if not math.isfinite(found):
                    return math.inf
                if found < self.best:
                    self.best, self.best_V = found, self._weights()
                if marks is not None and marks.stop(found, self.seconds):
                    break
        return found

    def _step(self) -> None:
        self.steps += 1
        X, Y, D = self.X, self.Y, self.D
        if self.batch is not None and self.batch < self.n:
            rows = torch.randint(self.n, (self.batch,), generator=self.generator)
            X, Y, D = X[rows], Y[rows], D[rows]
        loss = ((self.outputs(X, D) - Y) ** 2).sum() / (2 * len(X))
        loss = loss + self.alpha / 2 * ((self.U**2).sum() + (self.a**2).sum())
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()

    def _weights(self) -> np.ndarray:
        """V (p, d, c)."""
        V = (self.U * self.a).detach().numpy()
        return V.reshape(len(V), self.p, self.c).transpose(1, 0, 2)


def solve(job: dict[str, Any]) -> dict[str, Any]:
    """Try each of the ``rates`` for ``pilot`` seconds, and the best for the time limit."""
    torch.set_num_threads(job["threads"])
    with np.load(job["data"]) as file:
        data = {name: torch.from_numpy(file[name].astype(np.float64)) for name in ("X", "Y", "D")}
    found = {rate: Run(job, data, rate).train(job["pilot"]) for rate in job["rates"]}
    rate = min(found, key=lambda rate: found[rate])
    marks = Marks(job["targets"], job["time_limit"])
    with PeakMemory() as memory:
        run = Run(job, data, rate)
        run.train(job["time_limit"], marks)
    np.savez(job["result"], D=data["D"].numpy() > 0, V=run.best_V)
    return {
        "seconds": marks.seconds,
        "rate": rate,
        "peak_growth": memory.growth,
        "versions": f"torch {torch.__version__}",
    }


if __name__ == "__main__":
    serve(solve)
