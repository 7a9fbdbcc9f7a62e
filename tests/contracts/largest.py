"""What a computation makes: for tests of memory and of work."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor made, alone or beside others, and of all together."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.all = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, Tensor) and made.untyped_storage().nbytes() >= made.numel() * made.element_size():
                self.elements = max(self.elements, made.numel())
                self.all += made.numel()
        return out
