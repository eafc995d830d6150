"""What a model and its parts cost, in parameters or in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cvxdistill.adapters import Site


@dataclass(frozen=True)
class ModelSize:
    """Costs in parameters, or in bytes of parameters and buffers."""

    bytes: bool

    def model(self, model: nn.Module) -> int:
        """Of all that a model stores: of students what is in their state dicts."""
        from cvxdistill.adapters import GatedStudent, LinearStudent

        kinds = (GatedStudent, LinearStudent)
        students = [module for module in model.modules() if isinstance(module, kinds)]
        inside = {id(t) for s in students for t in (*s.parameters(), *s.buffers())}
        parameters: list[Tensor] = [p for p in model.parameters() if id(p) not in inside]
        for student in students:
            parameters += student.state_dict(keep_vars=True).values()
        return self._of(parameters, [b for b in model.buffers() if id(b) not in inside])

    def layer(self, model: nn.Module, name: str) -> int:
        """Of a layer's own parameters."""
        module = model.get_submodule(name)
        return self._of([*module.parameters(recurse=False)], [*module.buffers(recurse=False)])

    def student(self, site: Site, numbers: int, orders: int) -> int:
        """Of a student with so many numbers, some of them int32, in a site's place."""
        if not self.bytes:
            return numbers
        sizes = [p.element_size() for module in site.modules for p in module.parameters()]
        return max(0, numbers - orders) * sizes[0] + orders * 4

    def _of(self, parameters: list[Tensor], buffers: list[Tensor]) -> int:
        # Tensors under two names are stored once.
        tensors = {id(t): t for t in parameters + (buffers if self.bytes else [])}
        return sum(t.numel() * (t.element_size() if self.bytes else 1) for t in tensors.values())
