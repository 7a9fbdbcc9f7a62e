"""numba keeps a compiled kernel until the kernel's own file changes: whatever it draws from other files must change that file too."""

import ast
import hashlib
from pathlib import Path

import pytest

import longtrail

PACKAGE = Path(longtrail.__path__[0])
KERNELS = sorted(path for path in PACKAGE.rglob("*.py") if "\n@kernel" in path.read_text())


def drawn_from(path: Path) -> set[Path]:
    """The package's files that `path` imports names of, and so on; the decorator's own among them, since it holds the compiler's flags."""
    found: set[Path] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("longtrail."):
            file = PACKAGE.joinpath(*node.module.split(".")[1:]).with_suffix(".py")
            found |= {file} | drawn_from(file)
    return found


def test_kernels_are_found() -> None:
    assert [path for path in PACKAGE.rglob("*.py") if "cache=True" in path.read_text()] == [PACKAGE / "kernels.py"]
    assert {"compiled.py", "compiled_lookup.py", "kernels.py"} <= {path.name for path in KERNELS}


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_a_module_of_kernels_names_what_it_is_made_with(path: Path) -> None:
    wanted = {str(file.relative_to(PACKAGE)): hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in sorted(drawn_from(path))}
    constants = {
        node.targets[0].id: node.value
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    named = ast.literal_eval(constants["MADE_WITH"]) if "MADE_WITH" in constants else {}
    assert named == wanted, f"what {path.name} draws kernels from has changed: write there MADE_WITH = {wanted}"
