"""IFA: interaction fidelity attention (Yu et al., Kuaishou, 2024, arXiv 2406.09742), a reconstruction; see docs/models/ifa.md.

B requests, L history, R newest events, C candidates, D width, H heads, G heads of all layers.

The abstract's: all candidates go in at once; linear attention reads the whole history, so no behaviour is dropped; relations among the candidates
are modelled; the loss is consistent between training and serving. Nothing else is published: every formula here is a reconstruction.

    O = read(q, Σ over the history)      X = q + W_O O, X = X + FFN(LN X)      Y = X + Attention(LN X among candidates)
    logit = head([q ; q * O ; X ; Y ; newest actions ; statistics])

Events are never changed by candidates, so the sums of all layers are one user state (attention/user_state.py) that serving may cache. On a CPU a
batch's few candidates read its events without one: the same numbers but for rounding.
Ours besides: an exact branch over the newest events, and the embedding and the head of the other rankers; values start as the vectors themselves,
so that O is in the terms of q. With feature_map clusters, the default, q and events get their features alike, from their directions; the other maps
read LN q. Events are not normalised before W_K (the reconstruction's LN): a learned temperature did as well, and LN cost a fifth of a training step.
The head's BatchNorm takes its statistics over all real candidates of a training batch, never over one request's set, and stored ones in eval mode.
"""

import hashlib
from functools import reduce

import torch
from torch import Tensor, nn

from longtrail.config import IFASettings
from longtrail.errors import StateError
from longtrail.models.attention.linear import LinearAttention
from longtrail.models.attention.user_state import UserState
from longtrail.models.contracts import Candidates, Context, History, Sizes
from longtrail.models.embedding import BehaviourEmbedding
from longtrail.models.head import Head
from longtrail.models.masks import padding_mask
from longtrail.models.order import between, newest
from longtrail.models.rankers.ifa_layers import Layer, Relation

EVENTS = 1 << 16  # of a history, embedded at once where a state is made
_READING = ("queries", "query_bias", "log_priors")  # weights of linear attention that states are not made of


class IFA(nn.Module):
    """Ranker. O(L · D · G · F + C · D²) time; from a user's state O(C · D²), whatever L was. Nothing of size C · L is ever built."""

    def __init__(self, settings: IFASettings, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings
        self.embedding = BehaviourEmbedding(sizes, settings.width, items=settings.items)
        width = self.embedding.width
        self.attention = None
        if settings.feature_map != "softmax":
            self.attention = LinearAttention(
                width,
                heads=settings.heads,
                features=settings.features,
                layers=settings.layers,
                feature_map=settings.feature_map,
                temperature=settings.temperature,
                half_life_days=settings.half_life_days,
                prior_events=settings.prior_events,
            )
            self.attention.start_values()
        self.layers = nn.ModuleList(Layer(settings, width) for _ in range(settings.layers))
        self.relation = Relation(width, settings.exact_heads, settings.relation) if settings.relation != "none" else None
        self.head = Head(4 * width + self.embedding.recent_width, settings.hidden, settings.dropout)

    def start_attention(self, items_n: Tensor, categories_n: Tensor) -> None:
        """feature_map: clusters, once item vectors have their start. Items int64 [n], as often as people meet them, and their categories."""
        if self.attention is not None and self.attention.map.clusters:
            self.attention.start_clusters(self.embedding.things(items_n, categories_n, items_n > 0))

    def forward(self, history: History, candidates: Candidates, context: Context, *, state: UserState | None = None, relation: bool = True) -> Tensor:
        """Logits [B, C].

        With `state`, made of the whole history, only the exact branch and the head's recent actions read `history`: its newest events are enough, as
        many as the larger of `recent_events` and RECENT_EVENTS (longtrail/models/embedding.py).
        `relation=False` scores every candidate by itself; relation_dropout trains the model to do without the others.
        """
        mask_BC = padding_mask(candidates.lengths_B, candidates.items_BC.shape[1])
        query_BCD = self.embedding.queries(candidates)
        read_BCD, x_BCD = self.read(history, query_BCD, state)
        y_BCD = x_BCD
        if self.relation is not None and relation:
            y_BCD = x_BCD + self._kept(self.relation(x_BCD, mask_BC))
        parts = [query_BCD, query_BCD * read_BCD, x_BCD, y_BCD, self.embedding.recent(history, mask_BC.shape[1])]
        return self.head(parts, candidates.statistics_BCF, context.statistics_BG, mask_BC)

    def read(self, history: History, query_BCD: Tensor, state: UserState | None = None) -> tuple[Tensor, Tensor]:
        """O of the first layer and X, [B, C, D] each: what each candidate reads of the history, and what becomes of it."""
        whole = self._keys(history) if self.attention is None or (state is None and self._reads_directly(history, query_BCD)) else None
        sums = self.state(history) if state is None and whole is None else state
        recent = self._keys(newest(history, self.settings.recent_events)) if self.settings.recent_events else None
        x_BCD, reads = query_BCD, []
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            normal_BCD = layer.normal(x_BCD)
            if self.attention is None:
                assert layer.whole is not None and whole is not None
                reads.append(layer.whole(normal_BCD, *whole))
            elif whole is not None:
                reads.append(self.attention.read_events(self._asked(x_BCD, normal_BCD), *whole, i))
            else:
                assert sums is not None
                reads.append(self.attention.read(self._asked(x_BCD, normal_BCD), sums, i))
            x_BCD = layer(x_BCD, normal_BCD, reads[-1], recent)
        return reads[0], x_BCD

    def state(self, history: History) -> UserState:
        """What linear attention keeps of each history, of any length: block by block of EVENTS events. Raises StateError for feature_map softmax."""
        if self.attention is None:
            raise StateError("feature_map: softmax keeps no user state; expected one of the linear feature maps")
        parts = []
        for start in range(0, history.items_BL.shape[1], EVENTS):
            part = between(history, start, start + EVENTS)
            keys_BLD, mask_BL = self._keys(part)
            parts.append(self.attention.state(keys_BLD, mask_BL, part.times_BL))
        return reduce(UserState.merge, parts)

    def update(self, state: UserState, events: History) -> UserState:
        """The state with new events, usually one, which may be older than others in it. O(D · G · F) an event."""
        return state.merge(self.state(events))

    def remove(self, state: UserState, events: History, newest_B: Tensor) -> UserState:
        """The state without events that are in it; `newest_B`: the time of the newest event that stays. Raises StateError (`UserState.remove`)."""
        return state.remove(self.state(events), newest_B)

    def version(self) -> str:
        """16 hex digits of all weights that states are made of: states of another version mean nothing to this model. Hashes every item vector."""
        weights = {f"embedding.{name}": tensor for name, tensor in self.embedding.state_dict().items()}
        if self.attention is not None:
            weights |= {f"attention.{name}": tensor for name, tensor in self.attention.state_dict().items() if name not in _READING}
        digest = hashlib.sha256(repr((self.settings.feature_map, self.settings.heads, self.settings.layers)).encode())
        for name, tensor in sorted(weights.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def restore(self, flat_BS: Tensor, version: str, *, expected: str) -> UserState:
        """A state from `UserState.flat` and the version that was stored with it; `expected` is this model's `version()`, which callers keep.

        Raises StateError where versions differ or the numbers do not fit.
        """
        if version != expected:
            raise StateError(f"user state: made by weights {version}; expected {expected}: build it again from the history")
        if self.attention is None:
            raise StateError("feature_map: softmax keeps no user state; expected one of the linear feature maps")
        values = self.attention.values
        return UserState.from_flat(flat_BS.to(values.device, values.dtype), **self.attention.shape, rates_G=self.attention.rates())

    @torch.no_grad()
    def behaviour_weights(self, history: History, candidates: Candidates) -> Tensor:
        """[B, C, L]: what each behaviour counts for each candidate when the first layer reads the history, the mean over heads; 0 on padding."""
        query_BCD = self.embedding.queries(candidates)
        keys_BLD, mask_BL = self._keys(history)
        layer = self.layers[0]
        assert isinstance(layer, Layer)
        normal_BCD = layer.normal(query_BCD)
        if self.attention is not None:
            return self.attention.weights(self._asked(query_BCD, normal_BCD), keys_BLD, mask_BL, history.times_BL)
        assert layer.whole is not None
        return layer.whole.weights(normal_BCD, keys_BLD, mask_BL)

    def _reads_directly(self, history: History, query_BCD: Tensor) -> bool:
        """Whether candidates are so few that they read the events themselves and no state is made."""
        L = history.items_BL.shape[1]
        return self.attention is not None and L <= EVENTS and self.attention.reads_directly(query_BCD, L)

    def _asked(self, x_BCD: Tensor, normal_BCD: Tensor) -> Tensor:
        """What linear attention is asked with: clusters take x as events are taken."""
        assert self.attention is not None
        return x_BCD if self.attention.map.clusters else normal_BCD

    def _keys(self, history: History) -> tuple[Tensor, Tensor]:
        mask_BL = padding_mask(history.lengths_B, history.items_BL.shape[1])
        return self.embedding.keys(history, mask_BL), mask_BL

    def _kept(self, relation_BCD: Tensor) -> Tensor:
        """In training, nothing of the relation for a share of the requests."""
        if not self.training or not self.settings.relation_dropout:
            return relation_BCD
        kept_B11 = torch.rand(len(relation_BCD), 1, 1, device=relation_BCD.device) >= self.settings.relation_dropout
        return relation_BCD * kept_B11
