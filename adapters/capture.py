"""Record what one block of a model takes and gives, over a stream of batches.

The model runs in eval mode and without gradients, and only as far as the block: nothing after it
is computed. What is recorded lies in memory up to a limit and on disk, memory-mapped, beyond it.
``activation_store.py`` keeps the arrays, ``batches.py`` reads the batches, ``token_mask.py`` leaves
padding out.
"""

from __future__ import annotations

import warnings
import weakref
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cvxdistill.adapters.activation_store import ActivationStore
from cvxdistill.adapters.batches import (
    Batch,
    check_data,
    count_batches,
    iterate_batches,
    run_model,
    start_of,
)
from cvxdistill.adapters.call_count import count_calls
from cvxdistill.adapters.call_structure import Structure, main_input
from cvxdistill.adapters.layout import ConvLayout, DenseLayout, infer_layout
from cvxdistill.adapters.module_tree import (
    check_model,
    check_swappable,
    evaluating,
    get_block,
    is_span,
)
from cvxdistill.adapters.span_search import search_span
from cvxdistill.adapters.spans import Span
from cvxdistill.adapters.token_mask import TokenMask


class _BlockReachedError(BaseException):
    """Raised by the block's hook to leave the model: no ``except Exception`` may stop it."""


class Capture:
    """Recorded inputs and outputs of a block; a context manager that removes its files at the end.

    Attributes
    ----------
    inputs : ndarray or memmap, float32, of shape (N, ...)
    outputs : ndarray or memmap, float32, of shape (N, ...)
        Of shapes (n, d) and (n, c), one row a token, where a mask was given or the number of tokens
        differed between batches.
    block : str
        The block's name.
    span : Span
        The blocks that a student replaces, for ``swap_block``.
    n_examples : int
    tokens : ndarray of int of shape (n_examples,) or None
        How many rows each example has, one after the other, where one row is a token.
    dtypes : (torch.dtype, torch.dtype)
        What the block took and gave; other dtypes than float32 were converted.
    example : Tensor or dict
        The first two examples of the data, as the model is called with them.
    on_disk : bool
        Whether the arrays are memory maps of files in a temporary folder. The folder is removed by
        ``close()``, at the end of a ``with`` block, with the object, or when Python exits.
    """

    def __init__(
        self,
        block: str,
        store: ActivationStore,
        dtypes: tuple[torch.dtype, torch.dtype],
        span: Span,
        tokens: np.ndarray | None,
        example: Batch | None = None,
    ) -> None:
        self.block, self.dtypes, self.span, self.tokens = block, dtypes, span, tokens
        self.example = example
        self._arrays: tuple[np.ndarray, ...] = store.finish()
        self.on_disk = store.on_disk
        # A memory map that outlives this object stays readable, but its file is gone.
        self._finalizer = weakref.finalize(self, store.close)

    @property
    def inputs(self) -> np.ndarray:
        """What the block took, float32 (N, ...)."""
        return self._get(0)

    @property
    def outputs(self) -> np.ndarray:
        """What the block gave, float32 (N, ...)."""
        return self._get(1)

    @property
    def n_examples(self) -> int:
        """Examples that were recorded; without ``tokens`` as many as rows."""
        return len(self) if self.tokens is None else len(self.tokens)

    def layout(self, **options: Any) -> ConvLayout | DenseLayout:
        """Return the layout of these activations; see ``infer_layout`` for options and errors."""
        shapes = self.inputs.shape[1:], self.outputs.shape[1:]
        layout = infer_layout(*shapes, **options)
        return layout if self.tokens is None else DenseLayout(*shapes, per_position=True)

    def _get(self, which: int) -> np.ndarray:
        if not self._arrays:
            raise ValueError("this capture is closed: its activations are gone.")
        return self._arrays[which]

    def __len__(self) -> int:
        return len(self.inputs)

    def __repr__(self) -> str:
        if not self._arrays:
            return f"Capture({self.block!r}, closed)"
        where = "on disk" if self.on_disk else "in memory"
        return (
            f"Capture({self.block!r}, inputs={self.inputs.shape}, outputs={self.outputs.shape}, "
            f"{where})"
        )

    def close(self) -> None:
        """Let go of the arrays and remove the temporary folder, if there is one."""
        self._arrays = ()
        self._finalizer()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Recorder:
    """The block's hooks: hold its input and output of the running batch, then leave the model."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.input: Tensor | None = None
        self.output: Tensor | None = None
        self.structure = Structure()
        self.dtypes = (torch.float32, torch.float32)
        self.caches = False

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            tensor = main_input(args, kwargs)
        except ValueError as error:
            raise ValueError(f"block {self.name!r} must take {error}.") from None
        self.caches = any(_is_cache(value) for value in (*args, *kwargs.values()))
        self.dtypes = (tensor.dtype, self.dtypes[1])
        # A copy, because the block may change its input in place.
        self.input = _to_record(tensor)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        try:
            tensor, self.structure = Structure.split(output)
        except ValueError as error:
            raise ValueError(f"the output of block {self.name!r} must be {error}.") from None
        self.dtypes = (self.dtypes[0], tensor.dtype)
        self.output = _to_record(tensor)
        raise _BlockReachedError

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Hand over what the last run recorded, if it reached the block."""
        pair, self.input, self.output = (self.input, self.output), None, None
        return None if pair[0] is None or pair[1] is None else (pair[0], pair[1])


def _is_cache(value: Any) -> bool:
    """Whether this is a cache of keys and values, which a block writes to, as transformers'."""
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


def _to_record(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()


def capture(
    model: nn.Module,
    block: str,
    data: Any,
    *,
    mask: Any = "auto",
    batch_size: int = 256,
    max_examples: int | None = None,
    memory_limit: int = 2 * 2**30,
    verbose: int = 1,
) -> Capture:
    """Run ``model`` over ``data`` and record the inputs and outputs of one block.

    The model is left as it was: training flags and hooks are restored, batch norm statistics do not
    move, also when something fails. Batches go to the model's device, floating ones to its dtype.
    Activations of other dtypes are recorded as float32.

    What is recorded is the block's first floating tensor, by position or by name, and the tensor
    that it returns, alone, in a tuple or in a dataclass. Masks, positions and flags beside the
    input reach the block as ever and are not recorded.

    Parameters
    ----------
    model : torch.nn.Module
    block : str
        Dotted name of the block, which maps one tensor to one; or a span, ``"layer3:layer4"``: from
        the input of the first to the output of the last, which run one after the other. A span is
        checked on the first batch, as ``find_span`` does.
    data : DataLoader, iterable of batches, tensor, ndarray or dict
        A batch is a tensor, an array, a tuple or list whose first item is the input (labels are
        ignored), or a dict for ``model(**batch)``, without its "labels". One tensor or array, or
        one dict of them, is split into batches.
    mask : "auto", None, str, callable, tensor or ndarray, default "auto"
        Which tokens (N, T) of a block that maps (N, T, d) to (N, T, c) to record: those that are
        not 0. "auto": the "attention_mask" of batches that are dicts, where it has that shape;
        another key of theirs; a function of the batch; an array (n_examples, T) for data that are
        one tensor or dict; None: all tokens.
    batch_size : int, default 256
        For splitting one tensor, array or dict.
    max_examples : int, optional
        Stop after this many examples; a sequence of tokens is one.
    memory_limit : int, default 2 GiB
        Bytes of recorded activations, inputs and outputs together, to hold in memory. Beyond,
        all of them go to memory-mapped files in a temporary folder.
    verbose : int, default 1
        0 shows no progress bar.

    Returns
    -------
    Capture

    Raises
    ------
    ValueError
        If there are no data, the block does not exist, is not called or called more than once,
        does not map one tensor to one tensor with the same number of examples, or gives NaN or
        infinity, if shapes change between batches (but for the number of tokens), if a mask does
        not fit, or if a span's blocks do not run one after the other.
    TypeError
        If ``model`` is not a module or ``data`` holds no batches.
    """
    target = get_block(check_model(model), block)
    spanning = is_span(model, block)
    if spanning:
        check_swappable(model, block)
    check_data(data)
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("max_examples", 1 if max_examples is None else max_examples, 1),
        ("memory_limit", memory_limit, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} must be an integer, got {value!r}.")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    masks = TokenMask(mask, data)

    recorder = _Recorder(block)
    record = _Record(block, memory_limit)
    span = Span(block, block)
    example: Batch | None = None
    handles = []
    progress = tqdm(
        total=count_batches(data, batch_size),
        desc=f"capture {block}",
        unit="batch",
        disable=not verbose,
    )
    try:
        with evaluating(model), progress:
            for number, batch in enumerate(iterate_batches(data, model, batch_size)):
                if number == 0:
                    example = start_of(batch)
                    first = last = target
                    if spanning:
                        span = search_span(model, block, batch)
                        first, last = get_block(model, span.first), get_block(model, span.last)
                    else:
                        _check_one_call(model, block, batch)
                    handles += [
                        first.register_forward_pre_hook(recorder.before, with_kwargs=True),
                        last.register_forward_hook(recorder.after),
                    ]
                with suppress(_BlockReachedError):
                    run_model(model, batch)
                pair = recorder.take()
                if pair is None:
                    raise ValueError(
                        f"block {block!r} was not called when the model ran on batch {number}."
                    )
                _check_examples(block, number, *pair)
                keep = masks.of(block, number, batch, record.n_examples, pair)
                left = None if max_examples is None else max_examples - record.n_examples
                keep = None if keep is None else keep[:left]
                record.add(number, pair[0][:left], pair[1][:left], keep)
                progress.update()
                if record.n_examples == max_examples:
                    break
        if not spanning and recorder.structure.key is not None:
            span = Span(block, block, structures={block: recorder.structure})
        if recorder.caches:
            warnings.warn(
                f"block {block!r} writes to a cache of keys and values, which a student does not: "
                "generate with use_cache=False once it is replaced.",
                stacklevel=2,
            )
        return record.finish(recorder.dtypes, span, example)
    except BaseException:
        record.store.close()
        raise
    finally:
        for handle in handles:
            handle.remove()


class _Record:
    """What was recorded so far: examples, or from a mask or change of length on, their tokens."""

    def __init__(self, block: str, memory_limit: int) -> None:
        self.block = block
        self.store = ActivationStore(2, memory_limit)
        self.n_examples = 0
        self._shapes: tuple[torch.Size, torch.Size] | None = None
        # The recorded tokens of each example of each batch; None while a row is an example.
        self._tokens: list[np.ndarray] | None = None

    def add(self, number: int, input: Tensor, output: Tensor, keep: Tensor | None) -> None:
        """Take one batch, of whose tokens those that ``keep`` (N, T) names, if any."""
        shapes = input.shape[1:], output.shape[1:]
        self._shapes = self._shapes or shapes
        other_length = _per_token(*shapes) and _per_token(*self._shapes) and shapes != self._shapes
        if self._tokens is None and (keep is not None or other_length):
            self._tokens = []
            if self.n_examples:
                self._tokens.append(np.full(self.n_examples, self._shapes[0][0]))
                self.store.split_rows()
        self.n_examples += len(input)
        if self._tokens is not None and _per_token(*shapes):
            keep = torch.ones(input.shape[:2], dtype=torch.bool) if keep is None else keep
            self._tokens.append(keep.sum(dim=1).numpy())
            input, output = input[keep], output[keep]
        for side, tensor in (("input", input), ("output", output)):
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"the {side} of block {self.block!r} contains NaN or infinity in batch "
                    f"{number} (counted from 0)."
                )
        self.store.append(input.numpy(), output.numpy())

    def finish(
        self, dtypes: tuple[torch.dtype, torch.dtype], span: Span, example: Batch | None
    ) -> Capture:
        """Return the whole."""
        if not self.n_examples:
            raise ValueError("data holds no examples: it must yield at least one batch.")
        tokens = None if self._tokens is None else np.concatenate(self._tokens)
        if tokens is not None and not tokens.any():
            raise ValueError("the mask keeps no token of the data: it must be 1 for some.")
        return Capture(self.block, self.store, dtypes, span, tokens, example)


def _per_token(input_shape: torch.Size, output_shape: torch.Size) -> bool:
    """Whether examples are (T, d) and (T, c)."""
    return len(input_shape) == len(output_shape) == 2 and input_shape[0] == output_shape[0]


def _check_one_call(model: nn.Module, block: str, batch: Batch) -> None:
    calls = count_calls(model, block, batch)
    if calls is not None and calls > 1:
        raise ValueError(
            f"block {block!r} is called {calls} times in one forward pass; only a block that is "
            "called once can be recorded."
        )


def _check_examples(block: str, number: int, *pair: Tensor) -> None:
    """Refuse activations whose examples do not lie along axis 0."""
    if any(tensor.ndim == 0 for tensor in pair) or len(pair[0]) != len(pair[1]):
        raise ValueError(
            f"block {block!r} must keep its examples along axis 0, but maps "
            f"{tuple(pair[0].shape)} to {tuple(pair[1].shape)} in batch {number}."
        )
