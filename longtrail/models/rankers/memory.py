"""SAM's memory: the cell that folds what was read into it, and the enhancement of SAM-3P+. D width, X input width, T steps; states are [B, C, D]."""

import torch
from torch import Tensor, nn

from longtrail.models.attention.pointwise import glorot
from longtrail.models.precision import at_least_float32


class MemoryCell(nn.Module):
    """TF1's GRU cell [C]: gate bias 1, and the reset gate acts before the candidate's matrix product (torch.nn.GRUCell's acts after it)."""

    def __init__(self, width: int, *, inputs: int | None = None) -> None:
        super().__init__()
        joined = (inputs or width) + width
        self.gates = glorot(joined, 2 * width, inputs=joined, outputs=2 * width)
        self.gates_bias = nn.Parameter(torch.ones(2 * width))
        self.candidate = glorot(joined, width, inputs=joined, outputs=width)
        self.candidate_bias = nn.Parameter(torch.zeros(width))

    def forward(self, read_BCX: Tensor, memory_BCD: Tensor) -> Tensor:
        gates = at_least_float32(torch.cat([read_BCX, memory_BCD], dim=-1) @ self.gates) + self.gates_bias
        reset_BCD, keep_BCD = gates.sigmoid_().chunk(2, dim=-1)
        candidate = at_least_float32(torch.cat([read_BCX, reset_BCD * memory_BCD], dim=-1) @ self.candidate) + self.candidate_bias
        return torch.lerp(candidate.tanh_(), at_least_float32(memory_BCD), keep_BCD)


class Enhancement(nn.Module):
    """SAM-3P+ [C]: h_0 = m_P; x_t = [h_{t-1} V_t + v_t ; q], h_t = GRU_out(x_t, h_{t-1}). V_t unshared (the code's), one cell for all steps."""

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.steps = nn.ParameterList(glorot(width, width, inputs=width, outputs=width) for _ in range(steps))
        self.steps_bias = nn.ParameterList(nn.Parameter(torch.zeros(width)) for _ in range(steps))
        self.cell = MemoryCell(width, inputs=2 * width)

    def forward(self, memory_BCD: Tensor, query_BCD: Tensor) -> Tensor:
        """h_T [B, C, D]."""
        for step, bias in zip(self.steps, self.steps_bias, strict=True):
            memory_BCD = self.cell(torch.cat([memory_BCD @ step + bias, query_BCD], dim=-1), memory_BCD)
        return memory_BCD
