"""How much a compressed model's output differs from the original's on held-out examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cvxdistill.adapters import Examples
    from cvxdistill.adapters.batches import Batch

# What is measured, and what it is called in a report.
CRITERIA = {
    "output": "relative error of the output",
    "agreement": "share of examples that are classified otherwise",
}
# Held-out examples that tell an error of the output well enough; classes need all.
ENOUGH_FOR_ERRORS = 400
# Examples that have to change their class before their share says anything.
TELLING_CHANGES = 5

Keep = Callable[[int, "Batch", np.ndarray, "Tensor"], "Tensor | None"]


class OutputChange:
    """Squared change of a model's output on the first held-out examples.

    ``"output"``: E = ||F' - F||_F^2 / ||F - mean F||_F^2, rows of F one for each example, token or
    place. ``"agreement"``: the square of the share of rows whose largest entry is another one.
    Both add up where students err independently: errors on the margin between two classes then
    add like variances, and the share of margins that change their sign grows with their standard
    deviation.

    Parameters
    ----------
    model : nn.Module
        The original.
    examples : Examples
    share : float
        Of the examples, held out.
    held_out : int
        How many these are.
    criterion : {"output", "agreement"}
    keep : callable
        From the number of a batch, the batch, its examples and the output: the rows that count.

    Raises
    ------
    ValueError
        For agreement, if the model's output has a single column.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Examples,
        share: float,
        held_out: int,
        criterion: str,
        keep: Keep,
    ) -> None:
        self.model, self.examples, self.share, self.held_out = model, examples, share, held_out
        self.criterion, self.keep = criterion, keep
        self._original: dict[float, tuple[list[np.ndarray], float]] = {}
        if criterion == "agreement" and self._outputs_of_original(share)[0][0].shape[1] < 2:
            raise ValueError(
                "criterion='agreement' compares which of several outputs is the largest; this "
                "model gives one. Use criterion='output'."
            )

    @property
    def smallest_telling(self) -> float:
        """Squared changes below this are noise."""
        if self.criterion == "output":
            return 0.0
        return (TELLING_CHANGES / self.held_out) ** 2

    def measure(self, model: nn.Module, *, roughly: bool = False) -> float:
        """The squared change, on all held-out examples or, roughly, on enough of them."""
        most = self.held_out
        if roughly and self.criterion == "output":
            most = min(most, ENOUGH_FOR_ERRORS)
        share = self.share * most / self.held_out
        original, spread = self._outputs_of_original(share)
        pairs = zip(self._outputs(model, share), original, strict=True)
        if self.criterion == "agreement":
            other = sum(int((a.argmax(axis=1) != b.argmax(axis=1)).sum()) for a, b in pairs)
            return float((other / sum(map(len, original))) ** 2)
        wrong = sum(float(((a - b) ** 2).sum(dtype=np.float64)) for a, b in pairs)
        if not np.isfinite(wrong):
            return 1e12
        return wrong / spread if spread > 0 else wrong

    def _outputs_of_original(self, share: float) -> tuple[list[np.ndarray], float]:
        """Its outputs for the first of the examples, once and for all, and ||F - mean F||_F^2."""
        if share not in self._original:
            outputs = list(self._outputs(self.model, share))
            mean = sum(f.sum(axis=0, dtype=np.float64) for f in outputs) / sum(map(len, outputs))
            spread = sum(float(((f - mean) ** 2).sum()) for f in outputs)
            self._original[share] = outputs, spread
        return self._original[share]

    def _outputs(self, model: nn.Module, share: float) -> Iterator[np.ndarray]:
        """What the model returns for held-out examples: rows, without masked tokens."""
        from cvxdistill.adapters import evaluating, model_output

        with evaluating(model):
            for number, (batch, which) in enumerate(self.examples.between(0, share)):
                output = model_output(model, batch)
                keep = self.keep(number, batch, which, output)
                if keep is not None:
                    output = output[keep]
                # Channels of images come second; of numbers alone each is its own row.
                output = output.movedim(1, -1) if output.ndim > 3 else output
                width = output.shape[-1] if output.ndim > 1 else 1
                yield output.reshape(-1, width).numpy()
