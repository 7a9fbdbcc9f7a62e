"""Step `ab_test`: does the champion beat the ranker in service? Answered from the log, before anyone is shown anything."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.command import run
from longtrail.config import ABTestSettings, Config, WorldDataset, at_most, load_config
from longtrail.errors import EvaluationError
from longtrail.files import atomic_directory, read_json, write_json

if TYPE_CHECKING:
    from longtrail.offpolicy.experiment import Rules

log = logging.getLogger("ab_test")

SAME = "The champion is the incumbent itself: there is nothing to decide."


def ab_test(
    tables: Annotated[Path, typer.Option(help="the folder that ingest wrote")] = Path("build/tables"),
    features: Annotated[Path, typer.Option(help="folder written by build_features")] = Path("build/features"),
    champion: Annotated[Path, typer.Option(help="folder written by select: ranker/ is B, incumbent/ is A")] = Path("build/champion"),
    params: Annotated[Path, typer.Option(help="settings: section `ab_test`")] = Path("params.yaml"),
    report: Annotated[Path, typer.Option(help="folder to write: report.json, report.html, metrics.json, plots")] = Path("build/ab"),
    log_file: Annotated[Path | None, typer.Option("--log", help="judge this log (Parquet, impressions schema) instead of the pipeline's")] = None,
    a: Annotated[str, typer.Option(help="with --log: column or Parquet file with A's probability of the logged item")] = "propensity",
    b: Annotated[list[str] | None, typer.Option(help="with --log: the same of B; several are judged the more strictly, a folder each")] = None,
    propensity_kind: Annotated[str | None, typer.Option(help="with --log: conditional or marginal, where the file does not say")] = None,
    estimate_propensities: Annotated[bool, typer.Option(help="with --log: none were logged; estimate them, and say so everywhere")] = False,
    independent_places: Annotated[bool, typer.Option(help="with --log: the logger filled each place without regard to the others")] = False,
    segment: Annotated[list[str] | None, typer.Option(help="with --log: further columns to cut the log by")] = None,
) -> None:
    """Estimate the click-through rates of incumbent (A) and champion (B) from logged impressions, and say whether B wins.

    Uses the log's own propensities where it has them (and the candidates each list was chosen from), else a bandit problem made of the test
    period's ratings, whose truth is known. With --log any log is judged alone, without the pipeline. The two Open Bandit policies against
    each other: python -m components.open_bandit --help
    """
    if log_file is None:
        config = load_config(params)
        results = {"": compare(config, tables=tables, features=features, champion=champion)}
    else:
        from components.ab_log import compare_log

        if not b:
            raise EvaluationError("--log needs --b: a column of the log, or a Parquet file, with B's probability of each logged item")
        names = _report_names(b)
        settings = load_config(params).ab_test if params.is_file() else ABTestSettings()
        options = {"kind": propensity_kind, "estimate": estimate_propensities, "independent_places": independent_places, "segments": segment or ()}
        found = [compare_log(settings, log_file, a, one, challengers=len(b), **options) for one in b]  # type: ignore[arg-type]
        results = {"": found[0]} if len(found) == 1 else dict(zip(names, found, strict=True))
    with atomic_directory(report) as folder:
        for name, result in results.items():
            (folder / name).mkdir(exist_ok=True)
            write_report(result, folder / name)
    for name, result in results.items():
        log.info("%s: %s", result["verdict"], result["sentence"])
        log.info("report: %s", report / name / "report.html")


def _report_names(b: list[str]) -> list[str]:
    """Of each B the name of its report's folder. Raises EvaluationError where one would lead out of that folder, or be another's."""
    named: dict[str, str] = {}
    for one in b:
        name = Path(one).stem
        if name in ("", ".", ".."):
            raise EvaluationError(f"--b {one!r} names no policy; expected a column of the log, or the path of a Parquet file or folder with a name")
        if name in named:
            raise EvaluationError(f"--b {named[name]!r} and --b {one!r} would both be reported as {name!r}; expected a name for each")
        named[name] = one
    return list(named)


def write_report(result: dict[str, Any], folder: Path) -> None:
    """report.json, metrics.json (flat), over_time.csv (what DVC plots) and report.html of a result."""
    from components.ab_figures import series_csv
    from components.ab_report import html, metrics

    write_json(folder / "report.json", result)
    write_json(folder / "metrics.json", metrics(result))
    (folder / "over_time.csv").write_text(series_csv(result), encoding="utf-8")
    (folder / "report.html").write_text(html(result), encoding="utf-8")


def compare(config: Config, *, tables: Path, features: Path, champion: Path) -> dict[str, Any]:
    """What the command does, without files. Raises EvaluationError where the log cannot answer, ModelError where a model does not fit."""
    from components import ab_requests as requests
    from longtrail.examples import FeatureSet
    from longtrail.offpolicy.policies import standardise

    settings = config.ab_test
    names, same = _names(champion)
    feature_set = FeatureSet.open(features)
    mode, why = choose_mode(settings, tables)
    log.info("%s: %s", mode, why)
    shown = labels = None
    if mode == "bandit":
        asked, labels = requests.rated_requests(feature_set, settings.max_candidates, at_most(settings.max_requests_per_user))
    else:
        asked, shown = requests.logged_requests(tables, feature_set, whole_catalogue=_is_open_bandit(tables))
    known = requests.request_features(features / "feast", asked)
    scores = {
        name: standardise(requests.score(champion / folder, feature_set, asked, known), asked.lengths_R)
        for name, folder in zip(names, ("incumbent", "ranker"), strict=True)
    }
    described = requests.reward_features(feature_set, asked, known, *scores.values())
    if shown is None:
        result = _bandit(settings, asked, labels, described, scores, known.history_length_R)
    else:
        context = requests.context(asked, shown, known, tables)
        result = _log(settings, asked, shown, described, scores, context, requests.log_health(tables))
        if isinstance(config.dataset, WorldDataset):
            _add_world_truth(result, config.dataset, tables, asked, shown, scores, settings)
    if same:
        result["sentence"] = SAME
    return {**result, "how": how(result), "source": mode, "why": why, "data": _data(tables)}


def how(result: dict[str, Any]) -> str:
    """Where the log came from and what the policies are, in words."""
    policies = (
        f"Both policies are Plackett-Luce (softmax, place after place) over a request's candidates, with the model's scores standardised within the "
        f"request at temperature {result['temperature']:g}. Features are those known strictly before the request. The doubly robust estimators' "
        "reward model is a logistic regression that never scores a user it was fitted on."
    )
    if "bandit" not in result:
        return f"Lists and clicks of the test period as they were logged, with the logger's propensities and the candidates of each list. {policies}"
    drawn = result["bandit"]
    return (
        f"No propensities were logged, so a bandit problem was made: {drawn['requests']:,} requests, each with items that one user really saw in "
        f"the test period; a softmax logger (the incumbent's ranking, temperature {drawn['logger_temperature']:g}) showed one item, "
        f"{drawn['rounds']} independent times; the click is the real label. {policies}"
    )


def choose_mode(settings: ABTestSettings, tables: Path) -> tuple[str, str]:
    """("log" or "bandit", why). Raises EvaluationError where ab_test.source asks for a log that has no propensities."""
    from components.ab_requests import CANDIDATES_FILE, propensity_kind
    from longtrail.schema import Propensity

    if settings.source == "bandit":
        return "bandit", "ab_test.source asks for the bandit conversion"
    kind = propensity_kind(tables / "impressions.parquet")
    if kind is Propensity.NONE:
        if settings.source == "log":
            raise EvaluationError(f"{tables / 'impressions.parquet'}: the log has no propensities; ab_test.source is log, expected auto or bandit")
        return "bandit", "the log has no propensities, so a bandit problem with a known truth is made of the test period's labels"
    if _is_open_bandit(tables):
        return "log", f"the log has {kind.value} propensities; every item of the catalogue was a candidate"
    if settings.source == "auto" and not (tables / CANDIDATES_FILE).is_file():
        return "bandit", f"the log has propensities but no {CANDIDATES_FILE}, so a bandit problem is made of the test period's labels"
    return "log", f"the log has {kind.value} propensities and the candidates of each request"


def _bandit(settings: ABTestSettings, asked: Any, labels: Any, described: Any, scores: dict[str, Any], history_R: Any) -> dict[str, Any]:
    """A is the incumbent: the logger ranks as it does, at a temperature of its own."""
    import numpy as np

    from longtrail.offpolicy.bandit import draw_bandit
    from longtrail.offpolicy.evidence import LogHealth

    a, b = scores
    drawn = draw_bandit(
        users_R=asked.users_R,
        times_R=asked.times_R,
        lengths_R=asked.lengths_R,
        labels_RC=labels,
        features_RCF=described,
        logger_RC=scores[a] / settings.logger_temperature,
        scores={name: values / settings.temperature for name, values in scores.items()},
        rounds=settings.rounds,
        seed=settings.seed,
    )
    context = {"time": drawn.times_N, "history_length": np.repeat(history_R, settings.rounds)[drawn.slates.order_N]}
    result = _experiment(settings, drawn.slates, drawn.policies, context=context, health=LogHealth(drawn=True))
    _add_truth(result, drawn.truth[a], drawn.truth[b], "the expected label over the same requests, computed exactly")
    result["bandit"] = {"requests": len(asked.users_R), "rounds": settings.rounds, "logger_temperature": settings.logger_temperature}
    return result


def _log(
    settings: ABTestSettings, asked: Any, shown: Any, described: Any, scores: dict[str, Any], context_RK: dict[str, Any], health: Any
) -> dict[str, Any]:
    from longtrail.offpolicy.calibration import calibration_sums
    from longtrail.offpolicy.lists import LoggedLists, evaluate_policies
    from longtrail.schema import Propensity

    lists = LoggedLists(
        users_R=asked.users_R,
        lengths_R=asked.lengths_R,
        shown_RK=shown.shown_RK,
        positions_RK=shown.positions_RK,
        rewards_RK=shown.clicks_RK,
        propensities_RK=shown.propensities_RK,
        features_RCF=described,
        kind=shown.kind,
    )
    tempered = {name: values / settings.temperature for name, values in scores.items()}
    slates, policies = evaluate_policies(lists, tempered, seed=settings.seed)
    context = {name: values_RK[lists.real][slates.order_N] for name, values_RK in context_RK.items()}
    calibration = (
        None
        if shown.kind is not Propensity.CONDITIONAL and shown.shown_RK.shape[1] > 1
        else calibration_sums(
            users_R=asked.users_R,
            lengths_R=asked.lengths_R,
            shown_RK=shown.shown_RK,
            propensities_RK=shown.propensities_RK,
            scores=dict(zip("ab", tempered.values(), strict=True)),
        )
    )
    return _experiment(settings, slates, policies, context=context, health=health, calibration=calibration)


def _experiment(settings: ABTestSettings, slates: Any, policies: dict[str, Any], **known: Any) -> dict[str, Any]:
    from longtrail.offpolicy.experiment import run_experiment

    return {**run_experiment(slates, *policies.values(), rules=rules(settings), **known).json(), "temperature": settings.temperature}


def rules(settings: ABTestSettings) -> "Rules":
    """The part of the settings that says how a log is judged."""
    from longtrail.offpolicy.experiment import Rules

    return Rules(**{field: getattr(settings, field) for field in Rules.__dataclass_fields__})


def _add_truth(result: dict[str, Any], a: float, b: float, what: str) -> None:
    result["a"]["truth"], result["b"]["truth"], result["truth"] = a, b, {"a": a, "b": b, "difference": b - a, "what": what}


def _add_world_truth(
    result: dict[str, Any], world: WorldDataset, tables: Path, asked: Any, shown: Any, scores: dict[str, Any], settings: ABTestSettings
) -> None:
    """In a simulated world the truth is known: lists are drawn from each policy and their true click probability is averaged."""
    import numpy as np
    import pyarrow.parquet as pq

    from longtrail.datasets.world import World, true_rate

    keys = {}
    for table, column in (("users", "user_key"), ("items", "item_key")):
        rows = pq.read_table(tables / f"{table}.parquet", columns=[f"{table[:-1]}_id", column])
        keys[table] = np.zeros(rows.num_rows + 1, np.int64)
        keys[table][rows[0].to_numpy()] = rows[1].to_numpy(zero_copy_only=False).astype(np.int64)
    places = (shown.shown_RK >= 0).sum(axis=1)
    rates = [
        true_rate(
            World(world),
            keys["users"][asked.users_R],
            keys["items"][asked.items_RC],
            asked.times_R,
            values / settings.temperature,
            asked.lengths_R,
            places,
            seed=settings.seed,
        )
        for values in scores.values()
    ]
    _add_truth(result, rates[0], rates[1], "the simulated world's own click probability of lists drawn from each policy, for the same requests")


def _names(champion: Path) -> tuple[tuple[str, str], bool]:
    """Names of A and B for people, and whether they are the same model."""
    try:
        selection = read_json(champion / "selection.json")
        a, b = selection["incumbent"], selection["ranker"]["name"]
    except FileNotFoundError as error:
        raise EvaluationError(f"{error.filename}: no such file; expected the folder that select writes") from None
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{champion / 'selection.json'}: not as select writes it: {error}") from None
    return ((f"{a} (incumbent)", f"{b} (champion)"), True) if a == b else ((a, b), False)


def _data(tables: Path) -> dict[str, Any]:
    counts = read_json(tables / "counts.json")
    return {"dataset": counts.get("dataset"), "source_sha256": counts.get("source_sha256")}


def _is_open_bandit(tables: Path) -> bool:
    try:
        return (read_json(tables / "counts.json").get("dataset") or {}).get("kind") == "open_bandit"
    except FileNotFoundError:
        raise EvaluationError(f"{tables / 'counts.json'}: no such file; expected the folder that ingest writes") from None


if __name__ == "__main__":
    run(ab_test)
