"""Mean pooling: what YouTube's DNN (Covington et al., RecSys 2016) makes of a history. B requests, L history, C candidates, D width.

    u = mean_j k_j, the same for every candidate      logit = head([q ; u ; q * u ; newest actions ; statistics])

Ours: q * u, without which candidates and history only meet inside the head; the action, the statistics and the head of the other rankers.
"""

from torch import Tensor, nn

from longtrail.config import MeanPoolingSettings
from longtrail.models.contracts import Candidates, Context, History, Sizes
from longtrail.models.embedding import BehaviourEmbedding
from longtrail.models.head import Head
from longtrail.models.masks import padding_mask


class MeanPooling(nn.Module):
    """Ranker. O(L · D) a request, whatever the number of candidates."""

    def __init__(self, settings: MeanPoolingSettings, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings
        self.embedding = BehaviourEmbedding(sizes, settings.width, items=settings.items)
        self.head = Head(3 * self.embedding.width + self.embedding.recent_width, settings.hidden, settings.dropout)

    def forward(self, history: History, candidates: Candidates, context: Context) -> Tensor:
        """Logits [B, C]."""
        mask_BL = padding_mask(history.lengths_B, history.items_BL.shape[1])
        mask_BC = padding_mask(candidates.lengths_B, candidates.items_BC.shape[1])
        query_BCD = self.embedding.queries(candidates)
        mean_BD = self.embedding.keys(history, mask_BL).sum(1) / history.lengths_B.clamp(min=1).unsqueeze(-1)
        read_BCD = mean_BD.unsqueeze(1).expand_as(query_BCD)
        parts = [query_BCD, read_BCD, query_BCD * read_BCD, self.embedding.recent(history, mask_BC.shape[1])]
        return self.head(parts, candidates.statistics_BCF, context.statistics_BG, mask_BC)
