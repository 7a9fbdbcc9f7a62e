"""RecJPQ: a catalogue's vectors out of a few shared pieces (Petrov & Macdonald, WSDM 2024, arXiv 2312.06165).

N items, D width, M splits, b codes to choose from in a split, d = D / M width of a piece.

An item is M codes of one byte; its vector is the concatenation of the pieces that its codes name:

    w_i = [ Ψ_0[g_i0] ; Ψ_1[g_i1] ; … ; Ψ_{M-1}[g_i,M-1] ]        N · M bytes of codes, frozen, and b · D trained numbers, whatever N is

The paper's: this layer in place of the table, for input and output alike, with the backbone and the loss as they were; codes from training
interactions (longtrail/training/codes.py), given once, before the first step. Ours: the padding item has no codes and reads zeros (in the paper's
code it shares pieces with real items); normal first weights of the dense table's spread instead of uniform ones in ±0.05, so that a model starts at
the scale it was made for; and pieces that start from given item vectors. Rankers have this slot too, which the paper does not try.
"""

import torch
from torch import Tensor, nn

from longtrail.models.items.dense import known


class RecJPQItems(nn.Module):
    """Item vectors from codes: an ItemEmbedding.

    Buffers `codes` uint8 [N + 1, M] and `levels` float32 [M, b] (the component value a code stands for: later items are coded by it; zeros: by
    chance), parameter `centroids` float32 [M, b, D / M]. A new layer has random codes (the paper's RecJPQ-Random) from torch's global generator;
    `set_codes` gives it others.
    """

    def __init__(self, items: int, width: int, *, splits: int, codes: int = 256, std: float = 0.02) -> None:
        """Raises ValueError where `splits` does not divide `width`, or `codes` is not in 1..256: a code is one byte."""
        super().__init__()
        if splits < 1 or width % splits:
            raise ValueError(f"width {width} is not divisible by splits {splits}")
        if not 1 <= codes <= 256:
            raise ValueError(f"codes is {codes}; expected 1 to 256")
        self.items, self.width = items, width
        self.codes: Tensor
        drawn_NM = torch.randint(codes, (items + 1, splits), dtype=torch.uint8)
        drawn_NM[0] = 0
        self.register_buffer("codes", drawn_NM)
        self.levels: Tensor
        self.register_buffer("levels", torch.zeros(splits, codes))
        self.centroids = nn.Parameter(torch.randn(splits, codes, width // splits) * std)

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

        Columns are dealt to the splits in turn (column j to split j mod M): codes of a truncated SVD order items by component j in split j, and so
        each split holds the very column that its codes know about. A piece is then the mean over the items that have it, which is the least-squares
        fit for given codes. A piece that no item has keeps its random start.
        """
        M, b, d = self.centroids.shape
        dealt_NMd = vectors_ND[1:].to(self.centroids).unflatten(1, (d, M)).transpose(1, 2)
        sums = torch.zeros_like(self.centroids).view(M * b, d).index_add_(0, self._places(self.codes[1:]).flatten(), dealt_NMd.flatten(0, 1))
        counts = torch.bincount(self._places(self.codes[1:]).flatten(), minlength=M * b).unsqueeze(1)
        self.centroids.copy_(torch.where(counts > 0, sums / counts.clamp(min=1), self.centroids.view(M * b, d)).view(M, b, d))
        scale = std / self.vectors()[1:].std().clamp(min=1e-12)
        self.centroids.mul_(torch.where(counts > 0, scale, 1.0).view(M, b, 1))

    def _pieces(self, codes: Tensor) -> Tensor:
        """uint8 [..., M] → [..., D]."""
        places = self._places(codes)  # index_select's backward takes half the time of an embedding's on a CPU
        return self.centroids.flatten(0, 1).index_select(0, places.flatten()).view(*places.shape[:-1], self.width)

    def _places(self, codes: Tensor) -> Tensor:
        """Rows int64 [..., M] of the centroids laid out as [M · b, d]."""
        M, b, _ = self.centroids.shape
        return codes.long() + torch.arange(0, M * b, b, device=codes.device)
