"""The house keeps its rules: linters clean, arrows one way, nothing unpickled, files small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("longtrail", "components", "features", "pipelines", "serving")
ENGINES = {"kfp", "feast", "dvc", "bentoml", "great_expectations"}
MAY_NOT_IMPORT = {
    "longtrail": ENGINES | {"components", "features", "pipelines", "serving"},
    "components": {"kfp", "pipelines", "serving"},
    "features": {"kfp", "dvc", "bentoml", "great_expectations", "components", "pipelines", "serving"},
    "serving": {"kfp", "dvc", "great_expectations", "components", "pipelines"},
}
OFFLINE = {"serving/drift.py": {"components"}}  # a tool that no Bento runs may use the pipeline's, inside a function


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_NOT_IMPORT)
def test_arrows_point_one_way(package: str) -> None:
    files = sources(package)
    assert files
    for file in files:
        tree, more = ast.parse(file.read_text()), OFFLINE.get(str(file.relative_to(ROOT)), set())
        at_import = set().union(*(imported(node) for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)))
        wrong = imported(tree) & (MAY_NOT_IMPORT[package] - more) | at_import & MAY_NOT_IMPORT[package]
        assert not wrong, f"{file.relative_to(ROOT)} imports {', '.join(wrong)}"


def test_nothing_is_unpickled() -> None:
    for package in PACKAGES:
        for file in sources(package):
            tree = ast.parse(file.read_text())
            assert not imported(tree) & {"pickle", "cloudpickle", "joblib", "dill"}, file
            for node in ast.walk(tree):
                if isinstance(node, ast.keyword) and node.arg == "weights_only":
                    assert not (isinstance(node.value, ast.Constant) and node.value.value is False), file


def test_files_are_small() -> None:
    long = [f"{f.relative_to(ROOT)}" for package in PACKAGES for f in sources(package) if len(f.read_text().splitlines()) > 400]
    assert not long


def test_reading_the_settings_is_light() -> None:
    """Every command reads params.yaml first: that must not cost the import of torch or of a data-frame library."""
    heavy = ["torch", "pandas", "feast", "great_expectations", "kfp", "duckdb"]
    code = f"import sys, longtrail.config; print(*[m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0 and not done.stdout.strip(), done.stdout + done.stderr


@pytest.mark.parametrize("tool", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=["ruff", "format", "mypy"])
def test_linters_are_clean(tool: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *tool], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


STEPS = ("ingest", "validate", "build_features", "train", "evaluate", "select", "ab_test", "package")


@pytest.mark.parametrize("step", STEPS)
def test_every_step_explains_itself(step: str) -> None:
    command = [sys.executable, "-m", f"components.{step}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env={"PATH": "/usr/bin", "COLUMNS": "150"})
    assert done.returncode == 0, done.stderr
    assert "--params" in done.stdout and "[default:" in done.stdout
