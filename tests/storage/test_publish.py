"""A folder goes to an object store and comes back byte for byte, whatever interrupts it."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.fetch import fetch
from components.package import seal
from components.publish import publish
from components.remote import locate
from longtrail.errors import StorageError
from longtrail.files import hash_files
from tests.storage.s3 import BUCKET, S3

FILES = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of many sizes, an empty one, one twice, and one deep below."""
    made = tmp_path / "bento"
    (made / "src" / "deep").mkdir(parents=True)
    random = np.random.default_rng(7)
    for number in range(FILES - 4):
        (made / f"part-{number}.bin").write_bytes(random.bytes(1000 * 4**number % 300_000))
    (made / "empty").touch()
    (made / "src" / "deep" / "code.py").write_text("x = 1\n")
    (made / "twin-a").write_bytes(b"the same bytes")
    (made / "src" / "twin-b").write_bytes(b"the same bytes")
    return made


def address(name: str) -> str:
    return f"s3://{BUCKET}/{name}"


def test_it_comes_back_byte_for_byte(s3: S3, folder: Path, tmp_path: Path) -> None:
    publish(address("whole"), folder)
    fetch(address("whole"), tmp_path / "back")
    assert hash_files(tmp_path / "back") == hash_files(folder)
    assert len(hash_files(folder)) == FILES
    blobs = [name for name in s3.objects("whole/") if "/blobs/" in name]
    assert len(blobs) == FILES - 1, "equal files are stored once"


def test_a_bento_comes_from_where_kubeflow_left_it(s3: S3, tmp_path: Path) -> None:
    s3.forget()
    bento, back = tmp_path / "bento", tmp_path / "back"
    (bento / "src" / "artifacts" / "ranker").mkdir(parents=True)
    (bento / "bento.yaml").write_text("labels: {}")
    (bento / "src" / "code.py").write_text("x = 1\n")
    (bento / "src" / "artifacts" / "ranker" / "model.bin").write_bytes(b"weights")
    (bento / "src" / "artifacts" / "manifest.json").write_text("{}")
    seal(bento / "src" / "artifacts")
    store, place = locate(address("kubeflow/run/package/bento"))
    store.put(f"{bento}/", place, recursive=True)
    fetch(address("kubeflow/run/package/bento"), back)
    assert hash_files(back) == hash_files(bento)
    store.pipe_file(f"{place}/src/artifacts/ranker/model.bin", b"weighty")
    with pytest.raises(StorageError, match=r"src/artifacts: ranker/model\.bin: expected SHA-256"):
        fetch(address("kubeflow/run/package/bento"), back)
    store.rm_file(f"{place}/src/artifacts/manifest.json")
    with pytest.raises(StorageError, match="no hashes; expected a Bento"):
        fetch(address("kubeflow/run/package/bento"), back)
    assert hash_files(back) == hash_files(bento)  # as it was


def test_an_upload_that_is_killed_is_nothing_and_the_next_one_goes_on(s3: S3, folder: Path, tmp_path: Path) -> None:
    s3.forget()
    command = [sys.executable, "-m", "components.publish", "--to", address("killed"), "--folder", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as client:

        def kill(_: dict[str, Any]) -> None:
            os.kill(client.pid, signal.SIGKILL)
            client.wait()

        with s3.trap(kill, after=4):
            _, said = client.communicate(timeout=120)
    assert client.returncode == -signal.SIGKILL, said
    before = s3.objects("killed/")
    assert len(before) >= 4 and "killed/manifest.json" not in before
    with pytest.raises(StorageError, match=rf"^s3://{BUCKET}/killed: no manifest\.json there"):
        fetch(address("killed"), tmp_path / "back")
    assert not (tmp_path / "back").exists()

    s3.forget()
    publish(address("killed"), folder)
    assert len(s3.uploads) == FILES - 1 - len(before) + 1, "what was missing, and the manifest"
    assert not {f"/{BUCKET}/{name}" for name in before} & set(s3.uploads)
    fetch(address("killed"), tmp_path / "back")
    assert hash_files(tmp_path / "back") == hash_files(folder)


def test_a_connection_that_breaks_is_tried_again_at_once(s3: S3, folder: Path, tmp_path: Path) -> None:
    broken: list[str] = []

    def hang_up(request: dict[str, Any]) -> None:
        broken.append(request["PATH_INFO"])
        request["werkzeug.socket"].shutdown(socket.SHUT_RDWR)

    s3.forget()
    with s3.trap(hang_up, after=3):
        publish(address("broken"), folder)
    assert len(broken) == 1 and broken[0] in s3.uploads
    fetch(address("broken"), tmp_path / "back")
    assert hash_files(tmp_path / "back") == hash_files(folder)


def test_the_manifest_is_written_last_and_nothing_twice(s3: S3, folder: Path) -> None:
    s3.forget()
    publish(address("last"), folder)
    assert s3.uploads[-1] == f"/{BUCKET}/last/manifest.json"
    s3.forget()
    publish(address("last") + "/", folder)
    assert s3.uploads == []


def test_publishing_anew_changes_nothing_for_who_reads_the_old_one(s3: S3, folder: Path, tmp_path: Path) -> None:
    publish(address("anew"), folder)
    old = s3.objects("anew/")
    (folder / "part-1.bin").write_bytes(b"another version")
    s3.forget()
    publish(address("anew"), folder)
    assert len(s3.uploads) == 2
    new = s3.objects("anew/")
    assert all(new[name] == content for name, content in old.items() if name != "anew/manifest.json")
    fetch(address("anew"), tmp_path / "back")
    assert (tmp_path / "back" / "part-1.bin").read_bytes() == b"another version"


@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_what_is_not_what_the_manifest_says_is_never_handed_over(s3: S3, folder: Path, tmp_path: Path, damage: str) -> None:
    publish(address(damage), folder)
    manifest = json.loads(s3.objects(damage)[f"{damage}/manifest.json"])
    blob = f"{damage}/blobs/{manifest['files']['part-3.bin']['sha256']}"
    if damage == "altered":
        s3.client().put_object(Bucket=BUCKET, Key=blob, Body=b"x" * manifest["files"]["part-3.bin"]["size"])
    else:
        s3.client().delete_object(Bucket=BUCKET, Key=blob)
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "here before").touch()
    with pytest.raises(StorageError, match="part-3.bin: expected SHA-256" if damage == "altered" else "part-3.bin is not there whole"):
        fetch(address(damage), tmp_path / "back")
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["here before"]
    assert not list(tmp_path.glob(".back*"))


@pytest.mark.parametrize("text", ["{}", '{"files": {"../out": {"sha256": "%s", "size": 1}}}' % ("0" * 64), "no JSON"])
def test_a_damaged_manifest_is_named(s3: S3, tmp_path: Path, text: str) -> None:
    s3.client().put_object(Bucket=BUCKET, Key="odd/manifest.json", Body=text.encode())
    with pytest.raises(StorageError, match=rf"^s3://{BUCKET}/odd/manifest\.json: not a manifest"):
        fetch(address("odd"), tmp_path / "back")
    assert not (tmp_path / "back").exists() and not (tmp_path / "out").exists()


def test_a_file_system_will_do_and_half_a_file_in_it_is_copied_again(folder: Path, tmp_path: Path) -> None:
    to = str(tmp_path / "volume" / "bento")
    publish(to, folder)
    (tmp_path / "volume" / "bento" / "manifest.json").unlink()
    blobs = sorted((tmp_path / "volume" / "bento" / "blobs").iterdir())
    blobs[0].write_bytes(blobs[0].read_bytes()[:-1] if blobs[0].stat().st_size else b"x")
    publish(to, folder)
    fetch(to, tmp_path / "back")
    assert hash_files(tmp_path / "back") == hash_files(folder)


def test_nothing_to_publish_and_nowhere_to(s3: S3, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no files there"):
        publish(address("nothing"), tmp_path / "no such folder")
    with pytest.raises(StorageError, match=r"^s3://no-such-bucket/x: "):
        publish("s3://no-such-bucket/x", folder)
    with pytest.raises(StorageError, match=r"^wrong://bucket/x: .*expected s3://bucket/folder"):
        locate("wrong://bucket/x")


def test_credentials_come_from_the_environment_and_the_error_says_so(s3: S3, folder: Path) -> None:
    without = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    without |= {"AWS_ENDPOINT_URL": s3.url, "AWS_EC2_METADATA_DISABLED": "true", "HOME": str(folder)}
    command = [sys.executable, "-m", "components.publish", "--to", address("anonymous"), "--folder", str(folder)]
    done = subprocess.run(command, env=without, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {address('anonymous')}: ") and "credentials" in last
