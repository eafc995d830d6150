"""``cvxdistill.inspect``: a table of a model's blocks, to choose what to distil."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    import pandas as pd

    from cvxdistill.adapters import BlockInfo

HEADINGS = ("block", "type", "input", "output", "parameters", "share", "multiply-adds", "calls")


def _shape(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "-"
    return " x ".join(map(str, shape)) or "scalar"


def block_cells(info: BlockInfo) -> tuple[str, ...]:
    """What stands below ``HEADINGS`` for one block, or for the whole model."""
    return (
        info.name or "total",
        info.type,
        _shape(info.input_shape),
        _shape(info.output_shape),
        f"{info.parameters:,}",
        f"{info.share:.1%}",
        f"{info.multiply_adds:,}",
        f"{info.calls:,}",
    )


class BlockTable(Sequence["BlockInfo"]):
    """The blocks of a model in tree order: iterable, indexed by name or position, printable.

    ``table["layer3:layer4"]`` is the sum of a span's blocks: those that the tree has between.

    Attributes
    ----------
    model : BlockInfo
        The model itself, with the totals.
    """

    def __init__(self, model: BlockInfo, blocks: Sequence[BlockInfo]) -> None:
        self.model = model
        self._blocks = tuple(blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[BlockInfo]:
        return iter(self._blocks)

    def __contains__(self, block: object) -> bool:
        return any(block in (info, info.name) for info in self._blocks)

    @overload
    def __getitem__(self, which: int | str) -> BlockInfo: ...
    @overload
    def __getitem__(self, which: slice) -> Sequence[BlockInfo]: ...
    def __getitem__(self, which: int | str | slice) -> BlockInfo | Sequence[BlockInfo]:
        if not isinstance(which, str):
            return self._blocks[which]
        known = {info.name: info for info in self._blocks}
        if which in known:
            return known[which]
        ends = which.split(":")
        if len(ends) == 2 and all(end in known for end in ends):
            return self._span(which, known)
        raise KeyError(f"{which!r} is not in the table; it has {list(known)}.")

    def _span(self, which: str, known: dict[str, BlockInfo]) -> BlockInfo:
        """The row of ``"first:last"``: the sums of its blocks, between by the order of the tree."""
        from cvxdistill.adapters import BlockInfo
        from cvxdistill.adapters.spans import span_of_tree

        blocks = [known[name] for name in span_of_tree(known, which).names]
        return BlockInfo(
            name=which,
            type="span",
            input_shape=blocks[0].input_shape,
            output_shape=blocks[-1].output_shape,
            parameters=sum(block.parameters for block in blocks),
            share=sum(block.share for block in blocks),
            multiply_adds=sum(block.multiply_adds for block in blocks),
            calls=max(block.calls for block in blocks),
        )

    def __str__(self) -> str:
        cells = [HEADINGS, *map(block_cells, (*self._blocks, self.model))]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 4 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])

    __repr__ = __str__

    def to_frame(self) -> pd.DataFrame:
        """Return the blocks as a pandas frame, one row a block, indexed by name.

        Raises
        ------
        ImportError
            If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_frame() needs pandas: pip install pandas") from error
        from cvxdistill.adapters import BlockInfo

        columns = [field.name for field in fields(BlockInfo)]
        frame = pd.DataFrame([asdict(info) for info in self._blocks], columns=columns)
        return frame.set_index("name")

    def heaviest(self, by: str = "parameters") -> str:
        """Return the name of the heaviest block that can sensibly be distilled.

        That is a block that is called once, maps one tensor to one tensor in shapes that a student
        can have, and has parameters, but not all of the model's. Of equals the outermost is taken.

        Parameters
        ----------
        by : {"parameters", "multiply_adds"}, default "parameters"

        Raises
        ------
        ValueError
            If there is no such block, or ``by`` is something else.
        """
        if by not in ("parameters", "multiply_adds"):
            raise ValueError(f"by must be 'parameters' or 'multiply_adds', got {by!r}.")
        candidates = [info for info in self._blocks if self._can_be_distilled(info)]
        if not candidates:
            raise ValueError(
                "the table has no block to distil: none is called once, maps one tensor to one "
                "tensor, and has some but not all of the model's parameters."
            )
        return max(candidates, key=lambda info: int(getattr(info, by))).name

    def _can_be_distilled(self, info: BlockInfo) -> bool:
        from cvxdistill.adapters import infer_layout

        if info.calls != 1 or not 0 < info.parameters < self.model.parameters:
            return False
        if not info.input_shape or not info.output_shape:
            return False
        try:
            infer_layout(info.input_shape, info.output_shape)
        except ValueError:
            return False
        return True


def inspect(model: Any, example: Any, *, depth: int | None = None) -> BlockTable:
    """Measure the blocks of a model in one forward pass.

    Parameters
    ----------
    model : torch.nn.Module
        Left as it was.
    example : tensor, ndarray, tuple, list or dict
        One batch of at least one example; labels, as in ``(x, y)``, are ignored.
    depth : int, optional
        Show blocks down to this depth only: 1 is the model's own children.

    Returns
    -------
    BlockTable
        For every named block that is called: type, shapes of one example, parameters, share of the
        model's, multiply-adds an example, calls. Only tensors' shapes are shown.

    Raises
    ------
    TypeError
        If ``model`` is not a module, ``example`` not a batch or ``depth`` not an integer.
    ValueError
        If ``example`` holds no examples or ``depth`` is below 1.

    Examples
    --------
    >>> table = inspect(model, images[:1])          # doctest: +SKIP
    >>> table["layer4"].share, table.heaviest()     # doctest: +SKIP
    """
    if depth is not None:
        if isinstance(depth, bool) or not isinstance(depth, int):
            raise TypeError(f"depth must be an integer or None, got {depth!r}.")
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}.")
    from cvxdistill.adapters import measure_blocks

    total, *blocks = measure_blocks(model, example)
    shown = [b for b in blocks if depth is None or b.name.count(".") < depth]
    return BlockTable(total, shown)
