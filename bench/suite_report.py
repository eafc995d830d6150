"""What the rows of ``bench/suite.py`` say: ratios, profiles, growth."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd


def geometric_mean(values: pd.Series) -> float:
    """exp of the mean of the logarithms; NaN of nothing."""
    return float(np.exp(np.log(values).mean()))


def ratios(table: pd.DataFrame, ours: str, target: float) -> pd.DataFrame:
    """A peer's seconds over ours beside it, a column for each and one for the best of them.

    Who did not get there, ours too, counts with the time limit.
    """
    column, beside = f"to {target:g}", f"ours to {target:g}"
    if beside not in table:
        return pd.DataFrame()
    theirs = table[table["solver"] != ours]
    theirs = theirs.assign(ratio=theirs[column] / theirs[beside])
    wide = theirs.pivot(index="problem", columns="solver", values="ratio")
    order = [name for name in table["solver"].unique() if name in wide]
    return wide[order].assign(best=wide.min(axis=1))


def summary(table: pd.DataFrame, ours: str, targets: tuple[float, ...]) -> pd.DataFrame:
    """A row for each peer and for the best of them on each problem, three columns for each target.

    Its seconds over ours in the geometric mean, on how many problems ours is slower, and how many
    it solved; and of how many in all.
    """
    columns: dict[str, pd.Series] = {}
    for target in targets:
        found = ratios(table, ours, target)
        reached = table.pivot(index="problem", columns="solver", values=f"reached {target:g}")
        reached = reached.reindex(columns=found.columns.drop("best"))
        solved = reached.eq(True).sum()
        solved["best"] = reached.eq(True).any(axis=1).sum()
        columns["problems"] = found.count()
        columns[f"{target:g}: times ours"] = found.apply(
            lambda ratio: geometric_mean(ratio.dropna())
        )
        columns[f"{target:g}: ours slower on"] = (found < 1).sum()
        columns[f"{target:g}: solved"] = solved
    return pd.DataFrame(columns)


def rst_table(frame: pd.DataFrame, index: str) -> str:
    """The frame as a simple table of reStructuredText, two digits where it is not of integers."""
    rows = zip(frame.index, *(frame[name] for name in frame), strict=True)
    cells = [[index, *frame.columns], *([name, *map(_cell, row)] for name, *row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = "  ".join("=" * width for width in widths)
    lines = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in cells
    ]
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def _cell(value: float) -> str:
    return f"{float(f'{value:.2g}'):,g}" if isinstance(value, float) else f"{value:,}"


def report(table: pd.DataFrame, ours: str, targets: tuple[float, ...], certified: float) -> str:
    """Tables of seconds, what is certified and the summary, for each group of problems."""
    lines = []
    for group, rows in table.groupby("group", sort=False):
        for target in targets:
            seconds = rows.pivot(index="problem", columns="solver", values=f"to {target:g}")
            order = [name for name in rows["solver"].unique() if name in seconds]
            lines += [f"{group}, seconds to a suboptimality of {target:g}:"]
            problems = rows["problem"].drop_duplicates()
            lines += [seconds.loc[problems, order].to_string(float_format="%.3g", na_rep=""), ""]
        done = rows[rows["solver"] == ours].set_index("problem")[f"reached {certified:g}"].eq(True)
        lines.append(
            f"{group}: {done.sum()} of {len(done)} problems certified to {certified:g}; others: "
            f"{', '.join(done.index[~done]) or 'none'}"
        )
        if rows["solver"].nunique() > 1:
            lines += ["", rst_table(summary(rows, ours, targets), f"{group}, beside {ours}"), ""]
    return "\n".join(lines)


def draw_profile(table: pd.DataFrame, ours: str, targets: tuple[float, ...], file: Path) -> None:
    """Share of the UCI problems that are solved within some seconds."""
    rows = table[table["group"] == "uci"]
    if rows.empty:
        return
    figure, axes = plt.subplots(
        1, len(targets), figsize=(5 * len(targets), 4), layout="constrained", sharey=True
    )
    for axis, target in zip(np.atleast_1d(axes), targets, strict=True):
        for name, of_one in rows.groupby("solver", sort=False):
            reached = of_one[f"reached {target:g}"].astype(bool)
            seconds = np.sort(of_one[f"to {target:g}"][reached])
            share = np.arange(len(seconds) + 1) / len(of_one)
            width = 2.5 if name == ours else 1.2
            label = f"{name} ({len(of_one)})"
            last = rows[f"to {target:g}"].max()
            places = np.r_[seconds, last]
            axis.step(places, share, where="pre", label=label, lw=width)
        axis.set(xscale="log", xlabel="seconds", title=f"to a relative suboptimality of {target:g}")
    np.atleast_1d(axes)[0].set(ylabel="share of problems solved", ylim=(0, 1.02))
    np.atleast_1d(axes)[-1].legend(fontsize=8, title="solver (problems)")
    figure.suptitle("gated ReLU programmes of 14 UCI tables")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def exponent(sizes: np.ndarray, seconds: np.ndarray) -> float:
    """b of seconds = a size^b, by least squares on the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def draw_growth(table: pd.DataFrame, target: float, file: Path) -> None:
    """Seconds and memory as one size grows, with the fitted exponents of what was reached."""
    rows = table[table["group"].str.startswith("growth")]
    if rows.empty:
        return
    groups = list(dict.fromkeys(rows["group"]))
    figure, axes = plt.subplots(
        2, len(groups), figsize=(3.6 * len(groups), 6.4), layout="constrained", squeeze=False
    )
    for column, group in zip(axes.T, groups, strict=True):
        here = rows[rows["group"] == group]
        here = here.assign(size=here["problem"].str.rsplit("/", n=1).str[-1].astype(float))
        for name, line in here.groupby("solver", sort=False):
            line = line[line[f"reached {target:g}"].astype(bool)].sort_values("size")
            measures = line[f"to {target:g}"], line["peak_growth"] / 2**20
            for axis, values in zip(column, measures, strict=True):
                good = values > 0
                if good.sum() < 2:
                    continue
                sizes, values = line["size"][good], values[good]
                b = exponent(sizes.to_numpy(), values.to_numpy())
                axis.plot(sizes, values, "o-", ms=4, label=f"{name}: {b:.2f}")
                axis.set(xscale="log", yscale="log", xlabel=group.rsplit(" ", 1)[-1])
        column[0].set(title=group)
        for axis in column:
            axis.legend(fontsize=7, title="exponent", title_fontsize=7)
    axes[0, 0].set_ylabel(f"seconds to {target:g}")
    axes[1, 0].set_ylabel("peak of memory above the start, MiB")
    figure.savefig(file, dpi=110)
    plt.close(figure)
