"""Linear cross attention: candidates ask a sum over the history's events, not the events.

B users, L history, C candidates, D width, H heads of a layer, G heads of all layers, F features and E = D / H values of a head.

With a feature map φ in the place of exp(q · k), what candidate c reads in one head is

    O_c = φ(q_c)ᵀ A / φ(q_c)ᵀ z      A = Σ_l w_l φ(k_l) v_lᵀ  [F, E]      z = Σ_l w_l φ(k_l)  [F]

Published elsewhere (Katharopoulos et al., ICML 2020): this form, and elu1. IFA's authors published no formulas: its place here is a reconstruction.
Ours: a learned temperature a head, decay w_l = exp(-rate · age), all layers' sums in one pass, and values projected after the sum, which is equal by
linearity and saves a projection of the history: Σ φ(k) (W s)ᵀ = (Σ φ(k) sᵀ) Wᵀ. And the map `clusters`: φ(x) = softmax(t (x · c_f / |x| + b_f)) says
to which of F clusters of directions x belongs, the same for events and candidates at first, and the read is divided by φ(q)ᵀz + p. So the weight of
an event is 1 where it is surely of the candidate's cluster, and few such events say little: m of them count m / (m + p).

A state serves any number of candidates. Few of them, of a batch's whole histories on a CPU, read the events themselves (`read_events`): the same
numbers in another order, Σ_l (φ(q)ᵀ φ(k_l)) v_l, by compiled code (linear_layer.py).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtrail.models.attention.alike import cluster_centres
from longtrail.models.attention.feature_maps import FEATURE_MAPS, inner, over_length
from longtrail.models.attention.linear_sums import Sums
from longtrail.models.attention.user_state import DAY, UserState
from longtrail.models.precision import at_least_float32

COMPILED_WIDTH, COMPILED_UNITS = 32, 4  # what linear_layer.py takes D and H · F in
COMPILED_EVENTS = 1 << 14  # of a batch, from which on it is used: numba takes half a second to load
DIRECT_COST = 0.5  # of one multiply-add of a candidate's read, measured against one of adding up and reading a state, forward and backward
_SMALLEST = 1e-6  # of a divisor, where the newest event alone may count 1; sums are float32 at least
_LEAST_VARIANCE = 1e-2  # of directions, whose squared length is 1


class LinearAttention(nn.Module):
    """Makes user states, for all layers in one pass over the behaviours, and reads them."""

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        features: int,
        layers: int = 1,
        feature_map: str = "elu1",
        temperature: float = 1.0,
        half_life_days: float | None = None,
        prior_events: float = 1.0,
    ) -> None:
        super().__init__()
        G, E = layers * heads, width // heads
        self.shape = {"heads": G, "features": features, "values": E}
        self.heads = heads
        self.kind, self.map = feature_map, FEATURE_MAPS[feature_map]
        self.keys = nn.Parameter(torch.randn(width, G * features) * width**-0.5)
        self.queries = nn.Parameter(torch.randn(layers, width, heads * features) * width**-0.5)
        self.values = nn.Parameter(torch.randn(G, width, E) * width**-0.5)
        self.temperature = nn.Parameter(torch.full((G,), temperature))
        clusters = self.map.clusters
        self.key_bias = nn.Parameter(torch.zeros(G * features)) if clusters else None
        self.query_bias = nn.Parameter(torch.zeros(G * features)) if clusters else None  # flat, as key_bias: weight decay leaves vectors alone
        self.log_priors = nn.Parameter(torch.full((G,), math.log(prior_events))) if clusters else None
        self.log_rates = None
        if half_life_days is not None:  # head h of a layer forgets 4^h times as fast as its head 0
            slowest = math.log(math.log(2) / half_life_days)
            self.log_rates = nn.Parameter(slowest + math.log(4) * torch.arange(heads).repeat(layers))

    @torch.no_grad()
    def start_values(self) -> None:
        """Values start as the vectors themselves: together the heads of a layer read a mean of events, in the terms that candidates are in."""
        D, E = self.keys.shape[0], self.shape["values"]
        parts_HDE = torch.eye(D).view(D, self.heads, E).transpose(0, 1)
        self.values.copy_(parts_HDE.repeat(len(self.queries), 1, 1))

    @torch.no_grad()
    def start_clusters(self, x_nD: Tensor) -> None:
        """For `clusters`: features start as the clusters of these vectors' directions, the same for events and for candidates.

        Of a vector and a cluster's centre c, φ is given t (x · c / |x| - |c|² / 2) / v, v the variance of the directions about their mean and t the
        temperature: half the squared distance, at the data's scale. Each head of each layer has clusters of its own.
        """
        assert self.key_bias is not None and self.query_bias is not None
        direction_nD = x_nD * over_length(x_nD)
        variance = max(float(direction_nD.var(0, correction=0).sum()), _LEAST_VARIANCE)
        F = self.shape["features"]
        for g in range(self.shape["heads"]):
            centres_FD = cluster_centres(direction_nD, F, seed=g)
            (layer, head), features = divmod(g, self.heads), slice(g * F, (g + 1) * F)
            own = slice(head * F, (head + 1) * F)
            self.keys[:, features] = self.queries[layer][:, own] = centres_FD.T / variance
            self.key_bias[features] = self.query_bias[features] = -centres_FD.square().sum(1) / (2 * variance)

    def rates(self) -> Tensor | None:
        """[G], 1 / day."""
        return None if self.log_rates is None else self.log_rates.exp()

    def state(self, keys_BLD: Tensor, mask_BL: Tensor, times_BL: Tensor | None = None) -> UserState:
        """Keys must be zeros on padding; times matter with decay. O(L · D · G · F) time; beside its inputs at most features are kept."""
        with torch.autocast(keys_BLD.device.type, enabled=False):
            keys_BLD = at_least_float32(keys_BLD)
            (B, L, D), G, F = keys_BLD.shape, self.shape["heads"], self.shape["features"]
            times_B, days_BL = _ages(mask_BL, mask_BL.new_zeros(B, L, dtype=torch.int64) if times_BL is None else times_BL, keys_BLD.dtype)
            rates_G = self.rates()
            slopes = self._slopes if torch.is_grad_enabled() and rates_G is None and self.map.slopes is not None else None
            sums_BXD, norms_BX = Sums.apply(keys_BLD, *self._key_weights(), mask_BL, days_BL, rates_G, self._weighted_features, slopes)
            return UserState(
                sums_BGFE=sums_BXD.view(B, G, F, D) @ self.values,
                norms_BGF=norms_BX.view(B, G, F),
                events_B=mask_BL.sum(1),
                times_B=times_B,
                rates_G=rates_G,
            )

    def read(self, query_BCD: Tensor, state: UserState, layer: int) -> Tensor:
        """O [B, C, D] of one layer; zeros without events, whatever rounding left in the sums."""
        heads = slice(layer * self.heads, (layer + 1) * self.heads)
        with torch.autocast(query_BCD.device.type, enabled=False):
            features_BHCF = self._query_features(query_BCD, layer)
            sums_BHFE, norms_BHF1 = state.sums_BGFE[:, heads], state.norms_BGF[:, heads].unsqueeze(-1)
            if self.map.divide == "feature":
                sums_BHFE = sums_BHFE / norms_BHF1.clamp(min=torch.finfo(norms_BHF1.dtype).tiny)
            return self._divided(features_BHCF @ sums_BHFE, features_BHCF @ norms_BHF1, state.events_B, heads)

    def reads_directly(self, query_BCD: Tensor, L: int) -> bool:
        """Whether `read_events` knows such candidates and histories of L events, and is quicker than `state` and `read`.

        Never for one request alone: whoever serves it keeps a state, and does not wait for a compiler.
        """
        (B, C, D), H, F = query_BCD.shape, self.heads, self.shape["features"]
        fits = D % COMPILED_WIDTH == 0 and H * F % COMPILED_UNITS == 0 and self.map.compiled and self.log_rates is None
        plain = query_BCD.device.type == "cpu" and query_BCD.dtype == self.keys.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return fits and plain and B > 1 and B * L >= COMPILED_EVENTS and C * (F + D) * DIRECT_COST <= F * D

    def read_events(self, query_BCD: Tensor, keys_BLD: Tensor, mask_BL: Tensor, layer: int) -> Tensor:
        """`read` of `state`, but for rounding: where `reads_directly` says so. Real places stand first. Once differentiable.

        O(L · D · H · F + C · L · H · (F + D)) time a layer, of which the second part takes the place of adding up a state.
        """
        from longtrail.models.attention.linear_layer import KINDS, reads  # numba takes half a second, and small batches do without

        heads, F = slice(layer * self.heads, (layer + 1) * self.heads), self.shape["features"]
        own = slice(heads.start * F, heads.stop * F)
        weights_DX, bias_X = self._key_weights()
        features_BCX = self._query_features(query_BCD, layer).transpose(1, 2).flatten(2)
        events_B = mask_BL.sum(1)
        sums_BCHD, norms_BCH = reads(
            keys_BLD,
            weights_DX[:, own].T,
            None if bias_X is None else bias_X[own],
            features_BCX,
            events_B,
            kind=KINDS[self.kind],
            heads=self.heads,
        )
        return self._divided(sums_BCHD.transpose(1, 2) @ self.values[heads], norms_BCH.transpose(1, 2).unsqueeze(-1), events_B, heads)

    def _divided(self, read_BHCE: Tensor, norms_BHC1: Tensor, events_B: Tensor, heads: slice) -> Tensor:
        """O [B, C, D] of Σ w v and Σ w; zeros without events."""
        read_BHCE = self._normalised(read_BHCE, norms_BHC1, heads)
        return read_BHCE.masked_fill((events_B == 0).view(-1, 1, 1, 1), 0).transpose(1, 2).flatten(2)

    def _normalised(self, x_BHCX: Tensor, norms_BHC1: Tensor, heads: slice) -> Tensor:
        """Sums of w v, or the w themselves, over what weights are divided by: one rule for reads and for the weights that explain them."""
        if self.map.divide == "sum":
            return x_BHCX / norms_BHC1.clamp(min=_SMALLEST)
        if self.map.divide == "prior":
            return x_BHCX / (norms_BHC1 + self._priors(heads))
        return x_BHCX * self.shape["features"] ** -0.5 if self.map.divide == "none" else x_BHCX

    def weights(self, query_BCD: Tensor, keys_BLD: Tensor, mask_BL: Tensor, times_BL: Tensor, layer: int = 0) -> Tensor:
        """[B, C, L], the mean over heads of what each pair counts in `read`; 0 on padding. To explain, not to train: it builds every pair."""
        heads = slice(layer * self.heads, (layer + 1) * self.heads)
        _, days_BL = _ages(mask_BL, times_BL, keys_BLD.dtype)
        inner_BLX = inner(at_least_float32(keys_BLD), *self._key_weights())
        features_BLX = self._weighted_features(inner_BLX, days_BL, self.rates()).masked_fill(~mask_BL.unsqueeze(-1), 0)
        keys_BHLF = features_BLX.unflatten(-1, (-1, self.shape["features"])).transpose(1, 2)[:, heads]
        if self.map.divide == "feature":
            keys_BHLF = keys_BHLF / keys_BHLF.sum(2, keepdim=True).clamp(min=torch.finfo(keys_BHLF.dtype).tiny)
        weights_BHCL = self._query_features(query_BCD, layer) @ keys_BHLF.transpose(2, 3)
        return self._normalised(weights_BHCL, weights_BHCL.sum(-1, keepdim=True), heads).mean(1)

    def _priors(self, heads: slice) -> Tensor:
        """[H, 1, 1]."""
        assert self.log_priors is not None
        return self.log_priors[heads].exp().view(-1, 1, 1)

    def _key_weights(self) -> tuple[Tensor, Tensor | None]:
        """[D, X] and [X]: W_K and its bias, each head's part times its temperature."""
        temperature_X = self.temperature.repeat_interleave(self.shape["features"])
        return self.keys * temperature_X, None if self.key_bias is None else self.key_bias * temperature_X

    def _weighted_features(self, inner_BLX: Tensor, days_BL: Tensor, rates_G: Tensor | None) -> Tensor:
        """w φ(k) [B, L, X]."""
        features_BLGF = self.map.keys(inner_BLX.unflatten(-1, (-1, self.shape["features"])))
        if rates_G is not None:
            features_BLGF = features_BLGF * torch.exp(-days_BL.unsqueeze(-1) * rates_G).unsqueeze(-1)
        return features_BLGF.flatten(2)

    def _slopes(self, features_BLX: Tensor, grad_BLX: Tensor) -> Tensor:
        """The gradient by what φ was given."""
        assert self.map.slopes is not None
        parts = (x.unflatten(-1, (-1, self.shape["features"])) for x in (features_BLX, grad_BLX))
        return self.map.slopes(*parts).flatten(2)

    def _query_features(self, query_BCD: Tensor, layer: int) -> Tensor:
        """φ(q) [B, H, C, F]."""
        temperature_H = self.temperature[layer * self.heads : (layer + 1) * self.heads]
        temperature_X = temperature_H.repeat_interleave(self.shape["features"])
        bias_X = None if self.query_bias is None else self.query_bias.view(len(self.queries), -1)[layer] * temperature_X
        inner_BCX = inner(at_least_float32(query_BCD), self.queries[layer] * temperature_X, bias_X)
        return self.map.queries(inner_BCX.unflatten(-1, (self.heads, -1))).transpose(1, 2)


def _ages(mask_BL: Tensor, times_BL: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The newest event's time [B], 0 without events, and each event's age in days at that time [B, L], 0 on padding."""
    times_B = functional.pad(times_BL.masked_fill(~mask_BL, 0), (1, 0)).amax(1)
    return times_B, ((times_B.unsqueeze(1) - times_BL).double() / DAY).to(dtype).masked_fill(~mask_BL, 0)
