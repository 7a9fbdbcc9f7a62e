"""How much log would decide? Sample sizes from the error that this log shows.

The error of a difference falls with the square root of the number of users, so a log of `factor` times as many (alike) users has
error / sqrt(factor). (Cohen, Statistical Power Analysis, 1988, ch. 2, for means; the error here is the clustered one of the paired difference.)
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import norm

POWER = 0.8  # our choice, and most people's


@dataclass(frozen=True, kw_only=True)
class Power:
    """Of one paired difference. Factors multiply the number of users of this log; None where the log has no error to go by."""

    power: float
    detectable: float | None  # the smallest true difference that a log as long as this finds with `power`
    detectable_relative: float | None  # of A's rate
    factor_for_observed: float | None  # were the difference really as large as it looks now
    factor_for_margin: float | None  # to find a difference as large as the margin, or to show that it is smaller
    users_for_margin: int | None

    def json(self) -> dict[str, Any]:
        return asdict(self)


def power_analysis(*, difference: float, error: float, rate_a: float, users: int, margin: float, confidence: float, power: float = POWER) -> Power:
    """`margin` is absolute, as `difference` and `error` (standard) are. The factor for the observed difference is as uncertain as that difference.

    For the margin the larger of two is given: to find a difference of that size, and to show that there is none of that size (TOST: both limits).
    """
    if not (np.isfinite(error) and error > 0 and np.isfinite(difference)):
        return Power(power=power, detectable=None, detectable_relative=None, factor_for_observed=None, factor_for_margin=None, users_for_margin=None)
    outer = float(norm.ppf(0.5 + confidence / 2))
    find = (outer + float(norm.ppf(power))) * error
    show_none = (outer + float(norm.ppf((1 + power) / 2))) * error
    factor_margin = (max(find, show_none) / margin) ** 2 if margin > 0 else None
    return Power(
        power=power,
        detectable=find,
        detectable_relative=find / rate_a if rate_a > 0 else None,
        factor_for_observed=(find / difference) ** 2 if difference != 0 else None,
        factor_for_margin=factor_margin,
        users_for_margin=None if factor_margin is None else int(np.ceil(factor_margin * users)),
    )
