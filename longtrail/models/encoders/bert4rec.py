"""BERT4Rec: a bidirectional encoder that learns by filling in masked events (Sun et al., CIKM 2019, arXiv 1904.06690).

B users, L history, D width, N items, K most masked places of a window.

    x = sqrt(D) · item, or mask      per block: x = x + A(LN x) ; x = x + FFN(LN x)      state = LN x      learned positions are added to x
    training: the state of a masked place names the event that stood there      serving: the newest events, then a masked place: its state is the user

The paper's: bidirectional blocks, a GELU FFN of width 4D, cloze training, learned positions. As in the code of RecJPQ: n = min(20, max(1, round(0.2 ·
length))) places are masked without replacement, always by the mask, and scores are inner products with the item slot, without a bias. Ours: length
counts a window's targets alone (a long history's windows repeat older events as context), a learned mask vector of its own in place of an id (which
under RecJPQ would share its pieces with items), padding that nothing looks at, items times sqrt(D) as in SASRec, where those codes normalise the sum
of item and position by a LayerNorm and dropout it, pre-norm blocks, learned positions counted from the newest event back, so that the place serving
asks about is always position 0 (those codes pad at the left, to the same effect), and, by default, rotary positions in their stead: a masked place
has nothing but its position to ask by, and learned ones take many times the epochs to tell what is near (docs/experiments/bert4rec-positions.md).
"""

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from longtrail.config import BERT4RecSettings
from longtrail.models.attention.factory import knows_order, make_attention, reach_of
from longtrail.models.contracts import History, Pairs, Sizes
from longtrail.models.dropout import Dropout
from longtrail.models.encoders.transformer import Block
from longtrail.models.items.factory import make_items
from longtrail.models.masks import padding_mask
from longtrail.models.order import newest, newest_places

if TYPE_CHECKING:
    from longtrail.examples import SequenceBatch


class BERT4Rec(nn.Module):
    """Retriever. With full attention it reads the newest `max_history` - 1 events (the mask takes a place), at O(L²·D) time; with Blossom all."""

    def __init__(self, settings: BERT4RecSettings, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings
        width, dropout = settings.width, settings.dropout
        self.items = make_items(settings.items, sizes.items, width, std=0.02)
        self.reach = reach_of(settings.attention, settings.max_history)
        self.positions = None if knows_order(settings.attention) else nn.Parameter(torch.randn(settings.max_history, width) * 0.02)
        self.mask = nn.Parameter(torch.randn(width) * 0.02 * width**0.5)
        self.dropout = Dropout(dropout)
        attentions = [make_attention(settings.attention, width, settings.heads, causal=False) for _ in range(settings.blocks)]
        self.blocks = nn.ModuleList(Block(width, attention, feed_width=4 * width, activation=nn.GELU(), dropout=dropout) for attention in attentions)
        self.norm = nn.LayerNorm(width)

    def states(self, items_BL: Tensor, lengths_B: Tensor, masked_BL: Tensor) -> Tensor:
        """[T, D], row by row: what each of the T masked places (bool) is taken for, given all events that are not masked.

        Raises ValueError for L above max_history where positions are learned.
        """
        L = items_BL.shape[1]
        hidden_BL = masked_BL | ~padding_mask(lengths_B, L)
        x_BLD = self.items.embed(items_BL.masked_fill(hidden_BL, 0)) * self.items.width**0.5
        x_BLD = torch.where(masked_BL.unsqueeze(-1), self.mask.to(x_BLD.dtype), x_BLD)
        if self.positions is not None:
            if len(self.positions) < L:
                raise ValueError(f"a history of {L} events, masks included; expected at most max_history = {len(self.positions)}")
            back_BL = (lengths_B.unsqueeze(-1) - 1 - torch.arange(L, device=lengths_B.device)).clamp(min=0)
            x_BLD = x_BLD + nn.functional.embedding(back_BL, self.positions)
        x_BLD = self.dropout(x_BLD)
        for block in self.blocks[:-1]:
            x_BLD = block(x_BLD, lengths_B)
        last = cast(Block, self.blocks[-1])
        x_BLD = last.mix(x_BLD, lengths_B)
        x_TD = x_BLD.flatten(0, 1).index_select(0, masked_BL.flatten().nonzero().squeeze(1))
        return self.norm(last.feed_on(x_TD))

    def user_vectors(self, history: History) -> Tensor:
        """[B, D]: the state of a masked place after the newest events; with an empty history the mask stands alone."""
        history = newest(history, None if self.reach is None else self.reach - 1)
        items_BL, n_B1 = nn.functional.pad(history.items_BL, (0, 1)), history.lengths_B.unsqueeze(1)
        return self.states(items_BL, history.lengths_B + 1, torch.arange(items_BL.shape[1], device=n_B1.device) == n_B1)

    def item_vectors(self) -> Tensor:
        """[N + 1, D]."""
        return self.items.vectors()

    def training_pairs(self, batch: "SequenceBatch") -> Pairs:
        """Masked places, drawn from torch's global generator among the events that are targets of the window, and their states."""
        events_BL, lengths_B, is_target_BL = window_events(batch)
        if self.reach is not None and events_BL.shape[1] > self.reach:
            places_BL, lengths_B = newest_places(lengths_B, self.reach)
            events_BL, is_target_BL = events_BL.gather(1, places_BL), is_target_BL.gather(1, places_BL)
        masked_BL = draw_masked(is_target_BL, self.settings.mask_share, self.settings.max_masked)
        return Pairs(self.states(events_BL, lengths_B, masked_BL), events_BL[masked_BL], masked_BL.nonzero()[:, 0])


def window_events(batch: "SequenceBatch") -> tuple[Tensor, Tensor, Tensor]:
    """(events [B, L + 1]: a window's inputs and after them its newest target; their number [B]; bool [B, L + 1]: those that are targets)."""
    history, n_B1 = batch.history, batch.history.lengths_B.unsqueeze(1)
    newest_B1 = batch.targets_BL.gather(1, (n_B1 - 1).clamp(min=0))
    real_BL = padding_mask(history.lengths_B, history.items_BL.shape[1] + 1)
    events_BL = nn.functional.pad(history.items_BL, (0, 1)).masked_fill(~real_BL, 0).scatter(1, n_B1, newest_B1)
    is_target_BL = torch.cat([batch.first_targets_B.unsqueeze(1), batch.targets_BL], dim=1) > 0
    return events_BL, history.lengths_B + (newest_B1 > 0).squeeze(1), is_target_BL


def draw_masked(is_target_BL: Tensor, share: float, most: int) -> Tensor:
    """bool [B, L]: in each row with n targets, min(most, max(1, round(share · n))) of them, uniformly and without replacement."""
    n_B1 = is_target_BL.sum(1, keepdim=True)
    wanted_B1 = (share * n_B1).round().long().clamp(1, most).minimum(n_B1)
    K = min(most, is_target_BL.shape[1])
    drawn_BK = torch.rand(is_target_BL.shape, device=is_target_BL.device).masked_fill(~is_target_BL, 2).topk(K, largest=False).indices
    return torch.zeros_like(is_target_BL).scatter(1, drawn_BK, torch.arange(K, device=n_B1.device) < wanted_B1)
