"""The students of a network's sites: sums over activations, what each changes, and their fits."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from cvxdistill.allocation import Option
from cvxdistill.compression_report import Choice
from cvxdistill.model_size import ModelSize
from cvxdistill.output_change import OutputChange
from cvxdistill.solvers import CentredMoments, GatedStatistics, LinearFit, SparseFit
from cvxdistill.solvers.threads import one_blas_thread
from cvxdistill.streamed_block import pooled_features
from cvxdistill.student_curves import (
    Size,
    StudentFamily,
    Weighting,
    best_ridge,
    described,
    linear_student,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cvxdistill.adapters import Examples, LinearStudent, Site
    from cvxdistill.adapters.batches import Batch

# Rows that sums are made of, for each feature: for curves, and for the students that are deployed.
CURVE_ROWS, FIT_ROWS = 10, 50
# Rows, at least, for each feature of a student with wider kernels.
WIDER_ROWS = 4
# Where images count as means over their positions: examples, at least, for each feature.
POOLED_ROWS = 2
# Fitted examples that say how the network uses a block's outputs.
METRIC_EXAMPLES = 400
# Sites that need more examples than this are gone through apart.
FEW_EXAMPLES = 5000
# A student may leave outputs out where that alone changes the model's by no more than this.
UNCHANGED = 1e-4
# Held-out examples at most.
MOST_HELD_OUT = 2000
# Students of each block, at least, whose effect on the output is measured; the others' is
# interpolated. Of few blocks more are measured: so many of all together.
MEASURED_SIZES, MEASURED_IN_ALL = 3, 24
# Relative squared activation error from which on it is in proportion to the output's.
SMALLEST_TELLING = 1e-3


class SiteStudents:
    """The model, its examples and sites: sums, students and what they do to the output."""

    def __init__(
        self,
        model: nn.Module,
        examples: Examples,
        layers: Sequence[str],
        sites: Sequence[Site],
        validation_fraction: float,
        criterion: str,
        sparse: bool,
        rng: np.random.Generator,
        verbose: int,
    ) -> None:
        self.model, self.examples, self.layers, self.sites = model, examples, layers, [*sites]
        self.sparse, self.rng, self.verbose = sparse, rng, verbose
        self.found: list[tuple[Site, Size, float]] = []
        n = len(examples)
        self.n_held_out = max(1, min(round(n * validation_fraction), MOST_HELD_OUT, n - 1))
        self.share = self.n_held_out / n
        wider = (site.wider() for site in sites)
        rows = n - self.n_held_out
        self.sites += [w for w in wider if w and rows * w.rows >= WIDER_ROWS * w.layout.n_features]
        self._seed = 0
        self._weightings: dict[object, Weighting] = {}
        self._offsets: dict[object, np.ndarray] = {}
        self.change = OutputChange(
            model, examples, self.share, self.n_held_out, criterion, self._keep_outputs
        )

    def measure_students(self, sequential: bool) -> None:
        """Find the sizes of students of every site, and what each adds to the squared change."""
        self._set_weightings(sequential)
        needs = [self._examples_for(site, CURVE_ROWS) for site in self.sites]
        sums: dict[int, GatedStatistics] = {}
        # Most sites need few examples: not all of them are recorded for the others' sake.
        few = [k for k, need in enumerate(needs) if need <= FEW_EXAMPLES]
        many = [k for k, need in enumerate(needs) if need > FEW_EXAMPLES]
        for which in filter(None, (few, many)):
            some, need = [self.sites[k] for k in which], max(needs[k] for k in which)
            made = self._sums(self.model, some, need, CURVE_ROWS, "activations")
            sums |= dict(zip(which, made, strict=True))
        held_out = dict(enumerate(self._sums(self.model, self.sites, None, CURVE_ROWS, "held out")))
        for k, site in enumerate(tqdm(self.sites, desc="curves", disable=not self.verbose)):
            # Torch's own threads, those of NumPy's BLAS and of SciPy's would wait for each other.
            with one_blas_thread():
                family = self._family(site, sums.pop(k), CentredMoments.of(held_out.pop(k)))
                sizes = family.sizes(_numbers(site))
            if sizes:
                errors = self._changes(site, family, sizes)
                self.found += [(site, size, e) for (size, _), e in zip(sizes, errors, strict=True)]
        # Of builds, so that none depends on those before it.
        self._seed = int(self.rng.integers(2**63))

    def options(self, measure: ModelSize) -> list[Option]:
        """All students that were found, with their costs."""
        from cvxdistill.adapters import stored_orders

        options: list[Option] = []
        for site, size, error in self.found:
            saved = _numbers(site) - sum(
                ModelSize(False).layer(self.model, name)
                for name in self.layers[site.start : site.stop]
            )
            orders = stored_orders(
                site.layout, size.input_rank, size.rank, size.written, sparse=size.kept is not None
            )
            cost = measure.student(site, max(0, size.parameters - saved), orders)
            options.append(Option(site.start, site.stop, cost, error, (site, size, error)))
        return options

    def _set_weightings(self, sequential: bool) -> None:
        """A weighting of each site's outputs by how the rest of the network uses them.

        Students after it that were fitted to what the original gives could read any of them.
        """
        from cvxdistill.adapters import output_metrics

        end = min(1.0, self.share + METRIC_EXAMPLES / len(self.examples))
        batches = (batch for batch, _ in self.examples.between(self.share, end))
        # Sites with other kernels are of the same span.
        spans = {site.name: site.span for site in self.sites}
        found = output_metrics(self.model, [*spans.values()], batches, self.rng)
        metrics = dict(zip(spans, found, strict=True))
        for site in self.sites:
            metric = metrics[site.name]
            if metric is None or len(metric.matrix) != site.layout.n_outputs:
                continue
            weighting = Weighting.of(metric.matrix)
            if weighting is not None and metric.uniform and self._enough_to_pool(site):
                weighting = self._if_the_same(site, replace(weighting, pooled=True), weighting)
            if weighting is not None and sequential:
                few = Weighting.of_few(metric.matrix)
                if few is not None:
                    few = replace(few, pooled=weighting.pooled)
                    weighting = self._if_the_same(site, few, weighting)
            if weighting is not None:
                self._weightings[site.key] = weighting

    def _enough_to_pool(self, site: Site) -> bool:
        """Whether there are rows enough if each example gives one."""
        return len(self.examples) - self.n_held_out >= POOLED_ROWS * site.layout.n_features

    def _if_the_same(self, site: Site, tried: Weighting, otherwise: Weighting) -> Weighting:
        """A weighting if what it keeps of the outputs is all that the rest of the network reads."""
        from cvxdistill.adapters import change_when_rewritten

        end = min(self.share, METRIC_EXAMPLES / len(self.examples))
        batches = (batch for batch, _ in self.examples.between(0, end))
        change = change_when_rewritten(self.model, site.span, tried.rewritten, batches)
        return tried if change <= UNCHANGED else otherwise

    def _family(self, site: Site, sums: GatedStatistics, held_out: CentredMoments) -> StudentFamily:
        from cvxdistill.adapters import input_channels

        ridge = best_ridge(CentredMoments.of(sums), held_out, input_channels(site.layout))
        weighting = self._weightings.get(site.key)
        return StudentFamily(ridge, site.layout, weighting, sparse=self.sparse)

    def _changes(
        self, site: Site, family: StudentFamily, sizes: list[tuple[Size, float]]
    ) -> np.ndarray:
        """Of every size: measured for some, in proportion to the activation error between."""
        from cvxdistill.adapters import swap_block

        logs = np.log([size.parameters for size, _ in sizes])
        activation = np.array([max(error, 1e-12) for _, error in sizes])
        # Where next to nothing is left of the error, its share in the output's is noise.
        telling = int((activation > SMALLEST_TELLING).sum())
        last = max(telling - 1, 0)
        count = max(MEASURED_SIZES, MEASURED_IN_ALL // len(self.sites))
        places = np.unique(np.linspace(0, last, count).round().astype(int))
        measured = []
        for k in places:
            with one_blas_thread():
                fit = family.fit(sizes[k][0])
            student = self._student(site, fit)
            swapped = swap_block(self.model, site.span, student)
            measured.append(self.change.measure(swapped, roughly=True))
        tells = np.array(measured) >= self.change.smallest_telling
        tells[0] = True
        places, ratios = places[tells], (np.array(measured) / activation[places])[tells]
        errors = activation * np.exp(
            np.interp(logs, logs[places], np.log(np.maximum(ratios, 1e-12)))
        )
        return np.asarray(errors)

    def _student(self, site: Site, fit: LinearFit | SparseFit) -> LinearStudent:
        """Of a fit to the site's sums, which are of shifted inputs and weighted outputs."""
        fit = fit.shifted(self._offsets[site.key])
        return linear_student(fit, site.layout, self._weightings.get(site.key))

    def build(self, chosen: Sequence[Option], sequential: bool) -> tuple[nn.Module, list[Choice]]:
        """Fit the chosen students one after the other, and put each in its place."""
        from cvxdistill.adapters import swap_block

        self.rng = np.random.default_rng(self._seed)
        compressed = copy.deepcopy(self.model)
        choices: list[Choice] = []
        progress = tqdm(chosen, desc="students", disable=not self.verbose)
        for option in progress:
            site, size, predicted = option.student
            progress.set_postfix_str(site.name)
            start = time.perf_counter()
            source = compressed if sequential else self.model
            need = self._examples_for(site, FIT_ROWS)
            (sums,) = self._sums(source, [site], need, FIT_ROWS, "")
            (others,) = self._sums(source, [site], None, CURVE_ROWS, "")
            with one_blas_thread():
                held_out = CentredMoments.of(others)
                family = self._family(site, sums, held_out)
                fit = family.fit(size, refined=True)
            student = self._student(site, fit)
            compressed = swap_block(compressed, site.span, student, inplace=True)
            choices.append(
                Choice(
                    block=site.name,
                    student=described(site.layout, size),
                    parameters_before=_numbers(site),
                    parameters=student.parameters_stored,
                    activation_error=math.sqrt(fit.error(held_out)),
                    output_change=math.sqrt(predicted),
                    relative_gap=family.relative_gap(fit),
                    rows=sums.n,
                    seconds=time.perf_counter() - start,
                )
            )
        return compressed.train(self.model.training), choices

    def _keep_outputs(
        self, number: int, batch: Batch, which: np.ndarray, output: Tensor
    ) -> Tensor | None:
        return self._keep("", number, batch, which, (output, output))

    def _keep(
        self,
        name: str,
        number: int,
        batch: Batch,
        which: np.ndarray,
        pair: tuple[Tensor, Tensor],
    ) -> Tensor | None:
        """The tokens that count, or None for all; a mask is not for what maps no tokens."""
        if pair[0].ndim != 3 or pair[0].shape[:2] != pair[1].shape[:2]:
            return None
        return self.examples.masks.of(name, number, batch, which, pair)

    def _examples_for(self, site: Site, rows_per_feature: int) -> int:
        """Examples that give so many rows for each feature of a site's student."""
        weighting = self._weightings.get(site.key)
        rows = 1 if weighting is not None and weighting.pooled else site.rows
        return math.ceil(rows_per_feature * site.layout.n_features / rows)

    def _sums(
        self,
        source: nn.Module,
        sites: Sequence[Site],
        need: int | None,
        rows_per_feature: int,
        name: str,
    ) -> list[GatedStatistics]:
        """Sums of each site's inputs in ``source`` and outputs in the original.

        Over ``need`` fitted examples, or over the held-out ones. The mean of the first rows that a
        site ever receives is subtracted from its inputs, always the same: features far from zero
        would lose their digits.
        """
        from cvxdistill.adapters import BlockTaps, token_rows

        low, high, count = 0.0, self.share, self.n_held_out
        if need is not None:
            fitted = len(self.examples) - self.n_held_out
            count = min(need, fitted)
            low, high = self.share, self.share + (1 - self.share) * count / fitted
        weightings = [self._weightings.get(site.key) for site in sites]
        outputs = [
            s.layout.n_outputs if w is None else w.root.shape[1]
            for s, w in zip(sites, weightings, strict=True)
        ]
        sums = [
            GatedStatistics(1, s.layout.n_features - 1, c)
            for s, c in zip(sites, outputs, strict=True)
        ]
        taps = BlockTaps(self.model, [site.span for site in sites])
        inputs = None
        if source is not self.model:
            inputs = BlockTaps(source, [site.span for site in sites], inputs_only=True)
        batches = tqdm(
            self.examples.between(low, high),
            total=math.ceil(count / self.examples.largest_batch),
            desc=name,
            disable=not self.verbose or not name,
            leave=False,
        )
        done = 0
        for number, (batch, which) in enumerate(batches):
            pairs = taps.run(batch)
            taken = pairs if inputs is None else inputs.run(batch)
            done += len(which)
            for site, weighting, total, (_, output), (input, _) in zip(
                sites, weightings, sums, pairs, taken, strict=True
            ):
                keep = self._keep(site.name, number, batch, which, (input, output))
                # As many rows as the share of the examples that has been gone through.
                wanted = math.ceil(rows_per_feature * site.layout.n_features * done / count)
                if wanted > total.n:
                    _check_finite(site.name, input, output)
                    if weighting is not None and weighting.pooled:
                        X, Y = _pooled_rows(site, input, output, wanted - total.n)
                    else:
                        left = wanted - total.n
                        X, Y = token_rows(site.layout, input, output, keep, left, self.rng)
                    if weighting is not None:
                        Y = Y @ weighting.root.astype(Y.dtype)
                    offset = self._offsets.setdefault(site.key, X.mean(axis=0))
                    total.update(X - offset, Y, np.ones((len(X), 1), dtype=bool))
        return sums


def _numbers(site: Site) -> int:
    """Parameters of what a site's student stands in for."""
    own = {id(p): p for module in site.modules for p in module.parameters()}
    return sum(p.numel() for p in own.values())


def _check_finite(block: str, input: Tensor, output: Tensor) -> None:
    for side, tensor in (("input", input), ("output", output)):
        if not tensor.isfinite().all():
            raise ValueError(
                f"the {side} of block {block!r} contains NaN or infinity; does data, or do weights?"
            )


def _pooled_rows(
    site: Site, input: Tensor, output: Tensor, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows X (n, d - 1) and Y (n, c), averaged over the positions of the first images (N, ...)."""
    inputs = input[:most].numpy()
    always_on = np.zeros((site.layout.n_features, 1), inputs.dtype)
    features = pooled_features(site.layout, inputs, always_on)
    X = np.concatenate([part[:, 0, :-1] for part in features])
    return X, output[:most].mean(dim=(2, 3)).numpy()
