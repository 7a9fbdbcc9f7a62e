"""SDIM: sampling-based deep interest modelling (Cao et al., CIKM 2022, arXiv 2205.10249).

B requests, L history, C candidates, D width, M hashes, S = 2^bits signatures, b bits.

    signature_m(x) = the signs of x R_m, R_m a fixed random [D, b]      u = 1/M Σ_m normalised(Σ of the k_j with signature_m(k_j) = signature_m(q))

The paper's: all of it; M hashes of b bits are an estimate of attention by (1 - angle / π)^b. The sums [B, M, S, D] need no candidate: each candidate
costs O(M · D), however long the history. Ours: the candidate set, the head, q * u beside u; the sums by one matrix product with what is in
which signature, M · min(S, C) · L · D multiply-adds a request. No gradient goes through the hashes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtrail.config import SDIMSettings
from longtrail.models.contracts import Candidates, Context, History, Sizes
from longtrail.models.embedding import BehaviourEmbedding
from longtrail.models.head import Head
from longtrail.models.masks import padding_mask
from longtrail.models.precision import at_least_float32

SUMS_AT_ONCE = (
    32  # of a product, or those of one hash: the keys are read once for all of them, and what is in which signature, [B, 32, L], is no larger
)


class SDIM(nn.Module):
    """Ranker."""

    def __init__(self, settings: SDIMSettings, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings
        self.embedding = BehaviourEmbedding(sizes, settings.width, items=settings.items)
        self.planes: Tensor
        self.register_buffer("planes", torch.randn(self.embedding.width, settings.hashes * settings.bits))
        self.head = Head(3 * self.embedding.width + self.embedding.recent_width, settings.hidden, settings.dropout)

    def forward(self, history: History, candidates: Candidates, context: Context) -> Tensor:
        """Logits [B, C]."""
        mask_BL = padding_mask(history.lengths_B, history.items_BL.shape[1])
        mask_BC = padding_mask(candidates.lengths_B, candidates.items_BC.shape[1])
        query_BCD = self.embedding.queries(candidates)
        read_BCD = self.read(self.embedding.keys(history, mask_BL), mask_BL, query_BCD)
        parts = [query_BCD, read_BCD, query_BCD * read_BCD, self.embedding.recent(history, mask_BC.shape[1])]
        return self.head(parts, candidates.statistics_BCF, context.statistics_BG, mask_BC)

    @torch.no_grad()
    def signatures(self, x: Tensor) -> Tensor:
        """int16 [..., M], each in 0 … S - 1."""
        with torch.autocast(x.device.type, enabled=False):
            positive = (at_least_float32(x) @ self.planes >= 0).unflatten(-1, (self.settings.hashes, self.settings.bits))
            powers_b = 2.0 ** torch.arange(self.settings.bits, device=x.device)
            return (positive.to(powers_b.dtype) @ powers_b).to(torch.int16)

    def read(self, keys_BLD: Tensor, mask_BL: Tensor, query_BCD: Tensor) -> Tensor:
        """u [B, C, D]. With fewer candidates than signatures, only the sums that are asked for are made (R = C); else every one, once (R = S)."""
        signatures_BML = self.signatures(keys_BLD).masked_fill(~mask_BL.unsqueeze(-1), -1).transpose(1, 2)
        asked_BMC, S = self.signatures(query_BCD).transpose(1, 2), 2**self.settings.bits
        few = asked_BMC.shape[2] < S
        summed_BMR = asked_BMC if few else torch.arange(S, device=keys_BLD.device, dtype=torch.int16).expand(*asked_BMC.shape[:2], S)
        at_once = max(1, SUMS_AT_ONCE // max(1, summed_BMR.shape[2]))
        pairs = zip(signatures_BML.split(at_once, 1), summed_BMR.split(at_once, 1), strict=True)
        unit_BMRD = functional.normalize(torch.cat([sums(at_least_float32(keys_BLD), *pair) for pair in pairs], dim=1), dim=-1, eps=1e-6)
        if not few:
            unit_BMRD = unit_BMRD.gather(2, asked_BMC.long().unsqueeze(-1).expand(-1, -1, -1, keys_BLD.shape[-1]))
        return unit_BMRD.mean(1)


def sums(keys_BLD: Tensor, signatures_BML: Tensor, summed_BMR: Tensor) -> Tensor:
    """[B, M, R, D]: of hash m the keys whose signature is the r-th of `summed`, added up."""
    with torch.autocast(keys_BLD.device.type, enabled=False):
        within_BMRL = (signatures_BML.unsqueeze(2) == summed_BMR.unsqueeze(3)).to(keys_BLD.dtype)
        return (within_BMRL.flatten(1, 2) @ keys_BLD).unflatten(1, summed_BMR.shape[1:])
