"""The whole pipeline as a picture, from the compiled pipeline itself: `python -m pipelines.picture` renews it in docs/cluster.md.

Mermaid, which Git hosts draw in a page: steps with the artifacts that go from one to the next, then the service and the way back of its logs.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf import json_format

from components.command import run
from longtrail.config import Config, load_config
from longtrail.errors import ConfigError
from longtrail.files import atomic_file
from pipelines.kubeflow import SECTIONS, build

BEGIN, END = "<!-- picture: made by `python -m pipelines.picture` -->", "<!-- end of picture -->"
# What stands around the pipeline: (from, to, what goes there). The test looks each part up in the code.
AROUND = (
    ("build_features", "online", "histories"),
    ("package", "service", "Bento"),
    ("online", "service", "history of the user"),
    ("people", "service", "/recommend, /rank, /events"),
    ("service", "online", "events"),
    ("service", "logs", "answers with propensities, events"),
    ("logs", "ingest", "python -m serving.export_log"),
)
SHAPES = {"online": "[(online store)]", "service": "([endpoint])", "people": "((people))", "logs": "[(logs)]"}

Edge = tuple[str, str, str]


def graph(config: Config) -> tuple[dict[str, str], list[Edge]]:
    """Of the compiled pipeline, loops and conditions followed: each step with what it is subject to, and (producer, consumer, artifact)."""
    spec = json_format.MessageToDict(build(config).pipeline_spec)
    components = spec["components"]
    steps: dict[str, str] = {}
    edges: set[Edge] = set()

    def origin(dag: dict[str, Any], task: str, key: str) -> tuple[str, str]:
        component = components[dag["tasks"][task]["componentRef"]["name"]]
        if "dag" not in component:
            return task, key
        (selector,) = component["dag"]["outputs"]["artifacts"][key]["artifactSelectors"]
        return origin(component["dag"], selector["producerSubtask"], selector["outputArtifactKey"])

    def walk(dag: dict[str, Any], given: dict[str, tuple[str, str]], subject: str) -> None:
        for name, task in dag["tasks"].items():
            sources = {}
            for key, source in task.get("inputs", {}).get("artifacts", {}).items():
                if "componentInputArtifact" in source:
                    sources[key] = given[source["componentInputArtifact"]]
                else:
                    output = source["taskOutputArtifact"]
                    sources[key] = origin(dag, output["producerTask"], output["outputArtifactKey"])
            component, title = components[task["componentRef"]["name"]], task["taskInfo"]["name"]
            if "dag" in component:
                loop, condition = "parameterIterator" in task, task.get("triggerPolicy", {}).get("condition")
                walk(component["dag"], sources, f"for each of the {title}" if loop else f"if {title}" if condition else subject)
            else:
                steps[name.replace("-", "_")] = subject
                edges.update((producer.replace("-", "_"), name.replace("-", "_"), artifact) for producer, artifact in sources.values())

    walk(spec["root"]["dag"], {}, "")
    order = {step: place for place, step in enumerate(SECTIONS)}
    edges = {edge for edge in edges if edge[1] in order}  # not what serves Kubeflow alone: look, publish, report
    return {step: steps[step] for step in SECTIONS}, sorted(edges, key=lambda edge: (order[edge[0]], order[edge[1]], edge[2]))


def mermaid(config: Config) -> str:
    """The picture's text."""
    steps, edges = graph(config)
    lines = ["flowchart TD"]
    lines += [f'    {name}["{name}{f"<br/>({subject})" if subject else ""}"]' for name, subject in steps.items()]
    lines += [f"    {name}{shape}" for name, shape in SHAPES.items()]
    lines += [f"    {producer} -->|{what}| {consumer}" for producer, consumer, what in edges]
    lines += [f'    {producer} -.->|"{what}"| {consumer}' for producer, consumer, what in AROUND]
    return "\n".join(lines)


def renewed(text: str, config: Config, *, name: str = "docs/cluster.md") -> str:
    """`text` with the picture between its two marks. Raises ConfigError where they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{name}: no picture; expected the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n```mermaid\n{mermaid(config)}\n```\n\n{END}{after}"


def picture(
    page: Annotated[Path, typer.Option(help="the page that holds the picture")] = Path("docs/cluster.md"),
    params: Annotated[Path, typer.Option(help="settings")] = Path("params.yaml"),
) -> None:
    """Draw the pipeline anew into a page."""
    text = renewed(page.read_text(encoding="utf-8"), load_config(params), name=str(page))
    with atomic_file(page) as aside:
        aside.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run(picture)
