"""Gated ReLU programmes here and with the peers: seconds to the same relative suboptimality.

    make bench                                   everything, hours; goes on where it stopped
    make bench-quick                             two small tables, one run each, some minutes
    python bench/suite.py --problems uci/wine    those that begin so; another run may do others
    python bench/suite.py --report               the tables and pictures of what is done

The problems are those of ``suite_problems.py``. Everybody has the same data, gates, alpha, float64
and one thread. A result counts by its weights: their objective, computed here, may be above the
optimum by a relative 1e-3 or 1e-6. The optimum is ours, certified to 1e-10 where ten minutes are
enough (its gap is in the table).

* Ours, ``choose_solver(problem)``, stops by itself: at a certified gap of as much, and of 1e-8.
* pyscnn's R-FISTA has a trace, and is stopped by an oracle at the first iterate that is good.
* adelie's ``grpnet`` and skglm's ``GroupBCD`` have none: the loosest power of ten of their
  tolerance counts that is good. Separate outputs they solve one after the other.
* Adam minimises the non-convex form with as many units, in full and in small batches, with the best
  of five learning rates (each tried for a twentieth of the limit, not counted). An oracle looks at
  it, too.

After a peer's run ours is repeated, so that the two always stand beside each other; runs of less
than ten seconds are made three times, and the medians count. Compilation is over before. Who is
not there after 60 seconds, or runs out of memory, counts with 60 seconds.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import pandas as pd
from machine import describe_machine
from peers.environment import peers_python
from peers.serving import Worker
from suite_problems import Data, SuiteProblem, problems
from suite_report import draw_growth, draw_profile, report
from uci_rfista import same_order

from cvxdistill.solvers import GatedReLUProblem, choose_solver

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "suite"
CACHE = HERE / ".cache" / "suite"
THREADS = 1
TARGETS, CERTIFIED = (1e-3, 1e-6), 1e-8
LIMIT, REPEATS, REPEAT_BELOW = 60.0, 3, 10.0  # seconds
# Beyond the time limit, which not everybody knows: for reading the data, and a look at the clock.
GRACE = 30.0
MEMORY = 20 * 2**30
REFERENCE, REFERENCE_LIMIT = 1e-10, 600.0
OURS = "cvxdistill"
RATES, PILOT, BATCH = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1], 0.05, 128
QUICK = ("uci/glass/100", "uci/wine/100", "classes/wine")
QUICK_LIMIT = 3.0

Row = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """How a peer is asked.

    Attributes
    ----------
    script : str
    ladder : tuple of float
        Its tolerances, loosest first; none for those that an oracle stops.
    penalties : tuple of str
    settings : dict
        More of its jobs.
    """

    script: str
    ladder: tuple[float, ...] = ()
    penalties: tuple[str, ...] = ("neuron",)
    settings: tuple[tuple[str, Any], ...] = ()


ADAM = (("rates", RATES),)
PEERS = {
    "pyscnn": Peer("pyscnn_marks.py"),
    "adelie": Peer("adelie_path.py", tuple(10.0**-k for k in range(4, 17)), ("neuron", "gate")),
    "skglm": Peer("skglm_path.py", tuple(10.0**-k for k in range(2, 13))),
    "Adam": Peer("torch_adam.py", settings=(*ADAM, ("batch", None))),
    "Adam, batches": Peer("torch_adam.py", settings=(*ADAM, ("batch", BATCH))),
}


def takes(name: str, problem: SuiteProblem) -> bool:
    """Whether a peer has such a programme; Adam, which never gets far, is spared the long lists."""
    long = problem.group.startswith("growth") or "/500/" in problem.name
    return problem.penalty in PEERS[name].penalties and not (name.startswith("Adam") and long)


def own_folder() -> Path:
    """Where this process and its workers exchange files; another may run beside it."""
    folder = CACHE / f"process-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    return folder


class Measured:
    """One problem: its data in a file, its optimum, and what weights are worth."""

    def __init__(self, problem: SuiteProblem):
        self.problem = problem
        self.data: Data = problem.make()
        self.programme = GatedReLUProblem(
            *(self.data[name] for name in ("X", "Y", "D")), penalty=problem.penalty
        )
        self.alpha = problem.ratio * self.programme.alpha_max()
        self.file, self.result = own_folder() / "data.npz", own_folder() / "result.npz"
        self.optimum, self.optimum_gap = self._reference()
        np.savez(self.file, **self.data)

    def _reference(self) -> tuple[float, float]:
        """Of a solve to 1e-10, kept in the cache."""
        file = CACHE / f"optimum-{self.problem.name.replace('/', '-')}.json"
        if not file.exists():
            limits = {"time_limit": REFERENCE_LIMIT, "max_iter": 10**9}
            solver = choose_solver(self.programme, tol=REFERENCE, **limits)
            solution = solver.solve(self.programme, self.alpha)
            found = [solution.objective, solution.relative_gap]
            file.write_text(json.dumps(found))
        optimum, gap = json.loads(file.read_text())
        return optimum, gap

    def suboptimality(self, V: np.ndarray) -> float:
        """Relative, of weights (p, d, c)."""
        return self.programme.objective(V, 0.0, self.alpha) / self.optimum - 1

    def about(self) -> Row:
        """The columns of the problem."""
        A = self.programme.operator
        return {
            "problem": self.problem.name,
            "group": self.problem.group,
            **{"n": A.n, "d": A.d, "gates": A.p, "outputs": self.programme.n_outputs},
            "penalty": self.problem.penalty,
            "ratio": self.problem.ratio,
            "alpha": self.alpha,
            "optimum": self.optimum,
            "optimum_gap": self.optimum_gap,
        }


def worker(name: str, folder: Path) -> Worker:
    """A solver's process, which does a small job first, so that it compiles outside all others."""
    if name == OURS:
        python, script, memory = sys.executable, "cvxdistill_auto.py", None
    else:
        python, script, memory = peers_python(), PEERS[name].script, MEMORY
    first = small_job(name, folder)
    return Worker(python, HERE / "peers" / script, THREADS, first=first, memory=memory)


def small_job(name: str, folder: Path) -> Row:
    """A solver's job of 60 examples and 12 gates, with its files in ``folder``.

    Ours ends by itself, and must not end before all is compiled.
    """
    rng = np.random.default_rng(0)
    X, G = rng.standard_normal((60, 4)), rng.standard_normal((4, 12))
    file = folder / "first.npz"
    np.savez(file, X=X, Y=rng.standard_normal((60, 1)), D=X @ G >= 0, G=G)
    return {
        **{"data": str(file), "result": str(file.with_name("first-result")), "alpha": 0.05},
        **{"alphas": [0.05], "groups": 4, "loss": "squared", "intercept": False},
        **{"penalty": "neuron", "targets": [0.0], "tol": 1e-6, "pilot": 0.1, "threads": THREADS},
        **{"time_limit": LIMIT if name == OURS else 1.0},
        **(dict(PEERS[name].settings) if name in PEERS else {}),
    }


class Field:
    """All solvers, each in a process of its own."""

    def __init__(self, names: list[str], limit: float, repeats: int, stack: ExitStack):
        self.limit, self.repeats = limit, repeats
        folder = own_folder()
        self.workers = {name: stack.enter_context(worker(name, folder)) for name in (OURS, *names)}

    def ours(self, measured: Measured, tol: float) -> Row:
        """Ours, to a certified gap; ``good`` says whether it is that good, within the limit."""
        answer = self.workers[OURS](
            **self._job(measured), tol=tol, penalty=measured.problem.penalty
        )
        with np.load(measured.result) as file:
            answer["suboptimality"] = measured.suboptimality(file["V"])
        answer["good"] = (
            max(answer["relative_gap"], answer["suboptimality"]) <= tol
            and answer["seconds"] <= self.limit
        )
        if not answer["good"]:
            answer["seconds"] = self.limit
        return answer

    def _job(self, measured: Measured) -> Row:
        return {
            "data": str(measured.file),
            "result": str(measured.result),
            "alpha": measured.alpha,
            "time_limit": self.limit,
            "pilot": PILOT * self.limit,
            "threads": THREADS,
        }

    def oracle(self, name: str, measured: Measured) -> dict[float, Row]:
        """A peer that an oracle stops: seconds for each target."""
        targets = [(1 + target) * measured.optimum for target in TARGETS]
        patience = self.limit * (1 + len(RATES) * PILOT) + GRACE
        answer = self.workers[name](
            patience, **self._job(measured), targets=targets, **dict(PEERS[name].settings)
        )
        with np.load(measured.result) as file:
            V = same_order(file["V"], file["D"], measured.data["D"])
        reached = [target for target, s in zip(TARGETS, answer["seconds"], strict=True) if s]
        if reached and measured.suboptimality(V) > min(reached) * 1.001:
            raise RuntimeError(f"{name}'s objective on {measured.problem.name} is not ours.")
        return {
            target: {**answer, "seconds": seconds}
            for target, seconds in zip(TARGETS, answer["seconds"], strict=True)
            if seconds is not None
        }

    def at_tolerance(self, name: str, measured: Measured, tol: float) -> Row:
        """A peer that stops by itself, output after output if these are separate."""
        data, programme = measured.data, measured.programme
        c, penalty = programme.n_outputs, measured.problem.penalty
        parts = [slice(None)] if penalty == "gate" else [slice(k, k + 1) for k in range(c)]
        V, part = np.zeros(programme.weights_shape), own_folder() / "part.npy"
        answer: Row = {"seconds": 0.0, "peak_growth": 0}
        for columns in parts:
            file = measured.file
            if len(parts) > 1:
                file = part.with_suffix(".npz")
                np.savez(file, X=data["X"], Y=data["Y"][:, columns], D=data["D"])
            job = self._job(measured) | {"data": str(file), "result": str(part)}
            job |= {"alphas": [measured.alpha], "groups": data["X"].shape[1], "loss": "squared"}
            left = self.limit - answer["seconds"]
            found = self.workers[name](left + GRACE, **job, intercept=False, tol=tol)
            answer["seconds"] += found["seconds"]
            answer["peak_growth"] = max(answer["peak_growth"], found["peak_growth"] or 0)
            answer["versions"] = found["versions"]
            if answer["seconds"] > self.limit:
                raise TimeoutError
            coef = np.load(part)[-1]
            V[:, :, columns] = coef.reshape(*V.shape[:2], -1)
        answer["suboptimality"] = measured.suboptimality(V)
        return answer

    def climb(self, name: str, measured: Measured) -> dict[float, Row]:
        """The loosest tolerance for each target; late or dead at a tighter one, it keeps others."""
        found: dict[float, Row] = {}
        for tol in PEERS[name].ladder:
            try:
                answer = self.at_tolerance(name, measured, tol) | {"tolerance": tol}
            except (TimeoutError, MemoryError):
                if found:
                    break
                raise
            for target in TARGETS:
                if target not in found and answer["suboptimality"] <= target:
                    found[target] = answer
            if len(found) == len(TARGETS):
                break
        return found


def our_row(field: Field, measured: Measured) -> Row:
    """Ours alone: seconds to each target and to the certificate."""
    row = measured.about() | {"solver": OURS}
    for tol in (*TARGETS, CERTIFIED):
        answers = [field.ours(measured, tol)]
        while answers[0]["seconds"] < REPEAT_BELOW and len(answers) < field.repeats:
            answers.append(field.ours(measured, tol))
        good = all(answer["good"] for answer in answers)
        row[f"to {tol:g}"] = median(a["seconds"] for a in answers) if good else field.limit
        row[f"reached {tol:g}"] = good
    growth = max(answer["peak_growth"] or 0 for answer in answers)
    return row | {
        "relative_gap": answers[0]["relative_gap"],
        "how": answers[0]["solver"],
        "peak_growth": growth,
        "versions": answers[0]["versions"],
    }


def peer_row(field: Field, measured: Measured, name: str) -> Row:
    """A peer beside ours."""
    row = measured.about() | {"solver": name}
    oracle = not PEERS[name].ladder
    found: dict[float, Row] = {}
    why = "time"
    try:
        found = (field.oracle if oracle else field.climb)(name, measured)
    except TimeoutError:
        pass
    except MemoryError:
        why = "memory"
    for target in TARGETS:
        ours = [field.ours(measured, target)["seconds"]]
        row[f"reached {target:g}"] = target in found
        if target not in found:
            row |= {f"to {target:g}": field.limit, f"ours to {target:g}": ours[0], "why": why}
            continue
        theirs = [found[target]["seconds"]]
        while max(theirs[0], ours[0]) < REPEAT_BELOW and len(theirs) < field.repeats:
            if oracle:
                again = field.oracle(name, measured).get(target, {"seconds": field.limit})
            else:
                again = field.at_tolerance(name, measured, found[target]["tolerance"])
            theirs.append(again["seconds"])
            ours.append(field.ours(measured, target)["seconds"])
        row[f"to {target:g}"], row[f"ours to {target:g}"] = median(theirs), median(ours)
        row["how"] = " ".join(
            str(found[target][key]) for key in ("tolerance", "rate") if key in found[target]
        )
        row["peak_growth"] = found[target]["peak_growth"]
        row["versions"] = found[target]["versions"]
    return row


def rows_left(
    wanted: list[SuiteProblem],
    solvers: list[str],
    done: set[tuple[str, str]],
    limit: float,
    repeats: int,
) -> Iterator[Row]:
    """Rows that are not done yet, problem after problem."""
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, own_folder(), ignore_errors=True)
        field = Field([name for name in solvers if name != OURS], limit, repeats, stack)
        for problem in wanted:
            left = [
                name
                for name in solvers
                if (problem.name, name) not in done and (name == OURS or takes(name, problem))
            ]
            if not left:
                continue
            measured = Measured(problem)
            for name in left:
                if name == OURS:
                    yield our_row(field, measured)
                else:
                    yield peer_row(field, measured, name)


def read_rows(file: Path) -> list[Row]:
    """What is done, by whatever runs."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def describe(row: Row) -> str:
    """One line of a row."""
    times = [f"{key[3:]} {row[key]:.3g} s" for key in row if key.startswith("to ")]
    missed = [key[8:] for key in row if key.startswith("reached ") and not row[key]]
    return f"{row['problem']}, {row['solver']}: {', '.join(times)}" + (
        f"; not reached: {', '.join(missed)}" if missed else ""
    )


@click.command()
@click.option("--problems", "begins", multiple=True, help="Only those whose names begin so.")
@click.option(
    "--solvers",
    "chosen",
    multiple=True,
    type=click.Choice([OURS, *PEERS]),
    help="Only these; all by default.",
)
@click.option("--limit", default=LIMIT, show_default=True, type=click.FloatRange(0, math.inf))
@click.option("--quick", is_flag=True, help="Small tables, into bench/.cache.")
@click.option("--report", "only_report", is_flag=True, help="Run nothing.")
def main(
    begins: tuple[str, ...],
    chosen: tuple[str, ...],
    limit: float,
    quick: bool,
    only_report: bool,
) -> None:
    """Measure what is not in the table yet, and draw all that is."""
    CACHE.mkdir(parents=True, exist_ok=True)
    RESULTS.parent.mkdir(exist_ok=True)
    begins = begins or (QUICK if quick else ("",))
    wanted = [problem for name, problem in problems().items() if name.startswith(begins)]
    if not wanted:
        raise click.BadParameter(f"no problem's name begins with one of {begins}.")
    output = CACHE / "quick" if quick else RESULTS
    limit = min(limit, QUICK_LIMIT) if quick else limit
    file = output.with_suffix(".jsonl")
    if quick and not only_report:
        file.unlink(missing_ok=True)
    print(f"{describe_machine('numpy', 'numba', 'cvxdistill')}, {THREADS} thread", flush=True)
    if not only_report:
        done = {(row["problem"], row["solver"]) for row in read_rows(file)}
        for row in rows_left(
            wanted, list(chosen or (OURS, *PEERS)), done, limit, 1 if quick else REPEATS
        ):
            with file.open("a") as stream:
                stream.write(json.dumps(row, default=float) + "\n")
            print(describe(row), flush=True)
    table = pd.DataFrame(read_rows(file))
    order = {name: place for place, name in enumerate(problems())}
    table = table.sort_values("problem", key=lambda names: names.map(order), kind="stable")
    table.to_csv(output.with_suffix(".csv"), index=False, float_format="%.6g")
    print(report(table, OURS, TARGETS, CERTIFIED))
    draw_profile(table, OURS, TARGETS, output.with_name(f"{output.name}_profile.png"))
    draw_growth(table, TARGETS[0], output.with_name(f"{output.name}_growth.png"))


if __name__ == "__main__":
    main()
