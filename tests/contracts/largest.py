"""What a computation makes: for tests of memory and of work."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor made, and of all together."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.all = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().nbytes() >= out.numel() * out.element_size():
            self.elements = max(self.elements, out.numel())
            self.all += out.numel()
        return out
