"""The real Open Bandit logs, small: every policy judged from the other's log, beside what it really got."""

import pytest

from components.open_bandit import html, judge

# Doubly robust, as on 2026-11-22, and what the policy really got (clicks of 10,000 rows in its own log).
FROZEN = {
    ("all", "random", "bts"): (0.0051, 0.0042),
    ("all", "bts", "random"): (0.0025, 0.0038),
    ("men", "random", "bts"): (0.0057, 0.0069),
    ("men", "bts", "random"): (0.0032, 0.0046),
    ("women", "random", "bts"): (0.0058, 0.0046),
    ("women", "bts", "random"): (-0.0011, 0.0046),
}
FEW = ("women", "bts", "random")  # 2 effective rows: one heavy row decides, and the page says "too few"


@pytest.mark.parametrize("campaign", ["all", "men", "women"])
def test_estimates_beside_what_the_policies_really_got(campaign):
    """All six agree by IPS, SNIPS, DR and self-normalised DR: 0 lies in the 95 % interval of estimate − reality, which holds both logs' errors.
    The direct method, and what leans on it, need not: its interval knows nothing of the model's error."""
    results = judge("small", campaign, 0.95)
    assert [(r["log"], r["target"]) for r in results] == [("random", "bts"), ("bts", "random")]
    for result in results:
        key = (campaign, result["log"], result["target"])
        estimate, real = FROZEN[key]
        assert result["rows"] == 10_000 and result["real"]["value"] == pytest.approx(real, abs=1e-9)
        assert result["estimates"]["dr"]["value"] == pytest.approx(estimate, abs=1e-4)
        for name in ("ips", "snips", "dr", "sndr"):
            assert result["gap"][name]["low"] <= 0 <= result["gap"][name]["high"], (key, name)
        assert (result["effective_rows"] < 100) == (key == FEW)
        assert set(result["tuned"]) == {"clipped_ips", "switch_dr", "shrinkage_dr"}
        if result["log"] == "random":  # a uniform log of 80, 34 or 46 items: replay keeps about as small a share
            kept = {"all": 80, "men": 34, "women": 46}[campaign]
            assert result["replay_rows"] == pytest.approx(10_000 / kept, rel=0.25) and "replay" in result["gap"]
        else:
            assert "not uniform" in result["refused"]["replay"] and result["replay_rows"] == 0
    page = html(results, 0.95)
    assert "rows kept" in page and "of 2 estimates agree" in page
