"""Two stages: find the K behaviours that matter to each candidate, then let multi-head target attention read those.

B requests, L history, C candidates, D width, H heads, K top-k.

The second stage is multi-head attention as in ETA and TWIN, scaled by 1/√d and with projections W_v and W_o; SIM's paper adds up the behaviours
themselves, heads side by side (one form for the family: our choice). The search gives indices, through which no gradient flows. The K behaviours of
a candidate are embedded anew from their ids, so that a step of training touches B·C·K rows of the tables rather than B·L. The search goes over blocks
of candidates, and so does the second stage where no gradient is asked for: neither [B, C, L] nor [B, C, K, D] of many candidates takes more than
CHUNK_BYTES.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from longtrail.models.attention.pointwise import candidate_blocks, glorot
from longtrail.models.contracts import History
from longtrail.models.precision import at_least_float32


@torch.no_grad()
def search(score: Callable[[slice], Tensor], mask_BL: Tensor, candidates: int, top_k: int) -> tuple[Tensor, Tensor]:
    """int64 [B, C, K] places of the best, and bool [B, C, K] whether something was found there; K = min(top_k, L).

    `score(block)` gives [B, c, L] for a block of candidates, in float32 or wider; -inf is out of the question, and so is padding.
    """
    B, L = mask_BL.shape
    found, out_B1L = [], ~mask_BL.unsqueeze(1)
    with torch.autocast(mask_BL.device.type, enabled=False):
        for block in candidate_blocks(candidates, 8 * B * L):
            found.append(score(block).masked_fill(out_B1L, -torch.inf).topk(min(top_k, L), dim=-1))
    values_BCK, places_BCK = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return places_BCK, values_BCK > -torch.inf


def newer_first(scores_BCL: Tensor) -> Tensor:
    """Whole, even scores of at most 64, made to prefer the later place among equals: exact in float32 for histories up to 131,072 events."""
    L = scores_BCL.shape[-1]
    return scores_BCL + torch.arange(L, device=scores_BCL.device, dtype=scores_BCL.dtype) / max(L, 1 << 17)


def taken(history: History, places_BK: Tensor) -> History:
    """The events at `places` [B, K]. Lengths are kept as they are: what is real among these is for the caller to know."""
    fields = ("items_BL", "categories_BL", "actions_BL", "times_BL")
    return replace(history, **{field: getattr(history, field).gather(1, places_BK) for field in fields})


class SelectedAttention(nn.Module):
    """softmax((q W_q)(k W_k) / sqrt(d) + bias) over the K behaviours of each candidate, per head; values k' W_v; all heads through W_o.

    W_k goes to the candidate's side and W_v behind the sum, which is exact: a behaviour costs 2·H·D multiply-adds instead of 2·D·D.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.query, self.key, self.value = (glorot(heads, width, width // heads, inputs=width, outputs=width) for _ in range(3))
        self.output = nn.Linear(width, width)

    def asked(self, query_BCD: Tensor) -> Tensor:
        """[B, C, H, D]: what each head's score of a behaviour is the inner product with."""
        return torch.einsum("bchd,hed->bche", torch.einsum("bce,hed->bchd", query_BCD, self.query), self.key) * self.scale

    def forward(self, query_BCD: Tensor, keys_BCKD: Tensor, values_BCKD: Tensor, found_BCK: Tensor, bias_BCKH: Tensor | None = None) -> Tensor:
        """[B, C, D]; a candidate that found nothing reads nothing: the output's bias."""
        scores_BCHK = at_least_float32(self.asked(query_BCD) @ keys_BCKD.transpose(2, 3))
        if bias_BCKH is not None:
            scores_BCHK = scores_BCHK + bias_BCKH.transpose(2, 3)
        lost_BC1K = ~found_BCK.unsqueeze(2)
        shares_BCHK = scores_BCHK.masked_fill(lost_BC1K, torch.finfo(scores_BCHK.dtype).min).softmax(-1).masked_fill(lost_BC1K, 0)
        read_BCHd = torch.einsum("bche,hed->bchd", shares_BCHK @ at_least_float32(values_BCKD), self.value)
        return self.output(read_BCHd.flatten(2))
