"""One flipped byte in any kind of artifact, a file too many or too few, a manifest of another Bento: named, and never served."""

import shutil
from pathlib import Path

import pytest
import yaml

from longtrail.errors import LongtrailError, ModelError
from longtrail.files import hash_path, read_json, write_json
from serving.artifacts import Artifacts
from serving.integrity import check_files
from tests.serving.bento import Outputs

KINDS = (
    "retriever/*.safetensors",
    "ranker/*.safetensors",
    "ranker/*.json",
    "catalogue.parquet",
    "users.parquet",
    "parity.parquet",
    "params.yaml",
    "feast/feature_store.yaml",
    "feast/**/*.db",
    "manifest.json",
)


@pytest.fixture
def bento(packaged: Outputs, tmp_path: Path) -> Path:
    copied = tmp_path / "bento"
    (copied / "src").mkdir(parents=True)
    shutil.copyfile(packaged.bento / "bento.yaml", copied / "bento.yaml")
    shutil.copytree(packaged.bento / "src" / "artifacts", copied / "src" / "artifacts")
    return copied


def artifacts(bento: Path) -> Path:
    return bento / "src" / "artifacts"


def flip(path: Path) -> None:
    """One bit of the byte in the middle; of text, one that leaves it text."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_was_packaged_opens(bento: Path) -> None:
    opened = Artifacts.open(artifacts(bento))
    files = {path.relative_to(artifacts(bento)).as_posix() for path in artifacts(bento).rglob("*") if path.is_file()}
    assert set(opened.manifest.files) == files - {"manifest.json"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_is_found_and_its_file_named(bento: Path, kind: str) -> None:
    file = sorted(artifacts(bento).glob(kind))[0]
    before = hash_path(file)
    flip(file)
    with pytest.raises(LongtrailError) as raised:
        Artifacts.open(artifacts(bento))
    says = str(raised.value)
    assert file.name in says
    if kind != "manifest.json":  # of which a byte may stand for no JSON, for another value, or for another hash
        assert hash_path(file) in says and before in says


def test_a_file_that_is_missing_or_too_many_is_named(bento: Path) -> None:
    (artifacts(bento) / "users.parquet").unlink()
    (artifacts(bento) / "index").mkdir(exist_ok=True)
    (artifacts(bento) / "index" / "stale.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"users\.parquet: missing.*index/stale\.bin: not in the manifest"):
        Artifacts.open(artifacts(bento))


def test_a_model_exchanged_with_its_hash_is_of_another_bento(bento: Path) -> None:
    """Whoever rewrites the manifest to fit must rewrite the label, too: a half-done copy has not."""
    manifest = artifacts(bento) / "manifest.json"
    model = next((artifacts(bento) / "ranker").glob("*.safetensors"))
    flip(model)
    content = read_json(manifest)
    content["files"][model.relative_to(artifacts(bento)).as_posix()] = hash_path(model)
    write_json(manifest, content)
    with pytest.raises(ModelError, match="label manifest"):
        Artifacts.open(artifacts(bento))


def test_lineage_of_another_bento(bento: Path) -> None:
    described = yaml.safe_load((bento / "bento.yaml").read_text())
    described["labels"]["features"] = "0" * 64
    (bento / "bento.yaml").write_text(yaml.safe_dump(described))
    with pytest.raises(ModelError, match="label features: '0000"):
        Artifacts.open(artifacts(bento))


def test_many_faults_are_counted_not_all_listed(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="and 7 more") as raised:
        check_files(tmp_path, {f"f{number:02d}": "" for number in range(12)})
    assert str(raised.value).count("missing") == 5
