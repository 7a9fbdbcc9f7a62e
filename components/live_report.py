"""The page of a live test: the verdict, both arms, the difference day by day, whether to believe it."""

from typing import Any

from markupsafe import Markup, escape

from components import ab_figures as figures
from components.ab_report import STYLE, card, heading, lights
from components.ab_words import TONES, count, next_step, percent, points, power_sentence, signed, span
from components.live_test import HOW
from components.report_page import Section, figure_html, page, paragraph, table_html


def html(result: dict[str, Any]) -> str:
    """One self-contained page."""
    word = Markup('<span class="word {}">{}</span><br>').format(TONES[result["verdict"]], result["verdict"])
    sections = [
        Section(heading(result), _cards(result), f"Adjusted for what users did before; {_saved(result)}"),
        Section("What to do next", paragraph(next_step(result))),
        Section("Can it be believed?", lights(result)),
    ]
    if len(result["days"]) > 1:
        picture = figure_html(figures.daily(result), "The difference so far, day by day, with its any-time interval")
        sections.append(
            Section("Day by day", picture, "Everything up to each day. The band holds on all days together: looking every day is allowed.")
        )
    sections += [
        Section("How much longer", paragraph(power_sentence(result))),
        Section("With and without the past", _plain(result)),
        Section("How it was computed", paragraph(HOW)),
    ]
    return page(f"Live test: {result['b']['name']} against {result['a']['name']}", sections, lead=word + escape(result["sentence"]),
                tone=TONES[result["verdict"]], style=STYLE)  # fmt: skip


def _cards(result: dict[str, Any]) -> str:
    confidence = f"{100 * result['confidence']:.4g}%"
    cards = [
        card(side, f"{side.upper()}: {result[side]['name']}", percent(result[side]["adjusted"]["value"]),
             [f"{confidence} interval {span(result[side]['adjusted'])}", f"{count(result[side]['users'])} users", *_fallbacks(result[side])])
        for side in ("a", "b")
    ]  # fmt: skip
    relative = result["adjusted"]["relative"]
    more = [f"any-time {confidence} interval {span(result['any_time'], points)} points", f"relative {signed(relative['value'])}"]
    cards.append(card("gap", "B − A", f"{points(result['any_time']['value'])} points", more))
    unread = " unread" if result["verdict"] == "do not trust" else ""
    return f'<div class="cards{unread}">{"".join(cards)}</div>'


def _fallbacks(side: dict[str, Any]) -> list[str]:
    """What an arm's card says of lists that it could not make; nothing where the log does not say, or there were none."""
    if not side["fallback_share"]:
        return []
    return [f"{percent(side['fallback_share'])} of it were fallbacks; {percent(side['own_rate'])} in its own lists"]


def _saved(result: dict[str, Any]) -> str:
    if result["variance_saved"] <= 0.005:
        return "their past explains nothing of it here."
    return f"that saves {result['variance_saved']:.0%} of the users a plain comparison would need."


def _plain(result: dict[str, Any]) -> str:
    rows = [
        ["adjusted (CUPED), any-time", points(result["any_time"]["value"]), span(result["any_time"], points)],
        ["adjusted (CUPED), one look", points(result["adjusted"]["value"]), span(result["adjusted"], points)],
        ["plain, one look", points(result["plain"]["value"]), span(result["plain"], points)],
    ]
    return table_html(["difference, points", "value", "interval"], rows, stack=True)
