"""Make logged lists again and compare: `python -m serving.replay STATE --bento build/bento`.

STATE is a service's state folder (it may be in use). Each logged list that carries evidence (serving.evidence) is made again from the Bento and the
event log alone: a copy of the online store's snapshot, the user's logged events up to the place that the evidence names, retrieval, one pass of the
ranker. Features must be equal, scores within 1e-5 (relative where above 1). Exit code 1 where one differs: the first request that
does, by time, is named with the feature and both values.
"""

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from features.online import OnlineFeatures
from longtrail.errors import LongtrailError, ModelError
from longtrail.files import write_json
from longtrail.history import HistoryArrays
from longtrail.schema import USER_STATISTICS
from serving.arms import load_arms
from serving.artifacts import ARTIFACTS, Artifacts
from serving.event_records import LoggedEvent, read_events
from serving.evidence import HISTORY, Evidence, build_name, digest, full_of, logits_of
from serving.parity import TOLERANCE
from serving.scoring import Scorer, newest
from serving.segments import read_answers
from serving.user_read import UserRead, read_user

Ints = NDArray[np.int64]
EVENTS = "events"  # the folder below log/


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first thing of one request that is not as it was served."""

    request_id: str
    user: str
    timestamp: int
    feature: str
    served: str
    replayed: str

    def __str__(self) -> str:
        return f"request {self.request_id} (user {self.user!r}): {self.feature}: served {self.served}, replayed {self.replayed}"


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """`left_out` counts answers that were not replayed, by reason. `differences` are in order of time."""

    requests: int
    events: int
    left_out: Mapping[str, int]
    largest: float  # difference of a score
    differences: Sequence[Difference]


def replay(state: Path, bento: Path, *, limit: int | None = None) -> Replayed:
    """Replay the newest `limit` (all by default) of the lists that this Bento made. Raises ModelError where there is none."""
    return replay_over(Artifacts.open(bento / "src" / ARTIFACTS), state, limit=limit)


def replay_over(artifacts: Artifacts, state: Path, *, limit: int | None = None) -> Replayed:
    """As `replay`, over open artifacts."""
    scorers = {arm.name: arm.scorer for arm in load_arms(artifacts).shown}
    answers, left_out = choose(read_answers(state), build_name(artifacts.folder), scorers)
    if not answers:
        raise ModelError(f"{state}: no list that {artifacts.folder} made and evidence was logged of ({dict(left_out) or 'no answers at all'})")
    answers = answers[-limit:] if limit else answers
    with tempfile.TemporaryDirectory(prefix="longtrail-replay-") as folder:
        store = OnlineFeatures(artifacts.snapshot, state=Path(folder))
        events = _events(artifacts, state, store.applied(""), {answer["user"] for answer in answers})
        replayer = Replayer(artifacts, store, events)
        found = [each for answer in by_user(answers) if (each := replayer.check(answer, scorers[answer["arm"]])) is not None]
    return Replayed(
        requests=replayer.checked,
        events=sum(len(own) for own in events.values()),
        left_out={**left_out, **replayer.left_out},
        largest=replayer.largest,
        differences=sorted(found, key=lambda each: (each.timestamp, each.request_id)),
    )


def choose(answers: Sequence[dict[str, Any]], build: str, scorers: Mapping[str, Scorer]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Answers that can be replayed, and how many cannot, by reason."""
    chosen, left_out = [], Counter[str]()
    for answer in answers:
        if answer["model"] is None:
            left_out["no personal list"] += 1
        elif answer["evidence"] is None:
            left_out["no evidence logged (serving.evidence.share)"] += 1
        elif answer["evidence"]["build"] != build:
            left_out["made by another Bento"] += 1
        elif answer["arm"] not in scorers:
            left_out["of an arm that this Bento has not"] += 1
        else:
            chosen.append(answer)
    return chosen, left_out


def by_user(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """User by user, in the order in which their histories grew: the order of the log may be another, for requests overlap."""
    return sorted(answers, key=lambda answer: (answer["user"], answer["evidence"]["total"], answer["timestamp"]))


class Replayer:
    """A store of its own that takes each user's events as they are needed; requests of a user must come in the order of `by_user`."""

    def __init__(self, artifacts: Artifacts, store: OnlineFeatures, events: Mapping[str, Sequence[tuple[int, int, int]]]) -> None:
        """`events`: raw user key to (item, action, µs), in the order of the log."""
        self._artifacts, self._store, self._events = artifacts, store, events
        new = dict.fromkeys(key for key in events if key not in artifacts.users)
        first = max(artifacts.users.values(), default=0) + 1
        self._users = {**artifacts.users, **{key: first + place for place, key in enumerate(new)}}
        self._taken: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.checked, self.largest = 0, 0.0

    def check(self, answer: dict[str, Any], scorer: Scorer) -> Difference | None:
        """The first difference of one request, None where it is as it was served."""
        key, expected = answer["user"], answer["evidence"]["total"]
        if min(expected, scorer.ranker_history) > self._store.length:
            self.left_out["the model reads more of the history than the online store keeps"] += 1
            return None
        user = self._users.get(key, 0)
        total = self._catch_up(key, user, expected)
        self.checked += 1
        for feature, served, replayed in self._compare(answer, scorer, user, total):
            return Difference(
                request_id=answer["request_id"], user=key, timestamp=answer["timestamp"], feature=feature, served=str(served), replayed=str(replayed)
            )
        return None

    def _catch_up(self, key: str, user: int, total: int) -> int:
        """Append the user's events until their history is `total` long, where the log has that many. Returns how long it is."""
        length = int(self._store.read([user], 1).totals_B[0])
        own, taken = self._events.get(key, ()), self._taken[key]
        fresh = own[taken : taken + max(total - length, 0)]
        if fresh:
            items, actions, times = (list(column) for column in zip(*fresh, strict=True))
            self._store.append_events([user] * len(fresh), items, actions, times)
            self._taken[key] += len(fresh)
        return length + len(fresh)

    def _compare(self, answer: dict[str, Any], scorer: Scorer, user: int, total: int) -> Iterator[tuple[str, Any, Any]]:
        """(feature, served, replayed) of what differs."""
        evidence = answer["evidence"]
        if total != evidence["total"]:
            yield "history_length", evidence["total"], total
            return
        read = read_user(self._store, scorer, user, retrieval=evidence["retrieved"])
        catalogue = self._artifacts.catalogue
        ids = [catalogue.id_of(item) for item in answer["candidates"]]
        if None in ids:
            yield "candidates", answer["candidates"][ids.index(None)], "an item that is not in the catalogue"
            return
        candidates = np.array(ids, np.int64)
        yield from _user_statistics(evidence, read)
        remade = self._remake(evidence, scorer, read, candidates)
        yield from self._features(evidence, remade, answer["candidates"])
        if evidence["retrieved"]:
            yield from self._candidates(answer, scorer, read, candidates)
        yield from self._scores(evidence, remade, answer["candidates"])

    def _remake(self, evidence: Mapping[str, Any], scorer: Scorer, read: UserRead, candidates: Ints) -> Evidence:
        items_1C = candidates[None, :]
        statistics = scorer.item_statistics(items_1C)
        logits_C = scorer.logits(read.history, read.totals_1, read.statistics, items_1C, statistics, np.array([evidence["time"]]), state=read.state)[
            0
        ]
        # As many events as the service read: a model that keeps a state reads only the newest.
        history = newest(read.history, evidence["read"]) if evidence["read"] else _nothing()
        return Evidence(time=evidence["time"], history=history, total=read.total, user=read.statistics, items=statistics, logits_C=logits_C)

    def _features(self, evidence: Mapping[str, Any], remade: Evidence, candidates: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
        served, found = full_of(evidence), remade.features()
        if (length := int(remade.history.lengths_B[0])) != evidence["read"]:
            yield "events read", evidence["read"], length
            return
        for name, values in found.items():
            if digest(values) == evidence["digests"][name]:
                continue
            if served is None:
                hint = "serving.evidence.full was not logged for this list, so only its digest is known"
                yield name, f"{evidence['digests'][name]} ({hint})", f"{digest(values)} of {_short(values)}"
            elif len(served[name]) != len(values):
                yield f"{name}, how many", len(served[name]), len(values)
            else:
                place = int(np.flatnonzero(served[name] != values)[0])
                where = f"{name}[{place}] of {len(values)}, oldest first" if name in HISTORY else f"{name} of candidate {candidates[place]!r}"
                yield where, self._said(name, served[name][place]), self._said(name, values[place])

    def _said(self, name: str, value: Any) -> str:
        """A feature's value, with the raw key where it is an item, and the name where it is an action."""
        number = int(value)
        if name == "history_items" and 0 < number < len(self._artifacts.catalogue.keys):
            return f"{number} ({self._artifacts.catalogue.keys[number]!r})"
        if name == "history_actions" and 0 < number <= len(self._artifacts.manifest.actions):
            return f"{number} ({self._artifacts.manifest.actions[number - 1]!r})"
        return str(number)

    def _candidates(self, answer: dict[str, Any], scorer: Scorer, read: UserRead, candidates: Ints) -> Iterator[tuple[str, Any, Any]]:
        """What the retriever chooses; two items whose scores are as good as equal may have changed places."""
        assert read.seen is not None
        found, scores = scorer.retrieve(read.history, self._artifacts.settings.retrieve, read.seen)
        if len(found) != len(candidates):
            yield "candidates, how many", len(candidates), len(found)
            return
        score_of = dict(zip(found.tolist(), scores.tolist(), strict=True))
        for place in np.flatnonzero(found != candidates).tolist():
            theirs, ours = score_of.get(int(candidates[place])), float(scores[place])
            if theirs is None or abs(theirs - ours) > TOLERANCE * max(1.0, abs(ours)):
                yield f"candidates[{place}]", repr(answer["candidates"][place]), repr(self._artifacts.catalogue.keys[int(found[place])])
                return

    def _scores(self, evidence: Mapping[str, Any], remade: Evidence, candidates: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
        served, found = logits_of(evidence), remade.logits_C
        if len(served) != len(found):
            yield "scores, how many", len(served), len(found)
            return
        differences = np.abs(found - served) / max(1.0, float(np.abs(served).max(initial=0.0)))
        place = int(np.argmax(np.where(np.isnan(differences), np.inf, differences)))
        if not differences[place] <= TOLERANCE:  # also where it is not a number
            yield f"score (logit) of candidate {candidates[place]!r}", float(served[place]), float(found[place])
            return
        self.largest = max(self.largest, float(differences[place]))


def _user_statistics(evidence: Mapping[str, Any], read: UserRead) -> Iterator[tuple[str, Any, Any]]:
    for name, served in zip(USER_STATISTICS, evidence["user"], strict=True):
        if (replayed := int(read.statistics[name][0])) != served:
            yield name, served, replayed


def _nothing() -> HistoryArrays:
    empty = np.zeros((1, 1), np.int64)
    return HistoryArrays(items_BL=empty, actions_BL=empty, times_BL=empty, lengths_B=np.zeros(1, np.int64))


def _short(values: Ints) -> str:
    return f"[… {', '.join(map(str, values[-3:].tolist()))}]" if len(values) > 3 else str(values.tolist())


def _events(artifacts: Artifacts, state: Path, after: int, users: set[str]) -> dict[str, list[tuple[int, int, int]]]:
    """What each of `users` did after `after` (the place in the log that the snapshot holds), in the order of the log, as dense ids and µs."""
    actions = {name: number for number, name in enumerate(artifacts.manifest.actions, start=1)}
    done: dict[str, list[tuple[int, int, int]]] = {}

    def known(event: LoggedEvent) -> bool:
        return event.user in users and event.action in actions and artifacts.catalogue.id_of(event.item) is not None

    for chunk in read_events(state / "log" / EVENTS, after):
        for event in filter(known, chunk):
            item = artifacts.catalogue.id_of(event.item)
            assert item is not None
            done.setdefault(event.user, []).append((item, actions[event.action], event.timestamp))
    return done


def main(
    state: Annotated[Path, typer.Argument(help="the service's state folder ($LONGTRAIL_STATE)")],
    bento: Annotated[Path, typer.Option(help="the Bento that served")] = Path("build/bento"),
    limit: Annotated[int | None, typer.Option(help="only the newest so many lists", min=1)] = None,
    report: Annotated[Path | None, typer.Option(help="write all differences to this JSON file")] = None,
) -> None:
    """Make logged lists again from the Bento and the event log; exit 1, naming the first difference, where one is not as it was served."""
    try:
        done = replay(state, bento, limit=limit)
        if report:
            write_json(report, {**vars(done), "differences": [vars(each) for each in done.differences]})
    except LongtrailError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    left = "".join(f"; {count:,} left out: {reason}" for reason, count in done.left_out.items())
    print(f"{done.requests:,} lists replayed with {done.events:,} events; scores within {done.largest:.1e}{left}")
    if done.differences:
        print(f"{len(done.differences):,} differ; the first: {done.differences[0]}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
