"""``distill``: replace one block of a trained network by a small convex student, without labels."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cvxdistill.atomic_files import check_parent, replacing
from cvxdistill.candidates import Candidate, FitData, gated_candidates, linear_candidates
from cvxdistill.low_rank_distillation import distill_low_rank
from cvxdistill.report import Report
from cvxdistill.selection import PolishedCandidate, choose, choose_polished
from cvxdistill.solvers import RowSubset, sample_gates
from cvxdistill.solvers.penalties import find_regularizer
from cvxdistill.solvers.random_order import random_order

if TYPE_CHECKING:
    from torch import nn

    from cvxdistill.adapters import Capture, ConvLayout, DenseLayout, GatedStudent, Span
    from cvxdistill.adapters.batches import Batch

STUDENTS = ("auto", "linear", "gated")
POLISHES = ("group_elastic_net",)


@dataclass(frozen=True)
class Distillation:
    """What ``distill`` returns.

    Attributes
    ----------
    model : nn.Module
        The model with the student in the block's place.
    student : GatedStudent
    report : Report
        Printable; ``report.to_frame()`` is the table of candidates, ``report.to_html(path)`` a page
        with all of it, with pictures and latencies.
    candidates : tuple of Candidate
        Every student that was considered, the linear ones first, by size, the polished ones last.
    span : Span
        The blocks that were replaced, for ``swap_block`` with another student: which of a span
        became identities, and how the block returns its tensor.
    example : Tensor or dict
        Two examples of the model's inputs, for exports.
    """

    model: nn.Module = field(repr=False)
    student: GatedStudent
    report: Report = field(repr=False)
    candidates: tuple[Candidate, ...] = field(repr=False)
    span: Span = field(repr=False)
    example: Batch = field(repr=False)

    def save(self, path: str | Path) -> None:
        """Write the student as safetensors with a JSON header; ``load_student`` reads it.

        Raises
        ------
        OSError
            If the file cannot be written. An existing file is replaced only when all is written.
        """
        from cvxdistill.adapters import save_student

        save_student(self.student, path)

    def quantize(self, dtype: str) -> Distillation:
        """Return this result with its student in lower precision; the rest of the model stays.

        Parameters
        ----------
        dtype : {"float16", "int8"}
            "float16": the student computes in half and casts its input and output; for GPUs, as
            convolutions in half are very slow on CPUs. "int8": weights of 8 bits, but those of the
            gates, with a scale for each output channel; inputs are rounded for each example.

        Returns
        -------
        Distillation
            With copies of the model and the student. ``report`` keeps what was measured before, and
            says so.

        Raises
        ------
        ValueError
            If ``dtype`` is unknown, weights are too large for half, or the student is in int8
            already.
        """
        from cvxdistill.adapters import quantize_student

        student = quantize_student(self.student, dtype)
        # Wherever the copy would hold the old student, it holds the new one.
        model = deepcopy(self.model, {id(self.student): student})
        before, after = self.student.bytes_stored, student.bytes_stored
        quantized = f"{dtype}: {before:,} -> {after:,} bytes"
        report = replace(self.report, model=model, quantized=quantized)
        return replace(self, model=model, student=student, report=report)

    def export_onnx(self, path: str | Path, *, tolerance: float | None = None) -> float:
        """Write the model with its student as ONNX, for any number of examples, and check the file.

        Parameters
        ----------
        path : str or Path
        tolerance : float, optional
            What onnxruntime's outputs may differ from torch's, relative to the largest of them if
            that is above 1; for 1, 3 and 64 examples. 1e-4 by default, 5e-3 with float16. With
            either dtype of ``quantize`` half of the examples must be so close, the others within
            0.05: a number between two integers may be rounded to either, a gate at 0 be on or off.

        Returns
        -------
        float
            The largest difference.

        Raises
        ------
        ImportError
            If onnx, onnxscript or onnxruntime is not installed.
        ValueError
            If the model cannot be expressed in ONNX, or differs.
        OSError
            If the file cannot be written. An existing file is replaced only when all is well.
        """
        from cvxdistill.adapters import export_onnx

        with replacing(check_parent(path, "path")) as temporary:
            return export_onnx(self.model, self.example, temporary, tolerance=tolerance)


def distill(
    model: nn.Module,
    block: str,
    data: Any,
    *,
    mask: Any = "auto",
    match: str = "outputs",
    student: str = "auto",
    gates: Any = "auto",
    n_gates: int = 32,
    n_neurons: int | None = None,
    alpha: float | None = None,
    penalty: str | None = None,
    l1_ratio: float = 1.0,
    refit: bool = True,
    polish: str | None = None,
    max_neurons: int | None = None,
    kernel_size: int | tuple[int, int] | None = None,
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] | None = None,
    max_rows: int | None = 50_000,
    max_examples: int | None = None,
    validation_fraction: float = 0.1,
    batch_size: int = 256,
    memory_limit: int = 2 * 2**30,
    tol: float = 1e-2,
    max_iter: int = 1000,
    time_limit: float | None = None,
    inplace: bool = False,
    random_state: int | np.random.Generator | None = 0,
    verbose: int = 1,
) -> Distillation:
    """Distil a block of a trained network into a small convex student, without labels.

    The block's inputs and outputs are recorded over ``data``. A linear student (always) and gated
    students (unless ``student="linear"``) are fitted to them by convex optimisation,

        minimise over V, b   1/(2n) ||sum_j diag(D[:, j]) X V[j] + 1 b^T - Y||_F^2
                             + alpha * sum_j R(V[j]),

    with one row of X for each example, token or image patch. The solution's leading hidden units
    are kept, the second layer is refitted by least squares, and the best student by held-out
    activation error takes the block's place.

    Parameters
    ----------
    model : nn.Module
        Left as it is unless ``inplace``.
    block : str
        Dotted name of the block, which maps one tensor to one tensor (masks and flags beside it are
        ignored, a tuple or dataclass around what it returns is kept); or a span,
        ``"layer3:layer4"``: from the input of the first block to the output of the last, which run
        one after the other. The student takes the first one's place, the rest become identities.
    data : DataLoader, iterable of batches, tensor, array or dict
        Inputs of the model; labels beside them are ignored. Batches that are dicts are passed by
        name; one dict of tensors is split into batches.
    mask : "auto", None, str, callable, tensor or array, default="auto"
        Which tokens (N, T) of a block that maps (N, T, d) to (N, T, c) are fitted and held out:
        those that are not 0. "auto": the "attention_mask" of batches that are dicts; another key of
        theirs; a function of the batch; an array (n_examples, T); None: all tokens.
    match : str, default="outputs"
        What the student is fitted to: the block's outputs; ``"after:avgpool"``, what a module
        that follows makes of them, if all that runs between is linear (average pooling over
        whole images, batch norms, linear layers); or "network", the outputs weighted by how the
        rest of the network uses them, the mean of J^T J with J the Jacobian of the model's output
        (``output_metrics``). Errors reported are then after it, or so weighted.
    student : {"auto", "linear", "gated"}, default="auto"
        "auto" takes the smallest student whose held-out error is within 2 % (relative) of the
        best one's.
    gates : {"auto", "teacher", "gaussian"} or array of shape (d, p), default="auto"
        Where gates come from: the block's own first layer (bias and batch norm folded in),
        standard normal ones, or these, with a last row of biases. "auto" takes the teacher's
        where the block has them. An always-on gate is added.
    n_gates : int, default=32
        Gates to sample, or to draw from the teacher's.
    n_neurons : int, optional
        Hidden units of the student. By default powers of two are tried.
    alpha : float, optional
        Regularisation strength. By default chosen along a path by held-out activation error.
    penalty : {"gate", "neuron", "ridge", "nuclear"}, optional
        Of the gated student, "gate" by default; the linear one has a ridge. "nuclear" is for many
        outputs: both students are solved for all of them in factored form, globally optimal to
        ``tol`` unless ``n_neurons`` caps the units, from sums over the examples alone: activations
        are not stored. It is the default where ``match`` is given. ``data`` is kept then.
    l1_ratio : float, default=1.0
        Blend of the penalty with a ridge.
    refit : bool, default=True
        Refit the second layer by least squares after units were dropped. Without, and with units
        enough, the student's output is the convex programme's prediction (of the leading 32
        principal components of the block's outputs, if it has more).
    polish : {"group_elastic_net"} or None, default=None
        Drop hidden units by a group elastic net on the second layer (``cvxdistill.polish``): from
        the student that would be chosen, and from the best of each kind. What takes the block's
        place is then neither larger nor worse on the held-out examples than without polishing.
        Fit many ``n_neurons`` and let the polishing choose.
    max_neurons : int, optional
        With ``polish``: students of at most so many hidden units, each polished to the smallest
        held-out error.
    kernel_size, stride, padding : int or pair, optional
        Of a convolutional student; by default inferred from the block's shapes.
    max_rows : int or None, default=50_000
        Sample this many rows (examples, tokens or patches) for the fit; None uses all. Gated
        students have (n_gates + 1) * d weights for each output: much fewer rows overfit.
    max_examples : int, optional
        Record at most this many examples.
    validation_fraction : float, default=0.1
        Share of the examples that is held out, of tokens in whole sequences. They choose among
        alphas, sizes and polished students, so the error reported for them is a little too good.
    batch_size : int, default=256
        For ``data`` that is one tensor, array or dict.
    memory_limit : int, default=2 GiB
        Bytes of recorded activations, and of rows to fit, beyond which they are not held in
        memory.
    tol : float, default=1e-2
        Relative duality gap of the gated programme.
    max_iter : int, default=1000
        Iterations for each alpha.
    time_limit : float, optional
        Seconds for each alpha.
    inplace : bool, default=False
        Put the student into ``model`` itself instead of into a copy.
    random_state : int, Generator or None, default=0
        Of gates, held-out examples and sampled rows.
    verbose : int, default=1
        0 is silent.

    Returns
    -------
    Distillation

    Raises
    ------
    ValueError, TypeError
        Before any work if an argument is not valid, with what was expected; after the recording
        if no student fits the block's shapes or none is smaller than the block. The model is then
        as it was.

    References
    ----------
    Varshney and Pilanci 2024, sections 4.1 (activation matching, equations 6 and 8) and 4.3
    (freezing the first layer and refitting the second).
    """
    from cvxdistill.adapters import (
        capture,
        check_swappable,
        get_block,
        swap_block,
    )
    from cvxdistill.adapters.call_structure import StructuredBlock
    from cvxdistill.adapters.module_tree import span_modules

    check_swappable(model, block)
    penalty = penalty or ("gate" if match == "outputs" else "nuclear")
    _check_arguments(locals())
    if penalty == "nuclear":
        return distill_low_rank(model, block, data, locals())
    rng = np.random.default_rng(random_state)
    seconds: dict[str, float] = {}

    with timed(seconds, "capture"):
        captured = capture(
            model,
            block,
            data,
            mask=mask,
            batch_size=batch_size,
            max_examples=max_examples,
            memory_limit=memory_limit,
            verbose=verbose,
        )
    with captured:
        span = captured.span
        # A single block runs as it is, a span as its blocks one after the other.
        replaced = span_modules(model, span)
        target = replaced[0] if len(replaced) == 1 else replaced
        block_parameters = sum(p.numel() for p in replaced.parameters())
        model_parameters = sum(p.numel() for p in model.parameters())
        layout = captured.layout(kernel_size=kernel_size, stride=stride, padding=padding)
        fit = _fit_data(captured, layout, max_rows, validation_fraction, memory_limit, rng)
        limit = most_parameters(layout, n_neurons, block_parameters)
        with timed(seconds, "linear"):
            candidates, path = linear_candidates(
                fit,
                alpha=alpha,
                n_neurons=n_neurons,
                most_parameters=limit,
                refit=refit,
                tol=tol,
            )
        gate_source = "none"
        if student != "linear":
            with timed(seconds, "gated"):
                G, gate_source = choose_gates(gates, n_gates, target, captured.inputs, layout, rng)
                gated, points = gated_candidates(
                    fit,
                    G,
                    alpha=alpha,
                    n_neurons=n_neurons,
                    penalty=penalty,
                    l1_ratio=l1_ratio,
                    most_parameters=limit,
                    refit=refit,
                    tol=tol,
                    max_iter=max_iter,
                    time_limit=time_limit,
                    verbose=verbose,
                )
            candidates += gated
            path += points
        polished: tuple[PolishedCandidate, ...] = ()
        if polish is None:
            chosen = choose(candidates, student, block_parameters)
        else:
            with timed(seconds, "polish"):
                chosen, polished = choose_polished(
                    fit, candidates, student, block_parameters, max_neurons, verbose
                )
            candidates += [result.after for result in polished if result.changed]
        swapped = swap_block(model, span, chosen.student, inplace=inplace)
        assert captured.example is not None
        report = Report(
            block=block,
            replaced=span.names,
            block_parameters=block_parameters,
            model_parameters=model_parameters,
            layout=layout,
            gate_source=gate_source,
            examples=captured.n_examples,
            held_out=_held_out_examples(len(_examples(captured)), validation_fraction),
            rows=fit.X.shape[0],
            available_rows=(len(captured) - len(fit.held_out)) * layout.n_positions,
            seconds=seconds,
            candidates=tuple(candidates),
            path=tuple(path),
            chosen=chosen,
            original=None if inplace else model,
            model=swapped,
            example=captured.example,
            polished=polished,
        )
    placed: Any = get_block(swapped, span.first)
    placed = placed.student if isinstance(placed, StructuredBlock) else placed
    return Distillation(swapped, placed, report, tuple(candidates), span, captured.example)


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Note how long a phase takes."""
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start


def _check_arguments(arguments: dict[str, Any]) -> None:
    """Refuse what can be refused before the model is run."""
    student, gates = arguments["student"], arguments["gates"]
    if student not in STUDENTS:
        raise ValueError(f"student must be one of {STUDENTS}, got {student!r}.")
    if isinstance(gates, str) and gates not in ("auto", "teacher", "gaussian"):
        raise ValueError(f"gates must be 'auto', 'teacher', 'gaussian' or an array, got {gates!r}.")
    if arguments["polish"] not in (None, *POLISHES):
        raise ValueError(f"polish must be one of {POLISHES} or None, got {arguments['polish']!r}.")
    if arguments["max_neurons"] is not None and arguments["polish"] is None:
        raise ValueError(f"max_neurons is for polishing: say polish={POLISHES[0]!r}, or n_neurons.")
    for name in ("n_gates", "n_neurons", "max_neurons", "max_rows", "max_iter"):
        value = arguments[name]
        if value is None and name in ("n_neurons", "max_neurons", "max_rows"):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    for name in ("validation_fraction", "alpha", "tol"):
        value = arguments[name]
        if not isinstance(value, Real) and not (name == "alpha" and value is None):
            raise TypeError(f"{name} must be a number, got {value!r}.")
    fraction = arguments["validation_fraction"]
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction must lie in (0, 1), got {fraction!r}.")
    alpha = arguments["alpha"]
    if alpha is not None and not (0 < alpha < np.inf):
        raise ValueError(f"alpha must be positive and finite, or None, got {alpha!r}.")
    if not 0 < arguments["tol"] < np.inf:
        raise ValueError(f"tol must be positive and finite, got {arguments['tol']!r}.")
    find_regularizer(arguments["penalty"], arguments["l1_ratio"])
    match, penalty = arguments["match"], arguments["penalty"]
    if not isinstance(match, str):
        raise TypeError(f"match must be 'outputs', 'network' or 'after:NAME', got {match!r}.")
    if match != "outputs" and penalty != "nuclear":
        raise ValueError(f"match={match!r} goes with penalty='nuclear', got {penalty!r}.")
    if penalty == "nuclear":
        for name, value in (("polish", None), ("l1_ratio", 1.0)):
            if arguments[name] != value:
                raise ValueError(f"penalty='nuclear' has no {name}, got {arguments[name]!r}.")


def _fit_data(
    captured: Capture,
    layout: ConvLayout | DenseLayout,
    max_rows: int | None,
    validation_fraction: float,
    memory_limit: int,
    rng: np.random.Generator,
) -> FitData:
    """Hold examples out, sample rows of the others, and gather them if they fit in memory."""
    examples = _examples(captured)
    if len(examples) < 2:
        raise ValueError(
            f"data must hold at least 2 examples, to hold one out; got {len(examples)}."
        )
    order = examples[random_order(rng, len(examples))]
    count = _held_out_examples(len(examples), validation_fraction)
    held_out, fitted = np.sort(order[:count]), np.sort(order[count:])
    # Tokens of one sequence are alike: they are held out together.
    if captured.tokens is not None:
        held_out, fitted = (_rows_of(captured.tokens, part) for part in (held_out, fitted))
    indices = (fitted[:, None] * layout.n_positions + np.arange(layout.n_positions)).ravel()
    if max_rows is not None and len(indices) > max_rows:
        indices = np.sort(rng.choice(indices, max_rows, replace=False))
    X: Any = RowSubset(layout.rows(captured.inputs), indices)
    if X.shape[0] * X.shape[1] * X.dtype.itemsize <= memory_limit:
        X = X[:]
    Y = np.ascontiguousarray(layout.targets(captured.outputs, indices))
    return FitData(layout, X, Y, captured.inputs, captured.outputs, held_out)


def _examples(captured: Capture) -> np.ndarray:
    """The examples that have anything to fit: a mask may leave no token of some."""
    tokens = captured.tokens
    return np.arange(len(captured)) if tokens is None else np.flatnonzero(tokens)


def _held_out_examples(count: int, validation_fraction: float) -> int:
    return max(1, round(count * validation_fraction))


def _rows_of(tokens: np.ndarray, examples: np.ndarray) -> np.ndarray:
    """The rows of these examples, which have so many tokens each, one example after the other."""
    chosen = np.zeros(len(tokens), dtype=bool)
    chosen[examples] = True
    return np.flatnonzero(np.repeat(chosen, tokens))


def choose_gates(
    gates: Any,
    n_gates: int,
    block: nn.Module,
    inputs: np.ndarray,
    layout: ConvLayout | DenseLayout,
    rng: np.random.Generator,
) -> tuple[np.ndarray, str]:
    """Gates G (d, p) with an always-on gate first, and where they come from."""
    from cvxdistill.adapters import teacher_gates

    d = layout.n_features
    source = gates if isinstance(gates, str) else "given"
    G: np.ndarray | None = None
    if source == "given":
        G = np.asarray(gates, dtype=np.float32)
        if G.ndim != 2 or G.shape[0] not in (d - 1, d) or not np.isfinite(G).all():
            raise ValueError(
                f"gates must be finite and of shape ({d - 1}, p), or ({d}, p) with a last row of "
                f"biases, got shape {G.shape}."
            )
        if len(G) == d - 1:
            G = np.vstack([G, np.zeros((1, G.shape[1]), np.float32)])
    elif source in ("auto", "teacher"):
        try:
            G = teacher_gates(block, inputs[:16], layout)
        except ValueError:
            if source == "teacher":
                raise
        else:
            source = "teacher"
            G = G[:, np.sort(rng.permutation(G.shape[1])[:n_gates])]
    if G is None:
        source = "gaussian"
        G = sample_gates(d, n_gates, random_state=rng, dtype=np.float32)
    always = np.zeros((d, 1), np.float32)
    return np.hstack([always, G.astype(np.float32)]), source


def most_parameters(
    layout: ConvLayout | DenseLayout, n_neurons: int | None, block_parameters: int
) -> int:
    """The largest student worth fitting; no limit where the user said a size."""
    if n_neurons is not None:
        return int(np.iinfo(np.int64).max)
    smallest = layout.n_features - 1 + 2 * layout.n_outputs
    if smallest >= block_parameters:
        raise ValueError(
            f"No student is smaller than the block, which has {block_parameters:,} parameters: "
            f"one linear hidden unit takes {smallest:,}. Choose a larger block, a smaller "
            "kernel_size, or n_neurons yourself."
        )
    return block_parameters - 1
