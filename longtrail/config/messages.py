"""pydantic's errors in the words of a settings file: the path as it is written there, what was expected, and the nearest name."""

from difflib import get_close_matches
from typing import Any, NamedTuple

from pydantic import ValidationError

from longtrail.config.shapes import Shape, shape_of

NOUNS = {"retrieval": "retriever", "ranking": "ranker"}
ELSEWHERE = {"gsasrec": "stage: retrieval, kind: sasrec, loss: gbce"}  # models that are another's settings, by the name that they go by
NOT_A_MAPPING = ("model_type", "model_attributes_type", "dict_type")


class _Place(NamedTuple):
    """Where an error is: the path as written, the place, and the choice whose branch it is last, with that branch's word."""

    path: tuple[str, ...]
    shape: Shape
    choice: Shape | None
    word: str


def explain(error: ValidationError, settings: Any) -> list[str]:
    """A line `path: what is wrong` for each error of values that were read as `settings`: a class, or a choice of classes."""
    found = []
    for one in error.errors():
        place = _place(shape_of(settings), one["loc"])
        more, message = _message(one, place)
        found.append(f"{'.'.join((*place.path, *more)) or 'top level'}: {message}")
    return list(dict.fromkeys(found))


def _place(shape: Shape, location: tuple[int | str, ...]) -> _Place:
    """pydantic's location names the branches of choices too, which nobody has written."""
    path: list[str] = []
    choice, word = None, ""
    for part in location[:-1] if location[-1:] == ("[key]",) else location:  # pydantic's mark of an error that is the key's own
        if part in shape.branches:
            choice, word, shape = shape, str(part), shape.branches[str(part)]
        elif shape.is_plain_union:
            shape = Shape(None)
        else:
            path.append(str(part))
            choice, word = None, ""
            # The key that is unknown has no place of its own: its message needs that of what it stands in.
            shape = shape if shape.fields and part not in shape.fields else shape.within(part)
    return _Place(tuple(path), shape, choice, word)


def _message(error: Any, place: _Place) -> tuple[tuple[str, ...], str]:
    """What is wrong, and what its path has beyond the place's: the key that tells a choice's branches apart."""
    kind, given, shape = error["type"], error["input"], place.shape
    if kind == "extra_forbidden":
        return (), f"unknown key; {_nearest_key(place.path[-1], list(shape.fields))}"
    if kind == "missing":
        return (), "missing"
    if kind == "value_error":
        return (), str(error["ctx"]["error"])
    if kind == "union_tag_not_found":
        return (str(shape.key),), f"missing; expected {_untold(shape, given)}"
    if kind == "union_tag_invalid":
        return (str(shape.key),), _wrong_word(place, str(given[shape.key]))
    if kind in NOT_A_MAPPING:
        return (), f"expected a mapping{_example(shape, given)}, got {given!r}"
    return (), f"{error['msg']}, got {given!r}"


def _nearest_key(key: str, known: list[str]) -> str:
    near = get_close_matches(key, known, n=1, cutoff=0.7)  # at 0.6, window is near to kind
    return f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"


def _untold(shape: Shape, given: dict[str, Any]) -> str:
    """The words of a choice; where what else is told leaves one of them, that one alone."""
    for name, value in given.items():
        fits = [word for word, branch in shape.branches.items() if branch.key == name and str(value) in branch.branches]
        if len(fits) == 1:
            return f"{shape.key}: {fits[0]}: {value} is a {NOUNS.get(fits[0], fits[0])}"
    words = list(shape.branches)
    return " or ".join(f"{shape.key}: {word}" for word in words) if len(words) == 2 else f"one of {', '.join(words)}"


def _wrong_word(place: _Place, word: str) -> str:
    shape = place.shape
    if word.lower() in ELSEWHERE:
        return f"{word!r} is no {shape.key} of its own; expected {ELSEWHERE[word.lower()]}"
    noun = NOUNS.get(place.word, shape.key)
    for other, branch in place.choice.branches.items() if place.choice else ():
        if place.choice and word in branch.words(str(shape.key)):
            return f"{word} is a {NOUNS.get(other, other)}, not a {noun}; expected {place.choice.key}: {other} beside it"
    near = get_close_matches(word.lower(), shape.branches, n=3)
    listed = ", ".join(dict.fromkeys([*near, *shape.branches]))
    return f"{word!r} is no {noun}; expected one of {listed}"


def _example(shape: Shape, given: Any) -> str:
    """How the mapping begins; with the word that stands in its place, where that is one of the choice's."""
    told = [told for told, _ in shape.leaves() if told]
    fits = [one for one in told if isinstance(given, str) and given in one.values()] or told[:1]
    return f", e.g. {{{', '.join(f'{key}: {word}' for key, word in fits[0].items())}}}" if fits else " of settings" if shape.fields else ""
