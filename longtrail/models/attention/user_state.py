"""What linear attention keeps of a user: sums over their events. B users, G heads, F features and E values of a head, S floats of a flat state.

Ours: IFA's authors published no formulas. That such sums can be cached and updated one event at a time follows from linear attention itself.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longtrail.errors import StateError

DAY = 86_400_000_000  # µs
_HEAD = 5  # floats of a flat state before its sums: the number of events, and its time in four digits of base 2^16
_DIGITS = (0, 16, 32, 48)


@dataclass(frozen=True, kw_only=True)
class UserState:
    """A = Σ w φ(k) vᵀ and z = Σ w φ(k) over each user's events; float32, or float64 of a float64 model, never lower.

    Sums are as of `times_B`: with decay, w = exp(-rate · age) at that time.
    """

    sums_BGFE: Tensor  # A
    norms_BGF: Tensor  # z
    events_B: Tensor  # int64
    times_B: Tensor  # int64, UTC µs, the newest event; 0 where there was none
    rates_G: Tensor | None  # 1 / day; None without decay

    def merge(self, other: "UserState") -> "UserState":
        """The state of the events of both, in whatever order they came. O(G · F · E) time."""
        return self._joined(other, 1)

    def remove(self, part: "UserState", newest_B: Tensor) -> "UserState":
        """The state that the other events alone would have made: without those of `part`, which must be in it, and as of `newest_B`.

        `newest_B`: int64 [B], the time of the newest event that stays; a user of whom none stays is emptied whatever it says. Rounding errors
        stay, and what is seen from an earlier time has them grown with it, so rebuild states now and then. Raises StateError where half of a
        number's digits would be rounding: that history must be read again.
        """
        left = self._joined(part, -1)
        empty_B = left.events_B == 0
        left = left._earlier(torch.where(empty_B, left.times_B, newest_B))
        return replace(
            left,
            times_B=left.times_B.masked_fill(empty_B, 0),
            sums_BGFE=left.sums_BGFE.masked_fill(empty_B.view(-1, 1, 1, 1), 0),
            norms_BGF=left.norms_BGF.masked_fill(empty_B.view(-1, 1, 1), 0),
        )

    def _earlier(self, times_B: Tensor) -> "UserState":
        """`at` a time before the state's own. Raises StateError as `remove` does."""
        if self.rates_G is not None:
            digits = -math.log(torch.finfo(self.norms_BGF.dtype).eps) / 2
            gone = ((self.times_B - times_B).double() / DAY * self.rates_G.max() > digits).nonzero()
            if len(gone):
                raise StateError(
                    f"user state: row {int(gone[0])}: too much has decayed since its newest other event; build it again from the history"
                )
        return self.at(times_B)

    def at(self, times_B: Tensor) -> "UserState":
        """The same events seen from `times_B`. Seen from before the state's own times, rounding errors grow too: see `remove`."""
        if self.rates_G is None:
            return replace(self, times_B=times_B)
        days_B1 = ((times_B - self.times_B).double() / DAY).to(self.norms_BGF.dtype).unsqueeze(-1)
        kept_BG1 = torch.exp(-days_B1 * self.rates_G).unsqueeze(-1)
        return replace(self, times_B=times_B, sums_BGFE=self.sums_BGFE * kept_BG1.unsqueeze(-1), norms_BGF=self.norms_BGF * kept_BG1)

    def flat(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[B, S] on the CPU: events (exact to 2^24, 2^53 in float64), time (exact), sums, norms. S does not depend on how many events there were."""
        digits_B4 = torch.stack([(self.times_B >> shift) & 0xFFFF for shift in _DIGITS], dim=1)
        parts = (self.events_B.unsqueeze(1), digits_B4, self.sums_BGFE.flatten(1), self.norms_BGF.flatten(1))
        return torch.cat([part.detach().to("cpu", dtype) for part in parts], dim=1)

    @staticmethod
    def from_flat(flat_BS: Tensor, *, heads: int, features: int, values: int, rates_G: Tensor | None) -> "UserState":
        """The inverse of `flat`, in its dtype. Raises StateError for any other shape, or numbers that are not finite."""
        size = _HEAD + heads * features * (values + 1)
        if flat_BS.ndim != 2 or flat_BS.shape[1] != size:
            raise StateError(f"user state: shape {tuple(flat_BS.shape)}; expected [users, {size}]")
        wrong = (~torch.isfinite(flat_BS).all(1)).nonzero()
        if len(wrong):
            raise StateError(f"user state: row {int(wrong[0])} holds a number that is not finite; build it again from the history")
        head_BH, sums_BS, norms_BS = flat_BS.split([_HEAD, heads * features * values, heads * features], dim=1)
        whole_BH = head_BH.to(torch.int64)
        return UserState(
            sums_BGFE=sums_BS.reshape(-1, heads, features, values),
            norms_BGF=norms_BS.reshape(-1, heads, features),
            events_B=whole_BH[:, 0],
            times_B=torch.stack([whole_BH[:, 1 + i] << shift for i, shift in enumerate(_DIGITS)]).sum(0),
            rates_G=rates_G,
        )

    def _joined(self, other: "UserState", sign: int) -> "UserState":
        times_B = torch.maximum(self.times_B, other.times_B)
        left, right = self.at(times_B), other.at(times_B)
        return replace(
            left,
            sums_BGFE=left.sums_BGFE + sign * right.sums_BGFE,
            norms_BGF=left.norms_BGF + sign * right.norms_BGF,
            events_B=left.events_B + sign * right.events_B,
        )
