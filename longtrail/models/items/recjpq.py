"""RecJPQ: a catalogue's vectors out of a few shared pieces (Petrov & Macdonald, WSDM 2024, arXiv 2312.06165).

N items, D width, M splits, b codes to choose from in a split, d width of a piece: D / M, or D where pieces are added up.

An item is M codes of one byte; its vector is the concatenation of the pieces that its codes name:

    concat:   w_i = [ Ψ_0[g_i0] ; Ψ_1[g_i1] ; … ; Ψ_{M-1}[g_i,M-1] ]      N · M bytes of codes, frozen; b · D trained numbers, whatever N is
    sum:      w_i = Ψ_0[g_i0] + Ψ_1[g_i1] + … + Ψ_{M-1}[g_i,M-1]          pieces D wide: M · b · D trained numbers

The paper's: "concat" in place of the table, for input and output alike, with the backbone and the loss as they were; codes from training
interactions (longtrail/training/codes.py), given once, before the first step. Ours: the padding item has no codes and reads zeros (in the paper's
code it shares pieces with real items); normal first weights of the dense table's spread instead of uniform ones in ±0.05, so that a model starts at
the scale it was made for; pieces that start from given item vectors; and "sum" (additive quantisation with fixed codes): the score is a sum over
splits as before, ⟨w_i, φ⟩ = Σ_k ⟨Ψ_k[g_ik], φ⟩, so that retrieval by sub-scores stays what it is, but the D numbers of a small model are each
told by all M codes instead of by one, as in a table M times as wide behind a projection. Rankers have this slot too, which the paper does not try.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from longtrail.models.contracts import Axis
from longtrail.models.items.dense import known
from longtrail.models.lookup import look_up_sum

STEPS = 50  # of conjugate gradients, at most


class RecJPQItems(nn.Module):
    """Item vectors from codes: an ItemEmbedding.

    Buffers `codes` uint8 [N + 1, M] and `levels` float32 [M, b] (the component value a code stands for: later items are coded by it; zeros: by
    chance), parameter `centroids` float32 [M, b, d]. A new layer has random codes (the paper's RecJPQ-Random) from torch's global generator;
    `set_codes` gives it others.
    """

    def __init__(
        self, items: int, width: int, *, splits: int, codes: int = 256, composition: Literal["concat", "sum"] = "concat", std: float = 0.02
    ) -> None:
        """Item vectors of spread `std`.

        Raises ValueError where `codes` is not in 1..256 (a code is one byte), or pieces are concatenated and `splits` does not divide `width`.
        """
        super().__init__()
        if splits < 1 or (composition == "concat" and width % splits):
            raise ValueError(f"width {width} is not divisible by splits {splits}")
        if not 1 <= codes <= 256:
            raise ValueError(f"codes is {codes}; expected 1 to 256")
        self.items, self.width, self.composition = items, width, composition
        self.axes: dict[str, Axis] = {"codes": "items"}
        self.codes: Tensor
        drawn_NM = torch.randint(codes, (items + 1, splits), dtype=torch.uint8)
        drawn_NM[0] = 0
        self.register_buffer("codes", drawn_NM)
        self.levels: Tensor
        self.register_buffer("levels", torch.zeros(splits, codes))
        piece, spread = (width // splits, std) if composition == "concat" else (width, std * splits**-0.5)
        self.centroids = nn.Parameter(torch.randn(splits, codes, piece) * spread)

    def embed(self, ids: Tensor) -> Tensor:
        """int64 [...] → [..., D]; zeros for 0 and for ids above N, and no gradient from them."""
        ids = known(ids, self.items)
        return self._pieces(self.codes[ids]).masked_fill((ids == 0).unsqueeze(-1), 0)

    def vectors(self) -> Tensor:
        """[N + 1, D], made anew at each call: what RecJPQ is there to avoid. For small catalogues, evaluation and tests."""
        w_ND = self._pieces(self.codes)
        return w_ND.masked_fill((torch.arange(len(w_ND), device=w_ND.device) == 0).unsqueeze(-1), 0)

    @torch.no_grad()
    def set_codes(self, codes_NM: Tensor, levels_Mb: Tensor | None = None) -> None:
        """Codes [N' + 1, M] of any integer type, in 0..b - 1, for the N items or more; row 0 is padding's and is not read.

        With more than N items the catalogue has grown: `items` is then N'. Raises ValueError where codes do not fit.
        """
        if codes_NM.ndim != 2 or len(codes_NM) <= self.items or codes_NM.shape[1] != self.codes.shape[1]:
            raise ValueError(f"codes have shape {list(codes_NM.shape)}; expected {list(self.codes.shape)}, or more rows")
        if len(codes_NM) > 1 and not 0 <= int(codes_NM[1:].min()) <= int(codes_NM[1:].max()) < self.centroids.shape[1]:
            raise ValueError(f"codes run from {int(codes_NM[1:].min())} to {int(codes_NM[1:].max())}; expected 0 to {self.centroids.shape[1] - 1}")
        self.codes = codes_NM.to(self.codes, copy=True)
        self.codes[0] = 0
        self.items = len(codes_NM) - 1
        if levels_Mb is not None:
            self.levels.copy_(levels_Mb)

    @torch.no_grad()
    def start(self, vectors_ND: Tensor, *, std: float) -> None:
        """Pieces as near to the item vectors [N + 1, D] as the codes allow, item vectors scaled as a whole to `std`. Ours.

        Concatenated: columns are dealt to the splits in turn (column j to split j mod M): codes of a truncated SVD order items by component j in
        split j, and so each split holds the very column that its codes know about. A piece is then the mean over the items that have it, which is the
        least-squares fit for given codes. Added up: the least-squares fit, by conjugate gradients. A piece that no item has keeps its random start.
        """
        M, b, _ = self.centroids.shape
        counts_Mb1 = torch.bincount(self._places(self.codes[1:]).flatten(), minlength=M * b).view(M, b, 1)
        wanted_ND = vectors_ND[1:].to(self.centroids)
        if self.composition == "concat":
            fitted_Mbd = self._gathered(wanted_ND.unflatten(1, (-1, M)).transpose(1, 2)) / counts_Mb1.clamp(min=1)
        else:
            fitted_Mbd = self._added_fit(wanted_ND)
        self.centroids.copy_(torch.where(counts_Mb1 > 0, fitted_Mbd, self.centroids))
        scale = std / self.vectors()[1:].std().clamp(min=1e-12)
        self.centroids.mul_(torch.where(counts_Mb1 > 0, scale, 1.0))

    def _added_fit(self, wanted_ND: Tensor) -> Tensor:
        """[M, b, D]: pieces whose sums are nearest to `wanted_ND` [N, D], those of least norm among them; each column is a problem of its own."""
        M = len(self.centroids)

        def gather(x_ND: Tensor) -> Tensor:
            return self._gathered(x_ND.unsqueeze(1).expand(-1, M, -1))

        rest = gather(wanted_ND)
        fitted, way, size_D = torch.zeros_like(rest), rest, rest.square().sum((0, 1))
        enough_D = 1e-10 * size_D
        for _ in range(STEPS):
            going_D = size_D > enough_D
            if not going_D.any():
                break
            reach_ND = look_up_sum(way.flatten(0, 1), self._places(self.codes[1:]))
            length_D = torch.where(going_D, size_D / reach_ND.square().sum(0), 0)
            fitted, rest = fitted + length_D * way, rest - length_D * gather(reach_ND)
            before_D, size_D = size_D, rest.square().sum((0, 1))
            way = rest + torch.where(going_D, size_D / before_D, 0) * way
        return fitted

    def _gathered(self, x_NMd: Tensor) -> Tensor:
        """[M, b, d]: sums over the items that have each piece."""
        M, b, _ = self.centroids.shape
        sums = x_NMd.new_zeros(M * b, x_NMd.shape[-1]).index_add_(0, self._places(self.codes[1:]).flatten(), x_NMd.flatten(0, 1))
        return sums.view(M, b, -1)

    def _pieces(self, codes: Tensor) -> Tensor:
        """uint8 [..., M] → [..., D]."""
        places, table = self._places(codes), self.centroids.flatten(0, 1)
        if self.composition == "sum":
            return look_up_sum(table, places)
        # index_select's backward takes half the time of an embedding's on a CPU
        return table.index_select(0, places.flatten()).view(*places.shape[:-1], self.width)

    def _places(self, codes: Tensor) -> Tensor:
        """Rows int64 [..., M] of the centroids laid out as [M · b, d]."""
        M, b, _ = self.centroids.shape
        return codes.long() + torch.arange(0, M * b, b, device=codes.device)
