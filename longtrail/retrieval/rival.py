"""faiss behind the same question, to compare with (benchmarks/retrieval.py). faiss is needed for development alone.

B users, D width, K results, N items, M splits. Kinds: flat (exact, every inner product), pq (exact over the very same codes: its product quantiser is
given our centroids), hnsw and ivf_pq (approximate).
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from longtrail.errors import ModelError
from longtrail.retrieval.index import Exclusion, Filter, check_request

Rival = Literal["flat", "pq", "hnsw", "ivf_pq"]


class FaissIndex:
    """Exclusions and filters are refused: in faiss they cost a selector object a user. Threads are faiss's own (`faiss.omp_set_num_threads`)."""

    def __init__(self, kind: Rival, items: Tensor, centroids_MbE: Tensor | None = None) -> None:
        """`items`: vectors float32 [N + 1, D], or for pq codes uint8 [N + 1, M] with centroids [M, 256, D / M]; row 0 padding."""
        import faiss

        self.kind, self.items = kind, len(items) - 1
        rows = np.ascontiguousarray(items[1:].numpy())
        if kind == "pq":
            if centroids_MbE is None or centroids_MbE.shape[1] != 256:
                raise ModelError("faiss pq takes codes of one byte: expected centroids [splits, 256, width / splits]")
            splits, _, part = centroids_MbE.shape
            self.width = splits * part
            index: Any = faiss.IndexPQ(self.width, splits, 8, faiss.METRIC_INNER_PRODUCT)
            faiss.copy_array_to_vector(np.ascontiguousarray(centroids_MbE.detach().numpy()).ravel(), index.pq.centroids)
            faiss.copy_array_to_vector(rows.ravel(), index.codes)
            index.ntotal, index.is_trained = len(rows), True
        else:
            self.width = rows.shape[1]
            index = self._over_vectors(faiss, rows)
        self._index = index

    def _over_vectors(self, faiss: Any, rows: Any) -> Any:
        if self.kind == "flat":
            index = faiss.IndexFlatIP(self.width)
        elif self.kind == "hnsw":
            index = faiss.IndexHNSWFlat(self.width, 32, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efSearch = 64
        else:
            lists = max(1, int(4 * len(rows) ** 0.5))
            index = faiss.IndexIVFPQ(faiss.IndexFlatIP(self.width), self.width, lists, self.width // 8, 8, faiss.METRIC_INNER_PRODUCT)
            index.train(rows[np.random.default_rng(0).permutation(len(rows))[: 40 * lists]])
            index.nprobe = max(1, lists // 16)
        index.add(rows)
        return index

    def topk(self, user_BD: Tensor, k: int, *, exclude: Exclusion | None = None, allowed: Filter | None = None) -> tuple[Tensor, Tensor]:
        """(ids_BK int64, scores_BK float32), best first; faiss says which of equal scores comes first."""
        if exclude is not None or allowed is not None:
            raise ModelError("the faiss rival takes no exclusions and no filter")
        check_request(user_BD, self.width, k, None)
        scores, places = self._index.search(user_BD.numpy(), k)
        return torch.from_numpy(places + 1), torch.from_numpy(scores)
