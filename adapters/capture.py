"""Record what one block of a model takes and gives, over a stream of batches.

The model runs in eval mode and without gradients, and only as far as the block: nothing after it
is computed. What is recorded lies in memory up to a limit and on disk, memory-mapped, beyond it.
``activation_store.py`` keeps the arrays, ``batches.py`` reads the batches.
"""

from __future__ import annotations

import copy
import weakref
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cvxdistill.adapters.activation_store import ActivationStore
from cvxdistill.adapters.batches import Batch, check_data, count_batches, iterate_batches
from cvxdistill.adapters.module_tree import check_model, evaluating, get_block


class _BlockReachedError(BaseException):
    """Raised by the block's hook to leave the model: no ``except Exception`` may stop it."""


class Capture:
    """Recorded inputs and outputs of a block; a context manager that removes its files at the end.

    Attributes
    ----------
    inputs : ndarray or memmap, float32, of shape (N, ...)
    outputs : ndarray or memmap, float32, of shape (N, ...)
    block : str
        The block's name.
    dtypes : (torch.dtype, torch.dtype)
        What the block took and gave; other dtypes than float32 were converted.
    on_disk : bool
        Whether the arrays are memory maps of files in a temporary folder. The folder is removed by
        ``close()``, at the end of a ``with`` block, with the object, or when Python exits.
    """

    def __init__(
        self, block: str, store: ActivationStore, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> None:
        self.block, self.dtypes = block, dtypes
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
        self.dtypes = (torch.float32, torch.float32)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = [*args, *kwargs.values()]
        tensors = [value for value in values if isinstance(value, Tensor)]
        if len(tensors) != 1 or any(_holds_tensor(v) for v in values if v is not tensors[0]):
            kinds = ", ".join(type(value).__name__ for value in values) or "nothing"
            raise ValueError(
                f"block {self.name!r} must take exactly one tensor, but was called with: {kinds}."
            )
        self.dtypes = (tensors[0].dtype, self.dtypes[1])
        # A copy, because the block may change its input in place.
        self.input = _to_record(tensors[0])

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"the output of block {self.name!r} must be one tensor, got "
                f"{type(output).__name__}."
            )
        self.dtypes = (self.dtypes[0], output.dtype)
        self.output = _to_record(output)
        raise _BlockReachedError

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Hand over what the last run recorded, if it reached the block."""
        pair, self.input, self.output = (self.input, self.output), None, None
        return None if pair[0] is None or pair[1] is None else (pair[0], pair[1])


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_tensor(item) for item in value)
    return isinstance(value, Tensor)


def _to_record(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()


def _run(model: nn.Module, batch: Batch) -> None:
    if isinstance(batch, dict):
        model(**batch)
    else:
        model(batch)


def _count_calls(model: nn.Module, name: str, batch: Batch) -> int | None:
    """How often one forward pass calls the block; None where that cannot be told.

    Leaving the model at the block hides a second call. So the whole model runs once, without
    computing anything, as a copy on the meta device that has shapes but no numbers. A model whose
    path depends on numbers cannot run like that.
    """
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def without_numbers(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="meta")

    try:
        memo: dict[int, Any] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            ghost = without_numbers(tensor.detach())
            memo[id(tensor)] = (
                nn.Parameter(ghost, requires_grad=False)
                if isinstance(tensor, nn.Parameter)
                else ghost
            )
        shadow = copy.deepcopy(model, memo)
        # The user's own hooks must not see a run that has no numbers.
        for module in shadow.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        get_block(shadow, name).register_forward_pre_hook(count)
        ghosts: Batch = (
            {
                key: without_numbers(value) if isinstance(value, Tensor) else value
                for key, value in batch.items()
            }
            if isinstance(batch, dict)
            else without_numbers(batch)
        )
        _run(shadow, ghosts)
    except Exception:
        return None
    return calls


def capture(
    model: nn.Module,
    block: str,
    data: Any,
    *,
    batch_size: int = 256,
    max_examples: int | None = None,
    memory_limit: int = 2 * 2**30,
    verbose: int = 1,
) -> Capture:
    """Run ``model`` over ``data`` and record the inputs and outputs of one block.

    The model is left as it was: training flags and hooks are restored, batch norm statistics do not
    move, also when something fails. Batches go to the model's device, floating ones to its dtype.
    Activations of other dtypes are recorded as float32.

    Parameters
    ----------
    model : torch.nn.Module
    block : str
        Dotted name of the block, which takes and returns one tensor.
    data : DataLoader, iterable of batches, tensor or ndarray
        A batch is a tensor, an array, a tuple or list whose first item is the input (labels are
        ignored), or a dict for ``model(**batch)``, without its "labels". One tensor or array is
        split into batches.
    batch_size : int, default 256
        For splitting one tensor or array.
    max_examples : int, optional
        Stop after this many examples.
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
        infinity, or if shapes change between batches.
    TypeError
        If ``model`` is not a module or ``data`` holds no batches.
    """
    target = get_block(check_model(model), block)
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

    recorder = _Recorder(block)
    store = ActivationStore(2, memory_limit)
    seen = 0
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
                    calls = _count_calls(model, block, batch)
                    if calls is not None and calls > 1:
                        raise ValueError(
                            f"block {block!r} is called {calls} times in one forward pass; only a "
                            "block that is called once can be recorded."
                        )
                    handles += [
                        target.register_forward_pre_hook(recorder.before, with_kwargs=True),
                        target.register_forward_hook(recorder.after),
                    ]
                with suppress(_BlockReachedError):
                    _run(model, batch)
                pair = recorder.take()
                if pair is None:
                    raise ValueError(
                        f"block {block!r} was not called when the model ran on batch {number}."
                    )
                _check_pair(block, number, *pair)
                kept = None if max_examples is None else max_examples - seen
                store.append(*(tensor[:kept].numpy() for tensor in pair))
                seen += len(pair[0][:kept])
                progress.update()
                if seen == max_examples:
                    break
        if not seen:
            raise ValueError("data holds no examples: it must yield at least one batch.")
        return Capture(block, store, recorder.dtypes)
    except BaseException:
        store.close()
        raise
    finally:
        for handle in handles:
            handle.remove()


def _check_pair(block: str, number: int, *pair: Tensor) -> None:
    """Refuse activations that are not finite, or whose examples do not lie along axis 0."""
    for side, tensor in zip(("input", "output"), pair, strict=True):
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"the {side} of block {block!r} contains NaN or infinity in batch {number} "
                "(counted from 0)."
            )
    if any(tensor.ndim == 0 for tensor in pair) or len(pair[0]) != len(pair[1]):
        raise ValueError(
            f"block {block!r} must keep its examples along axis 0, but maps "
            f"{tuple(pair[0].shape)} to {tuple(pair[1].shape)} in batch {number}."
        )
