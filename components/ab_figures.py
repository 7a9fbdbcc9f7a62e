"""The pictures of the A/B report, drawn for a phone's width: few, with words beside them."""

from typing import TYPE_CHECKING, Any

from components.ab_words import points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"a": "#5b6675", "b": "#1f6fb2", "logged": "#b0762b", "truth": "#b3372e"}
FINDINGS = {"better": "#1a7f4b", "worse": "#b3372e", "no difference shown": "#1f6fb2", "too little data": "#b8c0ca"}
SHORT = {"ips": "IPS", "snips": "SNIPS", "dr": "DR", "dm": "DM", "sndr": "SNDR", "clipped_ips": "clipped IPS", "switch_dr": "switch DR"}
SHORT |= {"shrinkage_dr": "shrinkage DR", "slate_ips": "whole list", "pseudo_inverse": "pseudo-inverse"}
WIDTH = 4.6  # inches; the page scales it
INK = "#1c2430"


def new_figure(heights: list[float]) -> "tuple[Figure, list[Axes]]":
    """Axes one above another. Made without pyplot: no global state, no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    axes = [figure.add_subplot(grid[row, 0]) for row in range(len(heights))]
    for axis in axes:
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        axis.grid(axis="x", color="#e4e8ed", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=9)
    return figure, axes


def over_time(result: dict[str, Any]) -> "Figure":
    """Above: the rates, span by span. Below: B − A so far, with the interval that holds at all spans together."""
    series = result["over_time"]
    figure, (rates, gap) = new_figure([2.3, 2.3])
    places = list(range(1, len(series["until"]) + 1))
    for key, label in (("logged", "the log itself"), ("a", f"A {result['a']['name']}"), ("b", f"B {result['b']['name']}")):
        values = [float("nan") if value is None else 100 * value for value in series[key]]
        rates.plot(places, values, "o-", color=COLOURS[key], label=label, linewidth=1.5, markersize=3)
    rates.set_ylabel("clicks per 100", fontsize=9)
    rates.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=1, fontsize=8.5, frameon=False)
    _running(gap, series["running"])
    if "truth" in result:
        gap.axhline(100 * result["truth"]["difference"], color=COLOURS["truth"], linewidth=1, linestyle="--", label="truth")
        gap.legend(loc="best", fontsize=8.5, frameon=False)
    for axis in (rates, gap):
        _ticks(axis, series["until"])
    gap.set_xlabel("span of the log that ends on (month-day)", fontsize=9)
    return figure


def daily(result: dict[str, Any]) -> "Figure":
    """A live test's difference so far, with the interval that holds on all days together."""
    figure, (gap,) = new_figure([2.6])
    _running(gap, [day["running"] for day in result["days"]])
    _ticks(gap, [day["until"] for day in result["days"]])
    gap.set_xlabel("day (month-day)", fontsize=9)
    return figure


def segments(result: dict[str, Any]) -> "Figure":
    """A forest: B − A in every segment, under the whole."""
    rows = result["segments"]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    lines: list[tuple[str, dict[str, Any] | None, str]] = [("all", result["interval"], COLOURS["b"])]
    for kind in kinds:
        lines.append((kind, None, INK))
        lines += [(f"  {_short(row['label'])}", row["difference"], FINDINGS[row["finding"]]) for row in rows if row["kind"] == kind]
    figure, (axis,) = new_figure([0.9 + 0.25 * len(lines)])
    shown = [line[1] for line in lines if line[1] is not None and line[1]["low"] is not None and line[2] != FINDINGS["too little data"]]
    axis.axvline(0, color=INK, linewidth=0.8)
    for place, (_, estimate, colour) in enumerate(lines):
        if estimate is not None:
            bar(axis, estimate, place, colour, None)
    if shown:  # a segment of three people must not set the scale
        low, high = min(100 * e["low"] for e in shown), max(100 * e["high"] for e in shown)
        room = 0.08 * max(high - low, 1e-9)
        axis.set_xlim(min(low - room, -room), max(high + room, room))
    axis.set_yticks(range(len(lines)), [line[0] for line in lines])
    for tick, (_, estimate, _) in zip(axis.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("bold" if estimate is None else "normal")
    axis.set_ylim(len(lines) - 0.4, -0.6)
    axis.set_xlabel("B − A, points", fontsize=9)
    return figure


def estimates(result: dict[str, Any]) -> "Figure":
    """Every estimator's rates of A and B, and their difference."""
    names = list(result["difference"])
    height = 0.7 + 0.36 * len(names)
    figure, (rates, gap) = new_figure([height + 0.4, height])
    truth = result.get("truth")
    for row, name in enumerate(names):
        for side, shift in (("a", -0.16), ("b", 0.16)):
            label = f"{side.upper()} {result[side]['name']}" if row == 0 else None
            bar(rates, result[side]["estimates"][name], row + shift, COLOURS[side], label)
        bar(gap, result["difference"][name], row, COLOURS["b"], None)
    if truth:
        for side, style in (("a", "--"), ("b", "-")):
            rates.axvline(100 * truth[side], color=COLOURS["truth"], linestyle=style, linewidth=1, label=f"truth of {side.upper()}")
        gap.axvline(100 * truth["difference"], color=COLOURS["truth"], linewidth=1)
    gap.axvline(0, color=INK, linewidth=0.8)
    titles = [f"{SHORT.get(name, name.replace('_', ' '))}{' *' if name == result['estimator'] else ''}" for name in names]
    for axis, label in ((rates, "clicks per 100 impressions"), (gap, "B − A, points")):
        axis.set_yticks(range(len(names)), titles)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlabel(label, fontsize=9)
    rates.legend(loc="lower center", bbox_to_anchor=(0.3, 1.0), ncols=2 if truth else 1, fontsize=8.5, frameon=False)
    return figure


def weights(result: dict[str, Any]) -> "Figure":
    """How the weights are distributed, and how many requests they are worth."""
    figure, (shares, effective) = new_figure([2.6, 1.5])
    for side, shift in (("a", -0.2), ("b", 0.2)):
        found = result["diagnostics"][side]
        histogram = found["weight_histogram"]
        places = [index + shift for index in range(len(histogram["shares"]))]
        label = f"{side.upper()} {result[side]['name']}"
        shares.bar(places, [100 * share for share in histogram["shares"]], width=0.4, color=COLOURS[side], label=label)
        effective.barh([side.upper()], [found["effective_requests"]], color=COLOURS[side], height=0.55)
        effective.annotate(f" {found['effective_requests']:,.0f}", (found["effective_requests"], side.upper()), va="center", fontsize=9)
    edges = result["diagnostics"]["a"]["weight_histogram"]["edges"]
    shares.set_xticks([i - 0.5 for i in range(0, len(edges), 4)], [_power(edge) for edge in edges[::4]])
    shares.set_xlabel("weight of a request (outer bars hold all beyond)", fontsize=9)
    shares.set_ylabel("% of requests", fontsize=9)
    shares.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=1, fontsize=8.5, frameon=False)
    effective.barh(["logged"], [result["requests"]], color="#d5dbe2", height=0.55)
    effective.annotate(f" {result['requests']:,}", (result["requests"], "logged"), va="center", fontsize=9)
    effective.set_xlabel("requests: logged, and worth for each policy", fontsize=9)
    effective.margins(x=0.22)
    effective.locator_params(axis="x", nbins=4)
    return figure


def calibration(result: dict[str, Any]) -> "Figure":
    """Observed over expected weight of each group of candidates."""
    groups = list(dict.fromkeys(share["group"] for share in result["calibration"]))
    figure, (axis,) = new_figure([1.0 + 0.4 * len(groups)])
    axis.axvline(1, color=INK, linewidth=0.8)
    named = set()
    for share in result["calibration"]:
        side = share["policy"] if share["policy"] in COLOURS else "logged"
        height = groups.index(share["group"]) + {"a": -0.14, "b": 0.14}.get(side, 0.0)
        colour = COLOURS[side] if share["low"] <= 1 <= share["high"] else FINDINGS["worse"]
        axis.plot([share["low"], share["high"]], [height, height], color=colour, linewidth=2.2, solid_capstyle="butt")
        axis.plot(
            [share["ratio"]], [height], "o", color=COLOURS[side], markersize=5, label=None if side in named else f"by {share['policy'].upper()}"
        )
        named.add(side)
    axis.set_yticks(range(len(groups)), groups)
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.set_xlabel("weight found over weight expected", fontsize=9)
    axis.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=2, fontsize=8.5, frameon=False)
    return figure


def _running(axis: "Axes", runs: list[dict[str, Any]]) -> None:
    known = [(place, run) for place, run in enumerate(runs, start=1) if run["value"] is not None]
    sure = [(place, run) for place, run in known if run["low"] is not None]
    axis.plot([place for place, _ in known], [100 * run["value"] for _, run in known], "o-", color=COLOURS["b"], linewidth=1.5, markersize=3)
    places, lows, highs = ([p for p, _ in sure], [100 * r["low"] for _, r in sure], [100 * r["high"] for _, r in sure])
    axis.fill_between(places, lows, highs, color=COLOURS["b"], alpha=0.18, linewidth=0)
    if sure:  # the first, wide bands must not set the scale
        half = 1.5 * max(highs[-1] - lows[-1], 1e-9)
        values = [100 * run["value"] for _, run in known]
        axis.set_ylim(min(*values, values[-1] - half, -0.2 * half), max(*values, values[-1] + half, 0.2 * half))
    axis.axhline(0, color=INK, linewidth=0.8)
    axis.set_ylabel("B − A so far, points", fontsize=9)


def _ticks(axis: "Axes", until: list[str]) -> None:
    places = list(range(1, len(until) + 1))
    step = max(1, -(-len(places) // 4))
    axis.set_xlim(0.5, len(places) + 0.5)
    axis.set_xticks(places[::step], [text[5:] for text in until][::step])


def bar(axis: "Axes", estimate: dict[str, Any], height: float, colour: str, label: str | None) -> None:
    if estimate["value"] is None:
        return
    if estimate["low"] is not None:
        axis.plot([100 * estimate["low"], 100 * estimate["high"]], [height, height], color=colour, linewidth=2.2, solid_capstyle="butt")
    axis.plot([100 * estimate["value"]], [height], "o", color=colour, markersize=5, label=label)


def series_csv(result: dict[str, Any]) -> str:
    """The difference over time as a table, for DVC's own plots; what is undefined is empty."""
    series = result["over_time"]
    lines = ["until,logged,a,b,difference,low,high"]
    for until, logged, a, b, run in zip(*(series[key] for key in ("until", "logged", "a", "b", "running")), strict=True):
        values = (logged, a, b, run["value"], run["low"], run["high"])
        lines.append(",".join([until, *("" if value is None else repr(value) for value in values)]))
    return "\n".join(lines) + "\n"


def describe_segments(result: dict[str, Any]) -> str:
    """The forest in words, for those who cannot see it."""
    rows = [f"{row['kind']} {row['label']}: {points(row['difference']['value'])} ({row['finding']})" for row in result["segments"]]
    return "Difference by segment, in points. " + "; ".join(rows)


def _short(label: str, most: int = 18) -> str:
    return label if len(label) <= most else f"{label[: most - 1]}…"


def _power(edge: float) -> str:
    return f"{edge:g}" if edge >= 1 else f"1/{1 / edge:g}"
