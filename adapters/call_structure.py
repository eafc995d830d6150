"""Which tensor of a call is the block's input, and where in what it returns its output lies.

Blocks of transformers take masks, positions and flags beside their hidden states, and return them
alone, in a tuple beside None, or in a dataclass. A student maps one tensor to one tensor.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

# Arguments whose names hold one of these say where a value lies or whom it may see: a student,
# which works on each example or token alone, ignores them.
SIDE_ARGUMENTS = ("mask", "position", "rotary", "cache", "past")
ADVICE = (
    "A student returns one tensor: turn the others off (output_attentions=False, use_cache=False, "
    'attn_implementation="sdpa"), or choose a block inside this one or around it'
)


def main_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the one tensor that a student of the called block takes.

    It is the only tensor, or the first floating one. Masks and positions (by the names of
    arguments), tensors with other numbers of axes or examples, flags and None stand beside it.

    Raises
    ------
    ValueError
        If there is none, or several could be meant; the message names what came.
    """
    named = [("", value) for value in args] + list(kwargs.items())
    main = [value for name, value in named if not any(side in name for side in SIDE_ARGUMENTS)]
    tensors = [value for value in main if isinstance(value, Tensor)]
    found = [tensor for tensor in tensors if tensor.is_floating_point()]
    if len(tensors) == 1:
        found = tensors
    like_first = [
        tensor
        for tensor in found
        if tensor.ndim == found[0].ndim and tensor.shape[:1] == found[0].shape[:1]
    ]
    nested = any(holds_tensor(value) for value in main if not isinstance(value, Tensor))
    if len(like_first) != 1 or nested:
        kinds = ", ".join(type(value).__name__ for _, value in named) or "nothing"
        raise ValueError(f"exactly one tensor, but was called with: {kinds}")
    return like_first[0]


def holds_tensor(value: Any) -> bool:
    """Whether a tensor lies anywhere in these tuples, lists and dicts."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return any(holds_tensor(item) for item in value)
    return isinstance(value, Tensor)


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors in nested tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, item.name) for item in dataclasses.fields(value)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


@dataclass(frozen=True)
class Structure:
    """What a block returns, but for its tensor.

    Attributes
    ----------
    key : int, str or None
        Where in the template the tensor lies; None if the tensor is all there is.
    template : tuple, list, dict, dataclass or None
    """

    key: int | str | None = None
    template: Any = field(default=None, repr=False)

    @classmethod
    def split(cls, output: Any) -> tuple[Tensor, Structure]:
        """Take an output apart into its tensor and the rest.

        Raises
        ------
        ValueError
            If it holds no tensor, or anything else that a student could not give.
        """
        if isinstance(output, Tensor):
            return output, cls()
        items = _items(output)
        keys = [key for key, item in items.items() if isinstance(item, Tensor)]
        others = [item for item in items.values() if not isinstance(item, Tensor)]
        plain = all(item is None or isinstance(item, (bool, int, float, str)) for item in others)
        if len(keys) != 1 or not plain:
            kinds = ", ".join(type(item).__name__ for item in items.values())
            held = f" of ({kinds})" if items else ""
            advice = f". {ADVICE}" if keys else ""
            raise ValueError(f"one tensor, got {type(output).__name__}{held}{advice}")
        structure = cls(keys[0])
        object.__setattr__(structure, "template", structure._replaced(output, None))
        return items[keys[0]], structure

    def wrap(self, tensor: Tensor) -> Any:
        """Put a tensor where the block's was."""
        return tensor if self.key is None else self._replaced(self.template, tensor)

    def _replaced(self, output: Any, value: Any) -> Any:
        if isinstance(output, (tuple, list)):
            items = [value if key == self.key else item for key, item in enumerate(output)]
            # A named tuple takes its items one by one.
            return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
        if dataclasses.is_dataclass(output) and not isinstance(output, type):
            return dataclasses.replace(output, **{str(self.key): value})
        replaced = copy.copy(output)
        replaced[self.key] = value
        return replaced


def _items(output: Any) -> dict[Any, Any]:
    if isinstance(output, (tuple, list)):
        return dict(enumerate(output))
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        names = [item.name for item in dataclasses.fields(output)]
        return {name: getattr(output, name) for name in names}
    return dict(output) if isinstance(output, Mapping) else {}


class PassThrough(nn.Module):
    """Gives back the tensor that it is called with, as the module that it replaces would."""

    def __init__(self, structure: Structure | None = None) -> None:
        super().__init__()
        self.structure = structure or Structure()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first tensor among the arguments; what stands beside it is ignored."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                return self.structure.wrap(value)
        raise TypeError("an identity takes a tensor, got none.")


class StructuredBlock(nn.Module):
    """A student in the place of a block that returns its tensor in a tuple or a dataclass."""

    def __init__(self, student: nn.Module, structure: Structure) -> None:
        super().__init__()
        self.student = student
        self.structure = structure

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the student and put its output where the block's was."""
        return self.structure.wrap(self.student(*args, **kwargs))
