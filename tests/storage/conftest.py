"""One S3 server for the tests of this folder, its credentials in the environment, as a user has them."""

from collections.abc import Iterator

import pytest

from tests.storage.s3 import BUCKET, CREDENTIALS, S3


@pytest.fixture(scope="package")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """Its bucket is BUCKET. Each test keeps to a folder of its own. DVC's caches and settings are a new machine's."""
    server = S3()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": server.url}.items():
            patch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.delenv(name, raising=False)
        for name in ("SITE_CACHE_DIR", "GLOBAL_CONFIG_DIR", "SYSTEM_CONFIG_DIR"):
            patch.setenv(f"DVC_{name}", str(tmp_path_factory.mktemp("dvc") / name))
        patch.setenv("DVC_NO_ANALYTICS", "1")
        server.client().create_bucket(Bucket=BUCKET)
        yield server
    server.stop()
