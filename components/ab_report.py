"""The page an A/B test leaves behind: the verdict, the figures behind it, whether to believe them, and what to do next."""

from typing import Any

from markupsafe import Markup, escape

from components import ab_figures as figures
from components.ab_words import LIGHTS, TONES, chance, count, figure, next_step, percent, points, power_sentence, signed, span
from components.report_page import Section, figure_html, page, paragraph, table_html

STYLE = """
.word { display: inline-block; color: #fff; border-radius: .3rem; padding: .1rem .7rem; font-weight: 700; letter-spacing: .03em; font-size: 1.05rem;
        text-transform: uppercase; margin-bottom: .4rem; }
.word.good { background: var(--good); } .word.bad { background: var(--bad); }
.word.warn { background: var(--warn); } .word.plain { background: var(--plain); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .8rem; }
.card { border: 1px solid var(--line); border-radius: .4rem; padding: .7rem .9rem; min-width: 0; overflow-wrap: anywhere; }
.card .who { color: var(--soft); font-size: .92rem; }
.card .big { font-size: 1.7rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card .more { font-size: .95rem; } .card.a { border-top: .3rem solid #5b6675; } .card.b { border-top: .3rem solid #1f6fb2; }
.card.gap { border-top: .3rem solid var(--ink); }
.lights { list-style: none; margin: 0; padding: 0; }
.lights > li { border-bottom: 1px solid var(--line); padding: .7rem 0; display: flex; gap: .7rem; }
.lights > li:last-child { border-bottom: 0; } .lights .body { min-width: 0; flex: 1; }
.light { flex: none; width: 1.6rem; height: 1.6rem; border-radius: 50%; color: #fff; display: grid; place-items: center;
         font-weight: 700; font-size: .95rem; }
.light.good { background: var(--good); } .light.warn { background: #c98a00; }
.light.bad { background: var(--bad); } .light.plain { background: #8a96a5; }
.lights .name { font-weight: 600; } .lights .state { color: var(--soft); font-weight: 400; }
.lights .found { font-size: .93rem; } .lights .why { color: var(--soft); font-size: .93rem; }
.meter { position: relative; height: .5rem; border-radius: .25rem; margin: .35rem 0; max-width: 22rem;
         background: linear-gradient(90deg, #e8b4af 0 33.3%, #f0dca8 33.3% 66.6%, #b5dcc5 66.6%); }
.meter i { position: absolute; top: -.2rem; width: .3rem; height: .9rem; border-radius: .15rem; background: var(--ink); margin-left: -.15rem; }
.unread { opacity: .4; } .unread .big { text-decoration: line-through; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--plain); font-weight: 600; }
dt { font-weight: 600; margin-top: .5rem; } dd { margin: 0 0 0 1rem; color: var(--soft); }
figure svg { max-width: 38rem; margin: 0 auto; }
"""


def html(result: dict[str, Any]) -> str:
    """One self-contained page of what `components.ab_test` found."""
    a, b = result["a"]["name"], result["b"]["name"]
    sections = [
        Section(heading(result), _cards(result), _truth_note(result)),
        Section("What to do next", paragraph(next_step(result))),
        Section("Can it be believed?", lights(result), "Green does not prove a log right; red proves that this page must not decide anything."),
    ]
    if len(result["over_time"]["until"]) > 1:
        sections.append(
            Section(
                "The difference over time",
                figure_html(figures.over_time(result), "Click rates by span of the log, and the difference so far with its any-time interval"),
                "Above: each span alone, so noisy. Below: everything up to that day; the band holds at all days together, so looking every day is "
                "allowed. It is wider than the interval above, which holds for one look.",
            )
        )
    if result["segments"]:
        sections.append(Section("Who gains, who loses", _segments(result), _segments_note(result)))
    sections += [
        Section(
            "Weights",
            figure_html(figures.weights(result), "How the weights of the requests are distributed, and the effective sample of both policies"),
            "A weight says how much more often a policy would show a list than the logger did. Near 1: the log shows what the policy would do. A "
            "long tail to the right: a few requests decide. Much at the left: most of the log is about things the policy would not show.",
        ),
        *_calibration(result),
        Section("How much log would decide", paragraph(power_sentence(result))),
        Section("Every estimate", _estimates(result)),
        Section("How it was computed", _method(result)),
        Section("Words", _glossary()),
    ]
    return page(f"{b} against {a}", sections, style=STYLE, lead=_lead(result), tone=TONES[result["verdict"]])


def metrics(result: dict[str, Any]) -> dict[str, Any]:
    """Flat figures for DVC and Kubeflow; an undefined one is left out."""
    name = result["estimator"]
    difference, states = result["difference"][name], [check["state"] for check in result["checks"]]
    flat = {
        "ctr_a": result["a"]["estimates"][name]["value"],
        "ctr_b": result["b"]["estimates"][name]["value"],
        "difference": difference["value"],
        "difference_low": difference["low"],
        "difference_high": difference["high"],
        "relative": difference["relative"]["value"],
        "probability_b_better": result["probability_b_better"],
        "detectable_difference": result["power"]["detectable"],
        "effective_requests_a": result["diagnostics"]["a"]["effective_requests"],
        "effective_requests_b": result["diagnostics"]["b"]["effective_requests"],
        "requests": result["requests"],
        "users": result["users"],
        "checks_failed": states.count("fail"),
        "checks_to_look_at": states.count("warn"),
        "win": int(result["verdict"] == "win"),
    }
    if "truth" in result:
        flat |= {f"truth_{side}": result["truth"][side] for side in ("a", "b")}
    return {key: value for key, value in flat.items() if value is not None}


def heading(result: dict[str, Any]) -> str:
    """Of the rates: those of a log that must not be trusted are struck out."""
    return "Click-through rates: do not read these" if result["verdict"] == "do not trust" else "Click-through rates"


def _lead(result: dict[str, Any]) -> Markup:
    word = Markup('<span class="word {}">{}</span><br>').format(TONES[result["verdict"]], result["verdict"])
    mark = " The logged propensities are estimates, and so is all that follows." if result["propensities_estimated"] else ""
    return word + escape(result["sentence"] + mark)


def _cards(result: dict[str, Any]) -> str:
    name, confidence, truth = result["estimator"], f"{100 * result['confidence']:.4g}%", result.get("truth")
    cards = []
    for side, role in (("a", "A, in service"), ("b", "B, challenger")):
        estimate = result[side]["estimates"][name]
        more = [f"{confidence} interval {span(estimate)}", *([f"truth {percent(truth[side])}"] if truth else [])]
        cards.append(card(side, f"{role}: {result[side]['name']}", percent(estimate["value"]), more))
    difference = result["difference"][name]
    relative = difference["relative"]
    more = [
        f"{confidence} interval {span(result['interval'], points)} points",
        f"relative {signed(relative['value'])} ({span(relative, signed)})",
        f"B is better with probability {chance(result['probability_b_better'])}",
        *([f"truth {points(truth['difference'])} points"] if truth else []),
    ]
    cards.append(card("gap", "B − A", f"{points(difference['value'])} points", more))
    unread = " unread" if result["verdict"] == "do not trust" else ""
    return f'<div class="cards{unread}">{"".join(cards)}</div>'


def card(kind: str, who: str, big: str, more: list[str]) -> str:
    """One of the page's large figures, with lines below it."""
    lines = Markup("<br>").join(escape(line) for line in more)
    return str(
        Markup('<div class="card {}"><div class="who">{}</div><div class="big">{}</div><div class="more">{}</div></div>').format(
            kind, who, big, lines
        )
    )


def _truth_note(result: dict[str, Any]) -> str:
    title, logged = result["estimators"][result["estimator"]]["title"], result["logged"]
    note = f"Clicks per impression, estimated by the {title} estimator from one log. The log itself got {percent(logged['value'])} ({span(logged)})."
    if "bandit" in result:
        note = (
            "These are not your site's click rates. The log does not say what else each list could have shown, and with which chance, so the "
            "question is a made-up one: each policy chooses among items that a user really saw in the test period, and gets the click or the miss "
            f"that the item had. Compare A's rate with B's, and with nothing else. {note.replace('one log. The log', 'a drawn log. That log')}"
        )
    if "truth" not in result:
        return note
    return (
        f"{note} The truth is {result['truth']['what']}; the interval also covers that other users might have come, so the truth of these "
        "very requests lies well inside it most of the time."
    )


def lights(result: dict[str, Any]) -> str:
    """The checks as a traffic-light list, the worst first; those that passed are folded away."""
    order = {"fail": 0, "warn": 1, "unknown": 2, "pass": 3}
    checks = sorted(result["checks"], key=lambda check: order[check["state"]])
    open_ones = [check for check in checks if check["state"] != "pass"]
    passed = [check for check in checks if check["state"] == "pass"]
    tally = ", ".join(f"{sum(c['state'] == s for c in checks)} {LIGHTS[s][1]}" for s in order if any(c["state"] == s for c in checks))
    shown = f'<ul class="lights">{"".join(_light(check) for check in open_ones)}</ul>' if open_ones else ""
    rest = "".join(_light(check) for check in passed)
    folded = (
        f'<details{"" if open_ones else " open"}><summary>{len(passed)} passed</summary><ul class="lights">{rest}</ul></details>' if passed else ""
    )
    return paragraph(f"{len(checks)} checks: {tally}.") + shown + folded


def _light(check: dict[str, Any]) -> Markup:
    sign, word, tone = LIGHTS[check["state"]]
    name = f"{check['name']} of {check['policy']}" if check["policy"] else check["name"]
    meter = Markup("")
    if check["meter"] is not None:
        meter = Markup('<div class="meter" aria-hidden="true"><i style="left:{}%"></i></div>').format(f"{100 * check['meter']:.0f}")
    found = (
        Markup("")
        if check["value"] is None
        else Markup('<div class="found">found {}, needed: {}</div>').format(figure(check["value"]), check["threshold"])
    )
    advice = Markup('<div class="found">What to do: {}</div>').format(check["advice"]) if check["advice"] and check["state"] == "fail" else Markup("")
    return Markup(
        '<li><span class="light {}" aria-hidden="true">{}</span><div class="body"><div class="name">{} <span class="state">· {}</span></div>{}{}'
        '<div class="why">{}</div>{}</div></li>'
    ).format(tone, sign, name, word, found, meter, check["explanation"], advice)


def _calibration(result: dict[str, Any]) -> list[Section]:
    if not result["calibration"]:
        return []
    picture = figure_html(figures.calibration(result), "Weights of groups of candidates over what they should be, for both policies")
    note = (
        "Candidates, grouped by how much a policy likes them: do the weights of those shown add up to what the policy would show? 1 if the logged "
        "propensities are the ones that chose. Bars hold for all groups together (99.9%): one that misses 1 means that the logger chooses otherwise."
    )
    return [Section("Are the propensities right?", picture, note)]


def _segments(result: dict[str, Any]) -> str:
    headers = ["segment", "users", "rate of A", "rate of B", "B − A, points", "adjusted p", "finding"]
    rows = [
        [
            f"{row['kind']}: {row['label']}",
            count(row["users"]),
            percent(row["a"]["value"]),
            percent(row["b"]["value"]),
            f"{points(row['difference']['value'])} ({span(row['difference'], points)})",
            "–" if row["adjusted_p_value"] is None else f"{row['adjusted_p_value']:.3g}",
            row["finding"],
        ]
        for row in result["segments"]
    ]
    table = f"<details><summary>As a table</summary>{table_html(headers, rows, stack=True)}</details>"
    return figure_html(figures.segments(result), figures.describe_segments(result)) + table


def _segments_note(result: dict[str, Any]) -> str:
    method = {"holm": "Holm", "by": "Benjamini-Yekutieli", "bh": "Benjamini-Hochberg"}[result["multiplicity"]]
    guarded = f" Guardrails: {', '.join(result['guardrails'])}." if result["guardrails"] else " No guardrails were set (ab_test.guardrails)."
    if result["unjudged_guardrails"]:
        guarded += f" Too few people to judge of them: {', '.join(result['unjudged_guardrails'])}."
    return (
        f"Green or red only where the difference holds after adjusting for all {len(result['segments'])} segments ({method}): of twenty segments one "
        f"always looks special. Grey: too few people to say. Segments overlap; by category, rates are per impression of such items.{guarded}"
    )


def _estimates(result: dict[str, Any]) -> str:
    headers = ["interval of B − A, points", "value", "from … to", "when it holds"]
    name = result["estimator"]
    linear, any_time, betting = result["influence"][name]["difference"], result["any_time"], result["betting"]
    confidence = f"{100 * result['confidence']:.4g}%"
    rows = [
        ["bootstrap over users", points(result["difference"][name]["value"]), span(result["difference"][name], points), f"{confidence}, one look"],
        ["influence function", points(linear["value"]), span(linear, points), f"{confidence}, one look"],
        ["any-time (normal mixture)", points(any_time["value"]), span(any_time, points), f"{confidence} at all looks together, many users"],
    ]
    if betting is not None:
        which = ", of IPS" if name == "snips" else ""
        cut = f"of user totals cut at {betting['bound']:.3g} clicks ({betting['clipped']} were)"
        holds = f"{confidence} at all looks, any number of users{which}; {cut}"
        rows.append(["betting", points(betting["value"]), span(betting, points), holds])
    assumed = Markup("").join(
        Markup("<dt>{}</dt><dd>{}{}</dd>").format(
            f"{e['title']}{' (decides)' if key == name else ', for contrast only' if e['contrast'] else ''}",
            e["assumes"],
            "" if not e["parameters"] else f" Chosen from the data: {', '.join(f'{s.upper()} {_parameter(v)}' for s, v in e['parameters'].items())}.",
        )
        for key, e in result["estimators"].items()
    )
    refused = "".join(paragraph(f"Not used: {key}: {why}.") for key, why in result["refused"].items())
    return (
        figure_html(figures.estimates(result), "Estimates of both click rates and of their difference, by estimator")
        + paragraph("* decides. Estimators that are far apart are a reason to look at the checks, not to choose the one you like.")
        + table_html(headers, rows, stack=True)
        + f"<details><summary>What each assumes</summary><dl>{assumed}</dl>{refused}</details>"
    )


def _parameter(value: float | None) -> str:
    return "no limit" if value is None else f"{value:.3g}"


def _method(result: dict[str, Any]) -> str:
    texts = [result["how"]] if "how" in result else []
    texts.append(
        f"Intervals: {100 * result['confidence']:.4g}%, by users, paired: A and B are judged on the same rows, and in a bootstrap on the same "
        "resampled users; numerator and denominator are drawn together. Win, lose and equivalent need the bootstrap and the influence function to "
        "agree" + (" (here: the any-time interval, as the log is looked at repeatedly)." if result["looks"] else ".")
    )
    if result["challengers"] > 1:
        texts.append(f"{result['challengers']} challengers were tried on this log; every interval is widened so that all hold together (Bonferroni).")
    texts.append(f"{result['rows']:,} rows, {result['requests']:,} requests, {result['users']:,} users. Source: {result['why']}.")
    return "".join(paragraph(text) for text in texts)


def _glossary() -> str:
    words = {
        "Propensity": "the probability with which the logger showed what it showed. Without it, no log can judge another policy.",
        "Weight": "how much more often a policy would have shown a logged list than the logger did.",
        "Effective sample": "how many requests of the policy's own the weighted log is worth.",
        "Interval": "of a hundred logs like this one, the 95% intervals of about 95 hold the true value.",
        "Points": "percentage points: from 4% to 5% is one point, and 25% more.",
        "Any-time interval": "one that stays right however often you look, and whenever you stop.",
        "Margin": "the difference below which you do not care. Set it before looking.",
    }
    return f"<dl>{''.join(str(Markup('<dt>{}</dt><dd>{}</dd>').format(word, text)) for word, text in words.items())}</dl>"
