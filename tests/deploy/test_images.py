"""The Dockerfile, read: every image locked, without root, labelled and lean. tests/images builds and runs them where a container engine is."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest

from tests.deploy.manifests import DEPLOY, ROOT, documents
from tools.requirements import COMMON, ONLY_TRAIN, requirements

TARGETS = ("data", "spark", "train", "bento")
HOUSE = ("longtrail", "components", "features", "pipelines", "serving")
MODULES = {"scikit-learn": "sklearn", "kfp-kubernetes": "kfp.kubernetes"}  # a distribution's, where the name is another
Instruction = tuple[str, str]


def stages() -> dict[str, list[Instruction]]:
    """Instructions of each stage by its name, the FROM first; continued lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            word, rest = line.split(maxsplit=1)
            if word == "FROM":
                current = found.setdefault(rest.rpartition(" AS ")[2], [])
            current.append((word, rest))
    return found


def below(target: str) -> list[Instruction]:
    """The instructions of the images of ours that `target` stands on."""
    parent = values(stages()[target], "FROM")[0].split()[0]
    return below(parent) + stages()[parent] if parent in stages() else []


def values(stage: list[Instruction], word: str) -> list[str]:
    return [rest for name, rest in stage if name == word]


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_is_without_root_labelled_and_has_one_scratch_folder(target: str) -> None:
    own = stages()[target]
    stage = below(target) + own
    assert values(own, "USER")[-1] == "10001:10001" and own[0][0] == "FROM"
    places = {word: place for place, (word, _) in enumerate(own)}  # of the last of each
    assert places["USER"] > max(places["COPY"], places.get("RUN", 0))
    (label,) = values(own, "LABEL")
    assert 'org.opencontainers.image.revision="${GIT_COMMIT}"' in label
    environment = dict(word.split("=", 1) for rest in values(stage, "ENV") for word in shlex.split(rest))
    assert environment["HOME"] == "/tmp" and environment["PYTHONDONTWRITEBYTECODE"] == "1"
    assert all(value.startswith("/tmp") for name, value in environment.items() if name.endswith(("CACHE_DIR", "CONFIGDIR")))
    (health,) = values(own, "HEALTHCHECK")
    assert ("/livez" in health) == (target == "bento")
    assert all(word.startswith("--from=build-") for word in " ".join(values(stage, "COPY")).split() if word.startswith("--from"))


def test_what_is_installed_is_locked() -> None:
    locked = {re.split("==", line)[0].lower().replace("_", "-") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line}
    assert all("==" in requirement for requirement in requirements("spark"))  # not in the lock, but pinned
    for image in ("common", "data", "train"):
        names = {re.split(r"[\[<>=]", requirement)[0].lower() for requirement in requirements(image)}
        assert names and names <= locked
    installing = [rest for stage in stages().values() for rest in values(stage, "RUN") if "pip install" in rest]
    assert len(installing) == 5 and all("--constraint requirements.lock" in rest for rest in installing)


def test_what_is_installed_once_is_wanted_by_all() -> None:
    from components import package

    bento = {name.lower() for name in (*package.REQUIREMENTS, "feast")}
    assert not COMMON & ONLY_TRAIN and bento >= COMMON
    assert len(requirements("common")) == len(COMMON) < len(requirements("data")) < len(requirements("train"))


def test_what_is_copied_is_there_and_sent_to_the_engine() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for stage in stages().values():
        for rest in values(stage, "COPY"):
            words = [word for word in rest.split() if not word.startswith("--")]
            for source in [] if "--from=" in rest else words[:-1]:
                assert any(source == name or source.startswith(f"{name}/") for name in sent), source
                assert source.startswith("build/bento") or (ROOT / source).exists(), source


def imports(start: list[str]) -> set[str]:
    """Every module that importing `start`, and calling any function in what it imports, may import: dotted, ours followed."""
    found: set[str] = set()
    waiting = list(start)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        place = ROOT / Path(*name.split("."))
        file = next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)
        if name.split(".")[0] not in HOUSE or file is None:
            continue
        waiting += [name.rpartition(".")[0]] if "." in name else []
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def test_the_data_image_has_all_that_its_steps_import() -> None:
    """Also inside functions: what the image leaves out is nowhere on their ways."""
    from longtrail.config.cluster import DATA_STEPS

    left_out = {MODULES.get(name, name) for name in ONLY_TRAIN}

    def missing(modules: set[str]) -> set[str]:
        return {name for name in modules if any(name == module or name.startswith(f"{module}.") for module in left_out)}

    around = ["pipelines.artifacts", "pipelines.attempts", "pipelines.run_report", "pipelines.source"]
    assert not missing(imports([f"components.{step}" for step in DATA_STEPS] + around))
    assert missing(imports(["components.train"])) >= {"torch", "lightning"}


def test_the_service_s_image_is_what_the_manifests_start() -> None:
    from serving.run import serve

    stage, (workload,) = stages()["bento"], documents(DEPLOY / "base" / "statefulset.yaml")
    pod = workload["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert ast.literal_eval(values(stage, "CMD")[0]) == container["args"]
    (entry,) = values(stage, "ENTRYPOINT")
    options = {word for word in ast.literal_eval(entry) + container["args"] if word.startswith("--")}
    assert options <= {f"--{name}" for name in inspect.signature(serve).parameters}
    assert [f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"] == values(stage, "USER")
    assert values(stage, "EXPOSE") == [str(container["ports"][0]["containerPort"])]
    state = next(variable["value"] for variable in container["env"] if variable["name"] == "LONGTRAIL_STATE")
    assert f"LONGTRAIL_STATE={state}" in values(stage, "ENV")[0]
