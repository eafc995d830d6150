"""The command line: ``cvxdistill demo``, ``inspect``, ``distill`` and ``compress``.

torch and the adapters are imported inside the commands, so that ``--help`` is quick and works
without them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cvxdistill.atomic_files import check_parent, replacing

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

# What the extra "torch" installs, by the names that an ImportError gives.
TORCH_EXTRA = {"torch", "safetensors", "PIL"}
BATCH_SIZE = 250


class _Refusal(click.ClickException):
    """The message of an error, on one line."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class _OneLineErrors(click.Group):
    """A group whose commands end in one line and exit code 2 where the library refuses."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except ImportError as error:
            if (error.name or "").partition(".")[0] in TORCH_EXTRA:
                raise _Refusal(
                    f'this command needs {error.name}: pip install "cvxdistill[torch]"'
                ) from error
            raise _Refusal(str(error)) from error
        except (ValueError, TypeError, OSError) as error:
            raise _Refusal(str(error)) from error


class _Numbers(click.ParamType):
    """Numbers with commas between them."""

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.kind = kind
        self.name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        if not isinstance(value, str):
            return value
        try:
            numbers = tuple(self.kind(part) for part in value.split(","))
        except ValueError:
            kind = "whole numbers" if self.kind is int else "numbers"
            self.fail(f"{value!r} is not {kind} with commas between them.", param, ctx)
        if self.kind is int and min(numbers) < 1:
            self.fail(f"{value!r} holds a number below 1.", param, ctx)
        return numbers


def _data_options(command: Any) -> Any:
    """Add the options that say how to read inputs."""
    for option in (
        click.option("--key", help="Name of the inputs in a .npz file."),
        click.option("--size", type=click.IntRange(min=1), help="Resize images to this square."),
        click.option("--std", type=_Numbers(float), help="Divide each channel by these."),
        click.option("--mean", type=_Numbers(float), help="Subtract these from each channel."),
    ):
        command = option(command)
    return command


_MODEL = click.argument("model")
_DATA = click.option(
    "--data", metavar="PATH", required=True, help="Inputs: .npy, .npz or a folder of images."
)
_LIMIT = click.option("--limit", type=click.IntRange(min=1), help="Use at most so many inputs.")
_QUIET = click.option("--quiet", is_flag=True, help="No progress, only the result.")
_HTML = click.option(
    "--html",
    metavar="FILE",
    help="Also write a page with tables, pictures and latencies to this file.",
)
_WEIGHTS = click.option(
    "--weights", metavar="FILE", help="A state_dict: .safetensors, or a file of torch.save."
)


@click.group(cls=_OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cvxdistill", prog_name="cvxdistill")
def main() -> None:
    """Make a trained network smaller, without labels: fit convex students to its blocks."""


@main.command()
@click.option(
    "--output",
    metavar="DIR",
    default="cvxdistill-demo",
    show_default=True,
    help="Folder for the picture and the table.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--quiet", is_flag=True, help="Print the final table only.")
def demo(output: str, seed: int, quiet: bool) -> None:
    """Train a small network on handwritten digits, then replace its heaviest block."""
    from cvxdistill.demonstration import run_demonstration

    run_demonstration(output, random_state=seed, quiet=quiet, say=click.echo)


@main.command("inspect")
@_MODEL
@_WEIGHTS
@click.option("--input-shape", type=_Numbers(int), help="Shape of one input, such as 3,32,32.")
@click.option("--data", metavar="PATH", help="Inputs instead: .npy, .npz or a folder of images.")
@_data_options
@click.option("--depth", type=click.IntRange(min=1), help="Show blocks down to this depth only.")
@click.option("--csv", "csv_file", metavar="FILE", help="Also write the table to this file.")
def inspect_command(
    model: str,
    weights: str | None,
    input_shape: tuple[int, ...] | None,
    data: str | None,
    depth: int | None,
    csv_file: str | None,
    **reading: Any,
) -> None:
    """Show the blocks of MODEL: shapes, parameters, multiply-adds.

    MODEL is package.module:factory or path/file.py:factory.
    """
    if (input_shape is None) == (data is None):
        raise click.UsageError("give exactly one of --input-shape and --data.")
    if csv_file is not None:
        check_parent(csv_file, "--csv")
    import numpy as np

    from cvxdistill.adapters.data_loading import load_images_or_array
    from cvxdistill.adapters.model_loading import load_model
    from cvxdistill.inspection import inspect

    module = load_model(model, weights)
    if data is not None:
        example = load_images_or_array(data, limit=1, **reading).inputs
    else:
        example = np.zeros((1, *(input_shape or ())), dtype=np.float32)
    _check_runs(module, example)
    table = inspect(module, example, depth=depth)
    click.echo(str(table))
    if csv_file is not None:
        with replacing(csv_file) as temporary:
            table.to_frame().to_csv(temporary)
        click.echo(f"table: {csv_file}")


@main.command()
@_MODEL
@click.argument("block")
@_DATA
@_WEIGHTS
@_data_options
@_LIMIT
@click.option("--student", type=click.Choice(["auto", "linear", "gated"]))
@click.option("--gates", type=click.Choice(["auto", "teacher", "gaussian"]))
@click.option("--n-gates", type=click.IntRange(min=1), help="How many gates to start from.")
@click.option("--alpha", type=float, help="Regularisation; left out, it is chosen.")
@click.option("--n-neurons", type=click.IntRange(min=1), help="Hidden units at most.")
@click.option(
    "--polish",
    type=click.Choice(["group_elastic_net"]),
    help="Drop hidden units where that costs no held-out error.",
)
@click.option(
    "--max-neurons", type=click.IntRange(min=1), help="With --polish: hidden units at most."
)
@click.option("--kernel-size", type=click.IntRange(min=1), help="Of a convolutional student.")
@click.option("--max-rows", type=click.IntRange(min=1), help="Fit to so many patches at most.")
@click.option("--seed", "random_state", type=click.IntRange(min=0), help="For gates and samples.")
@click.option(
    "--output",
    metavar="FILE",
    default="student.safetensors",
    show_default=True,
    help="Where to save the student.",
)
@click.option("--report", metavar="FILE", help="Also write the report, as CSV, to this file.")
@_HTML
@_QUIET
def distill(
    model: str,
    block: str,
    data: str,
    weights: str | None,
    key: str | None,
    size: int | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    limit: int | None,
    output: str,
    report: str | None,
    html: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Fit a small student to BLOCK of MODEL and save it.

    MODEL is package.module:factory or path/file.py:factory, BLOCK a dotted name that inspect shows,
    or a span of blocks that run one after the other, first:last, such as layer3:layer4: the student
    takes the first one's place, and the others become identities.
    Labels in the data serve only to measure the accuracy before and after.
    """
    _check_files({"--output": output, "--report": report, "--html": html})
    from cvxdistill.adapters.data_loading import load_images_or_array
    from cvxdistill.adapters.model_loading import load_model
    from cvxdistill.distillation import distill

    module = load_model(model, weights)
    inputs, labels = load_images_or_array(data, key=key, size=size, mean=mean, std=std, limit=limit)
    _check_runs(module, inputs[:1])
    # What was not given is left to the defaults of distill.
    given = {name: value for name, value in options.items() if value is not None}
    result = distill(module, block, inputs, verbose=0 if quiet else 1, **given)
    click.echo(str(result.report))
    _say_accuracies(module, result.model, inputs, labels)
    if report is not None:
        with replacing(report) as temporary:
            result.report.to_frame().to_csv(temporary)
        click.echo(f"report: {report}")
    if html is not None:
        result.report.to_html(html, verbose=0 if quiet else 1)
        click.echo(f"page: {html}")
    result.save(output)
    click.echo(f"student: {output}")


@main.command()
@_MODEL
@_DATA
@_WEIGHTS
@_data_options
@_LIMIT
@click.option("--max-parameters", type=click.IntRange(min=1), help="Numbers of the whole.")
@click.option("--max-bytes", type=click.IntRange(min=1), help="Bytes of the whole.")
@click.option("--max-error", type=float, help="Of the criterion, held out.")
@click.option(
    "--criterion",
    type=click.Choice(["output", "agreement"]),
    help="What counts: all of the output, or only which entry of it is the largest.",
)
@click.option("--sparse", is_flag=True, help="Students of few weights, too: smaller files.")
@click.option("--blocks", help="Only these, with commas between; spans as first:last.")
@click.option("--seed", "random_state", type=click.IntRange(min=0), help="For samples.")
@click.option(
    "--output",
    metavar="FILE",
    default="compressed.safetensors",
    show_default=True,
    help="Where to save the compressed model.",
)
@click.option("--frontier", metavar="FILE", help="Also draw size against error, to this PNG.")
@_HTML
@_QUIET
def compress(
    model: str,
    data: str,
    weights: str | None,
    key: str | None,
    size: int | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    limit: int | None,
    blocks: str | None,
    output: str,
    frontier: str | None,
    html: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Make the whole of MODEL fit a budget and save it.

    MODEL is package.module:factory or path/file.py:factory. Give one of --max-parameters,
    --max-bytes and --max-error. cvxdistill.load_compressed(factory(), FILE) reads the result.
    Labels in the data serve only to measure the accuracy before and after.
    """
    _check_files({"--output": output, "--frontier": frontier, "--html": html})
    from cvxdistill.adapters.data_loading import load_images_or_array
    from cvxdistill.adapters.model_loading import load_model
    from cvxdistill.compression import compress

    module = load_model(model, weights)
    inputs, labels = load_images_or_array(data, key=key, size=size, mean=mean, std=std, limit=limit)
    _check_runs(module, inputs[:1])
    given = {name: value for name, value in options.items() if value is not None}
    if blocks is not None:
        given["blocks"] = [name.strip() for name in blocks.split(",")]
    result = compress(module, inputs, verbose=0 if quiet else 1, **given)
    click.echo(str(result))
    _say_accuracies(module, result.model, inputs, labels)
    if frontier is not None:
        import matplotlib

        matplotlib.use("Agg")
        ax = result.plot_frontier()
        with replacing(frontier) as temporary:
            ax.figure.savefig(temporary, format="png", dpi=110)
        click.echo(f"frontier: {frontier}")
    if html is not None:
        result.to_html(html, verbose=0 if quiet else 1)
        click.echo(f"page: {html}")
    result.save(output)
    click.echo(f"model: {output}")


def _check_files(files: dict[str, str | None]) -> None:
    """Refuse files that cannot be written, or of which two are one, before any work."""
    known: dict[Path, str] = {}
    for option, file in files.items():
        if file is not None:
            first = known.setdefault(check_parent(file, option).resolve(), option)
            if first != option:
                raise ValueError(f"{first} and {option} both name {file}.")
    if files["--html"] is not None:
        from cvxdistill.html_pictures import check_matplotlib

        check_matplotlib()


def _say_accuracies(
    module: nn.Module, smaller: nn.Module, inputs: np.ndarray, labels: np.ndarray | None
) -> None:
    if labels is not None:
        before = _accuracy(module, inputs, labels)
        after = _accuracy(smaller, inputs, labels)
        if before is None or after is None:
            click.echo("accuracy: not measured, because the labels are not one class an output row")
        else:
            click.echo(f"accuracy on these {len(inputs):,} inputs: {before:.2%} -> {after:.2%}")


def _run(model: nn.Module, inputs: np.ndarray) -> Any:
    import torch

    parameter = next(model.parameters(), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    with torch.no_grad():
        return model(torch.from_numpy(inputs).to(dtype))


def _check_runs(model: nn.Module, example: np.ndarray) -> None:
    """Raise ValueError if the model cannot be called with the example."""
    try:
        _run(model, example)
    # Whatever the user's code raises: what matters is that it cannot take this input.
    except Exception as error:
        raise ValueError(
            f"the model fails on one input of shape {example.shape[1:]}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _accuracy(model: nn.Module, inputs: np.ndarray, labels: np.ndarray) -> float | None:
    """Share of inputs whose largest output is their label; None if these are no classes."""
    right = 0
    for start in range(0, len(inputs), BATCH_SIZE):
        wanted = labels[start : start + BATCH_SIZE]
        output = _run(model, inputs[start : start + BATCH_SIZE])
        shape = getattr(output, "shape", ())
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(shape) != 2:
            return None
        right += int((output.argmax(dim=1).numpy() == wanted).sum())
    return right / len(inputs)
