"""A file of settings as plain values: YAML in which no key stands twice."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from longtrail.errors import ConfigError


def read_settings(path: Path) -> Any:
    """What a YAML file holds. Raises ConfigError where it is missing or not YAML, or where a mapping has a key twice: YAML takes the last unasked."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, yaml.SafeLoader)
        values = yaml.safe_load(text)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a params.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if lines := list(_repeated(tree, (), set())):
        raise ConfigError("\n".join(f"{path}: {line}" for line in lines))
    return values


def _repeated(node: yaml.Node | None, path: tuple[str, ...], seen: set[int]) -> Iterator[str]:
    """A line for each key that stands in its mapping before. `seen`: what aliases name is looked at where it is written, once."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        first: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if (key.tag, name) in first:
                yield f"{'.'.join((*path, name))}: in line {first[key.tag, name]}, and again in line {line}; expected it once"
            first[key.tag, name] = line
            yield from _repeated(value, (*path, name), seen)
    elif isinstance(node, yaml.SequenceNode):
        for place, element in enumerate(node.value):
            yield from _repeated(element, (*path, str(place)), seen)
