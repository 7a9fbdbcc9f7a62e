import json
import shutil
import urllib.request
from pathlib import Path

import pytest

from tests.images.engine import UnavailableError, engine
from tests.images.wheels import from_outside, locked, needs_cuda, read_settings, served

LISTED = """:env:.default-timeout='180'
:env:.find-links='/b'
global.extra-index-url='file:///a/simple https://example.org/simple'
global.find-links='/a'
install.no-binary='x'
"""


def test_the_environment_is_over_pip_s_files() -> None:
    assert read_settings(LISTED) == {"find-links": "/b", "extra-index-url": "file:///a/simple https://example.org/simple"}


def test_folders_are_served_and_addresses_passed_on(tmp_path: Path) -> None:
    for place in ("links/one.whl", "index/simple/two/index.html", "index/files/two.whl"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(place)
    (tmp_path / "www").mkdir()
    found = {"find-links": str(tmp_path / "links"), "extra-index-url": f"file://{tmp_path}/index/simple https://example.org/simple"}
    with served(found, tmp_path / "www") as variables:
        links, (index, other) = variables["PIP_FIND_LINKS"], variables["PIP_EXTRA_INDEX_URL"].split()
        assert other == "https://example.org/simple"
        for address, place in (
            (f"{links}one.whl", "links/one.whl"),
            (f"{index}two/", "index/simple/two/index.html"),
            (f"{index}../files/two.whl", "index/files/two.whl"),
        ):
            with urllib.request.urlopen(address.replace("simple/../", ""), timeout=10) as answer:
                assert answer.read().decode() == place


@pytest.mark.parametrize(
    ("requires", "needs"),
    [(["filelock", "sympy>=1.13"], False), (["nvidia-nccl-cu13==2.1; platform_system == 'Linux'"], True), (["cuda-toolkit; extra == 'gpu'"], False)],
)
def test_a_build_of_torch_for_cuda_is_told(requires: list[str], needs: bool) -> None:
    assert needs_cuda(json.dumps({"install": [{"metadata": {"name": "torch", "requires_dist": requires}}]})) == needs
    assert not needs_cuda(json.dumps({"install": [{"metadata": {"name": "tqdm"}}]}))


@pytest.mark.parametrize(
    ("output", "outside"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n", True),
        ("E: Failed to fetch http://example.org/x.deb  Connection timed out\n", True),
        ("pip._vendor.urllib3.exceptions.ReadTimeoutError: Read timed out.\n", True),
        ("ERROR: No matching distribution found for numpy==99\n", False),
        ("ERROR: Cannot install a and b because these package versions have conflicting dependencies.\n", False),
        ("COPY failed: file not found in build context or excluded by .dockerignore: stat gone: file does not exist\n", False),
        ("ModuleNotFoundError: No module named 'longtrail'\n", False),
    ],
)
def test_what_the_machine_is_to_blame_for_is_told_from_what_we_are(output: str, outside: bool) -> None:
    assert from_outside(f"Step 9/24 : RUN pip\n{output}") == outside


def test_versions_come_from_the_lock() -> None:
    assert locked("torch").startswith("torch==2.")


def test_without_an_engine_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UnavailableError, match="docker is not installed"), engine(tmp_path / "engine"):
        pass
