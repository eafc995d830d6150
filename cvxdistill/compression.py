"""``compress``: make a whole network fit a budget, by students of its blocks, without labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cvxdistill.compression_report import Compression
from cvxdistill.compressor import Compressor, check_budgets

if TYPE_CHECKING:
    from torch import nn


def compress(
    model: nn.Module,
    data: Any,
    *,
    max_parameters: int | None = None,
    max_bytes: int | None = None,
    max_error: float | None = None,
    blocks: str | Sequence[str] = "auto",
    criterion: str = "output",
    sparse: bool = False,
    sequential: bool = True,
    mask: Any = "auto",
    max_examples: int | None = 50_000,
    validation_fraction: float = 0.1,
    batch_size: int = 256,
    random_state: int | np.random.Generator | None = 0,
    verbose: int = 1,
) -> Compression:
    """Replace blocks of a network by convex students so that the whole fits a budget.

    1. Sites: layers, blocks and spans that a student could stand in for (``find_sites``).
    2. Curves: for each site the family of linear students of all ranks, from one set of sums over
       its activations (of convolutions in a row also with 5 x 5 kernels), and what some of them
       change in the model's output on held-out examples,

           E = ||F' - F||_F^2 / ||F - mean F||_F^2,

       each alone in the model, or the squared share of examples that it classifies otherwise
       (``criterion``). Between these E is in proportion to the activation error. Outputs of a block
       are weighted by how the rest of the network uses them (``output_metrics``). Where it reads no
       more than s combinations of c outputs, s <= c/2, students write s of them, which carry them
       all, and leave the others zero; where it reads only their mean over an image, that mean is
       fitted. Both are tried on the network first: its output must stay the same.
    3. Allocation: the sites and sizes of the least sum of E within the budget, exactly, by dynamic
       programming over the layers in the order of their calls.
    4. Students: each site's in turn is fitted to the activations of the compressed network so far,
       with the original's outputs as targets, by ridge regression with a certified gap.

    Parameters
    ----------
    model : nn.Module
        Left as it was.
    data : DataLoader, iterable of batches, tensor, array or dict
        Inputs of the model; labels beside them are ignored. They are gone through many times;
        batches of an iterable are kept in memory.
    max_parameters : int, optional
        Of the compressed model, all stored numbers of its students included.
    max_bytes : int, optional
        Of its parameters and buffers.
    max_error : float, optional
        sqrt(E) of the compressed model on held-out examples: the smallest model that does not
        exceed it is sought. Give one of the three.
    blocks : "auto" or sequence of str, default="auto"
        Names of blocks and spans (``"layer3:layer4"``) that may be replaced.
    criterion : {"output", "agreement"}, default="output"
        What E compares: all that the model returns, or, of a classifier, only which of its outputs
        is the largest. A student of the last blocks may get the classes right and the scale of the
        outputs wrong: that is an error of the output, and none of agreement. A classifier that
        agrees with the original on all but 2 % of the examples is at most 2 points less accurate
        on them.
    sparse : bool, default=False
        Let students also be sparse: ridge regressions of few weights (``SparseRidge``), of which a
        file holds those and a bit for each place. They keep more of a network that has little to
        spare; in memory they are whole, and they are not faster.
    sequential : bool, default=True
        Fit each student to what the compressed network before it gives; False: to what the original
        gives, and then all students write all outputs.
    mask : "auto", None, str, callable or array, default="auto"
        Which tokens count, as for ``capture``.
    max_examples : int or None, default=50_000
        Use at most this many.
    validation_fraction : float, default=0.1
        Share of the examples, at most 2,000, that is held out: they choose.
    batch_size : int, default=256
        For data that are one tensor, array or dict.
    random_state : int, Generator or None, default=0
        Of held-out examples and sampled rows.
    verbose : int, default=1
        0 is silent.

    Returns
    -------
    Compression
        With the new model, the choices, the frontier and a printable report.

    Raises
    ------
    ValueError, TypeError
        If an argument is not valid; if a budget cannot be met: the message says the smallest
        possible.

    See Also
    --------
    Compressor : several budgets in turn, from steps 1 and 2 made once.

    References
    ----------
    Varshney and Pilanci 2024, section 4.1; Izenman 1975 (reduced-rank regression); Frantar and
    Alistarh 2022 (layers of few weights).
    """
    # Before any work is done.
    check_budgets(max_parameters, max_bytes, max_error)
    return Compressor(
        model,
        data,
        blocks=blocks,
        criterion=criterion,
        sparse=sparse,
        sequential=sequential,
        mask=mask,
        max_examples=max_examples,
        validation_fraction=validation_fraction,
        batch_size=batch_size,
        random_state=random_state,
        verbose=verbose,
    ).compress(max_parameters=max_parameters, max_bytes=max_bytes, max_error=max_error)
