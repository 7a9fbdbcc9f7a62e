"""The page an A/B test leaves behind: the verdict, the figures behind it, and whether to believe them."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from components.report_page import Section, badge, figure_html, page, paragraph, table_html

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TONES = {"win": "good", "lose": "bad", "not enough data": "warn"}
ESTIMATORS = {"ips": "IPS", "snips": "self-normalised IPS", "dr": "doubly robust"}
COLOURS = {"a": "#5b6675", "b": "#1f6fb2", "logged": "#b0762b", "truth": "#b3372e"}
WIDTH = 5.2  # inches; the page scales it


def html(result: dict[str, Any]) -> str:
    """One self-contained page of what `components.ab_test` found."""
    a, b = result["a"]["name"], result["b"]["name"]
    sections = [
        Section("Click-through rates", _rates(result), _truth_note(result)),
        Section("Every estimate", figure_html(_forest(result), f"Estimates of the click-through rates of {a} and {b}, and of their difference")),
        Section(
            "Can it be believed?",
            _checks(result),
            "Any line that fails makes the verdict 'not enough data'. All passing does not prove the log right: propensities that "
            "were logged wrongly, "
            "or users who behave differently because of what they see, show in no figure here.",
        ),
        Section(
            "Weights",
            figure_html(_weights(result), "How the weights of the requests are distributed, for both policies"),
            "A weight says how much more often a policy would show a list than the logger did. Near 1: the log shows what the policy "
            "would do. A long "
            "tail to the right: a few requests decide the estimate. Much at the left: most of the log is about things the policy would not show.",
        ),
        Section(
            "Over the log",
            figure_html(_over_time(result), "Click-through rates over the time of the log"),
            "The same estimate in spans of equally many rows. Single spans are noisy; a trend in all lines means that the world changed.",
        ),
        Section("How it was computed", _method(result)),
        Section("What to do next", paragraph(_next(result))),
    ]
    return page(f"A/B test: {b} against {a}", sections, lead=result["sentence"], tone=TONES[result["verdict"]])


def metrics(result: dict[str, Any]) -> dict[str, Any]:
    """Flat figures for DVC and Kubeflow; an undefined one is left out."""
    name = result["estimator"]
    difference = result["difference"][name]
    flat = {
        "ctr_a": result["a"]["estimates"][name]["value"],
        "ctr_b": result["b"]["estimates"][name]["value"],
        "difference": difference["value"],
        "difference_low": difference["low"],
        "difference_high": difference["high"],
        "relative": difference["relative"]["value"],
        "effective_requests_a": result["diagnostics"]["a"]["effective_requests"],
        "effective_requests_b": result["diagnostics"]["b"]["effective_requests"],
        "requests": result["requests"],
        "win": int(result["verdict"] == "win"),
    }
    if "truth" in result:
        flat |= {f"truth_{side}": result["truth"][side] for side in ("a", "b")}
    return {key: value for key, value in flat.items() if value is not None}


# ---------------------------------------------------------------- words and tables


def _rates(result: dict[str, Any]) -> str:
    name, confidence = result["estimator"], f"{result['confidence']:.0%} interval"
    truth = result.get("truth")
    rows = []
    for side, role in (("a", "A, in service"), ("b", "B, challenger")):
        estimate = result[side]["estimates"][name]
        rows.append([result[side]["name"], role, _percent(estimate["value"]), _span(estimate), *([_percent(truth[side])] if truth else [])])
    difference = result["difference"][name]
    rows.append(["difference", "B − A, points", _points(difference["value"]), _span(difference, signed=True), *_true_gap(truth)])
    relative = difference["relative"]
    rows.append(["relative", "B / A − 1", _signed(relative["value"]), _span_relative(relative), *_true_ratio(truth)])
    logged = result["logged"]
    rows.append(["the log itself", "who made the log", _percent(logged["value"]), _span(logged), *(["–"] if truth else [])])
    return table_html(["policy", "role", "clicks per impression", confidence, *(["truth"] if truth else [])], rows, stack=True)


def _truth_note(result: dict[str, Any]) -> str:
    if "truth" not in result:
        return f"Estimated by the {ESTIMATORS[result['estimator']]} estimator; the other estimators are below."
    return (
        f"Estimated by the {ESTIMATORS[result['estimator']]} estimator, from the logged rows alone. The truth is "
        f"{result['truth']['what']}; the interval "
        "also covers that other users might have come, so the truth of these very requests lies well inside it most of the time."
    )


def _checks(result: dict[str, Any]) -> str:
    rows = []
    for side in ("a", "b"):
        for check in result["diagnostics"][side]["checks"]:
            state = badge("passed", "good") if check["passed"] else badge("failed", "bad")
            rows.append([state, f"{check['name']} ({result[side]['name']})", f"{check['value']:.4g}", check["threshold"], check["explanation"]])
    overlap = ", ".join(f"{result[side]['name']} {result['diagnostics'][side]['overlap']:.0%}" for side in ("a", "b"))
    figures = paragraph(f"Overlap, the share of each policy's behaviour that the log also shows: {overlap}.")
    return table_html(["", "check", "found", "needed", "what it means"], rows, stack=True) + figures


def _method(result: dict[str, Any]) -> str:
    if result["source"] == "bandit":
        drawn = result["bandit"]
        how = (
            f"No propensities were logged, so a bandit problem was made: {drawn['requests']:,} requests, each with items that one "
            f"user really rated in "
            f"the test period; a softmax logger (the incumbent's ranking, temperature {drawn['logger_temperature']:g}) showed one item, "
            f"{drawn['rounds']} independent times; the click is the real label."
        )
    else:
        how = "Lists and clicks of the test period as they were logged, with the logger's propensities and the candidates of each list."
    policies = (
        f"Both policies are Plackett-Luce (softmax, place after place) over a request's candidates, with the model's scores standardised within the "
        f"request at temperature {result['temperature']:g}. Features are those known strictly before the request."
    )
    estimates = (
        "IPS: clicks weighted by the product of probability ratios down the list, over all rows. Self-normalised: over the sum of weights. Doubly "
        "robust: a reward model's expectation plus the weighted rest; the model is a logistic regression that never scores a user it was fitted on."
    )
    intervals = (
        f"Intervals: {result['confidence']:.0%}, bootstrap over users of the whole ratio, paired for the difference. A win or a "
        f"loss must also hold by "
        f"the influence-function interval. {result['rows']:,} rows, {result['requests']:,} requests, {result['users']:,} users. "
        f"Source: {result['why']}."
    )
    return "".join(paragraph(text) for text in (how, policies, estimates, intervals))


def _next(result: dict[str, Any]) -> str:
    if result["verdict"] == "win":
        return "B may replace A. Let the service explore a little, so that its own log can confirm the result and judge the next challenger."
    if result["verdict"] == "lose":
        return "Keep A. Look at the evaluation's slices for where B is better, and whether its training metric is the one you care about."
    if result["failed_checks"]:
        return (
            "Do not read a winner from the figures above. More exploration in the logger (a higher temperature), policies nearer to "
            "the log, or a longer "
            "log raise the effective sample; a mean weight off 1 asks for a look at how propensities and candidates are logged."
        )
    gap = result["difference"][result["estimator"]]
    if gap["low"] is None:
        return "Log with a policy that sometimes shows what both candidates would show."
    half = (gap["high"] - gap["low"]) / 2
    return (
        f"The log can tell differences of about {100 * half:.2f} points. To tell half of that it would have to be about four "
        f"times as long (in users, not "
        "only in rows). Until then A stays."
    )


# ---------------------------------------------------------------- figures


def _figure(rows: int, height: float) -> "tuple[Figure, list[Axes]]":
    """A figure made without pyplot: no global state, no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = [figure.add_subplot(rows, 1, row + 1) for row in range(rows)]
    for axis in axes:
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        axis.grid(axis="x", color="#e4e8ed", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def _forest(result: dict[str, Any]) -> "Figure":
    names = list(result["difference"])
    figure, (rates, gap) = _figure(2, 1.9 + 0.75 * len(names))
    truth = result.get("truth")
    for row, name in enumerate(names):
        for side, shift in (("a", -0.16), ("b", 0.16)):
            _bar(rates, result[side]["estimates"][name], row + shift, COLOURS[side], result[side]["name"] if row == 0 else None)
        _bar(gap, result["difference"][name], row, COLOURS["b"], None)
    if truth:
        for side, style in (("a", "--"), ("b", "-")):
            rates.axvline(100 * truth[side], color=COLOURS["truth"], linestyle=style, linewidth=1, label=f"truth, {result[side]['name']}")
        gap.axvline(100 * truth["difference"], color=COLOURS["truth"], linewidth=1, label="truth")
    gap.axvline(0, color="#1c2430", linewidth=0.8)
    for axis, label in ((rates, "clicks per 100 impressions"), (gap, "B − A, points")):
        axis.set_yticks(range(len(names)), [ESTIMATORS[name] for name in names])
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlabel(label)
    rates.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2, fontsize=8, frameon=False)
    return figure


def _bar(axis: "Axes", estimate: dict[str, Any], height: float, colour: str, label: str | None) -> None:
    if estimate["value"] is None:
        return
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    axis.plot([low, high], [height, height], color=colour, linewidth=2)
    axis.plot([value], [height], "o", color=colour, markersize=6, label=label)


def _weights(result: dict[str, Any]) -> "Figure":
    figure, (shares, effective) = _figure(2, 4.6)
    for side, shift in (("a", -0.2), ("b", 0.2)):
        histogram = result["diagnostics"][side]["weight_histogram"]
        places = [index + shift for index in range(len(histogram["shares"]))]
        shares.bar(places, [100 * share for share in histogram["shares"]], width=0.4, color=COLOURS[side], label=result[side]["name"])
        found = result["diagnostics"][side]["effective_requests"]
        effective.barh([result[side]["name"]], [found], color=COLOURS[side], height=0.5)
        effective.annotate(f" {found:,.0f}", (found, result[side]["name"]), va="center", fontsize=9)
    edges = result["diagnostics"]["a"]["weight_histogram"]["edges"]
    shares.set_xticks([i - 0.5 for i in range(0, len(edges), 2)], [_power(edge) for edge in edges[::2]])
    shares.set_xlabel("weight of a request (the outer bars hold all beyond)")
    shares.set_ylabel("% of requests")
    shares.legend(fontsize=8, frameon=False)
    effective.barh(["logged"], [result["requests"]], color="#d5dbe2", height=0.5)
    effective.annotate(f" {result['requests']:,}", (result["requests"], "logged"), va="center", fontsize=9)
    effective.set_xlabel("requests: logged, and what they are worth for each policy (effective sample)")
    effective.margins(x=0.15)
    return figure


def _over_time(result: dict[str, Any]) -> "Figure":
    series = result["over_time"]
    figure, (axis,) = _figure(1, 2.8)
    places = list(range(1, len(series["until"]) + 1))
    for key, label in (("logged", "the log itself"), ("a", result["a"]["name"]), ("b", result["b"]["name"])):
        values = [float("nan") if value is None else 100 * value for value in series[key]]
        axis.plot(places, values, "o-", color=COLOURS[key], label=label, linewidth=1.5, markersize=3)
    days = [datetime.fromtimestamp(until / 1e6, tz=UTC).strftime("%Y-%m-%d") for until in series["until"]]
    step = max(1, len(places) // 4)
    axis.set_xticks(places[::step], days[::step], fontsize=8)
    axis.set_xlabel("span of the log that ends on")
    axis.set_ylabel("clicks per 100 impressions")
    axis.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3, fontsize=8, frameon=False)
    return figure


# ---------------------------------------------------------------- numbers


def _power(edge: float) -> str:
    return f"{edge:g}" if edge >= 1 else f"1/{1 / edge:g}"


def _percent(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2%}"


def _points(value: float | None) -> str:
    return "undefined" if value is None else f"{100 * value:+.2f}"


def _signed(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.1%}"


def _span(estimate: dict[str, Any], *, signed: bool = False) -> str:
    show = _points if signed else _percent
    return "undefined" if estimate["low"] is None else f"{show(estimate['low'])} to {show(estimate['high'])}"


def _span_relative(estimate: dict[str, Any]) -> str:
    return "undefined" if estimate["low"] is None else f"{_signed(estimate['low'])} to {_signed(estimate['high'])}"


def _true_gap(truth: dict[str, Any] | None) -> list[str]:
    return [_points(truth["difference"])] if truth else []


def _true_ratio(truth: dict[str, Any] | None) -> list[str]:
    return [_signed(truth["difference"] / truth["a"]) if truth["a"] else "undefined"] if truth else []
