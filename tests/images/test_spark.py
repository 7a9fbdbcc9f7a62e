"""The image with Spark: one line of the settings, and ingest and build_features write by Spark what they write by DuckDB."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from longtrail.config import parse_config
from tests.end_to_end.equal import differences
from tests.images.building import READ_ONLY, SETTINGS, asked_for, build, check_what_it_says
from tests.images.engine import FIGURES, Engine

pytestmark = asked_for
# Interpreted, with the quick compiler: many small queries, not one large one.
QUICK = {
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.sql.adaptive.enabled": "false",
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
}
STEPS = (
    "ingest --params /work/params.yaml --tables /work/tables --cache /tmp/cache",
    "validate --params /work/params.yaml --tables /work/tables --validation /work/validation",
    "build_features --params /work/params.yaml --tables /work/tables --validation /work/validation --features /work/features",
)


@pytest.fixture(scope="module")
def spark(docker: Engine, place: Path, base: str, pip: dict[str, str], images: dict[str, str]) -> str:
    """The image; those below it are built."""
    return build(docker, place, base, pip, "spark")


def settings(engine: str) -> dict[str, Any]:
    options = {"master": "local[2]", "driver_memory": "1g", "shuffle_partitions": 2, "options": QUICK}
    return {
        "dataset": SETTINGS["dataset"] | {"users": 16, "items": 20, "events_per_user": 10, "requests_per_user": 3},
        "validation": {"max_new_item_share": 1.0, "max_top_item_share": 1.0},
        "ingest": {"engine": engine, "spark": options},
        "features": SETTINGS["features"],  # joined by DuckDB: Feast's joins by Spark take minutes here, and tests/test_spark.py has them
    }


def test_it_is_small_enough_and_says_what_it_is(docker: Engine, spark: str) -> None:
    check_what_it_says(docker, spark, "spark")


def test_what_spark_writes_in_it_is_what_duckdb_writes(docker: Engine, spark: str, tmp_path: Path) -> None:
    """Without root, on a read-only root, as every step runs on a cluster."""
    written = []
    for engine in ("duckdb", "spark"):
        place = tmp_path / engine
        place.mkdir()
        place.chmod(0o777)  # the image's user is nobody's here
        (place / "params.yaml").write_text(yaml.safe_dump(parse_config(settings(engine)).model_dump(mode="json", exclude_none=True)))
        commands = " && ".join(f"python -m components.{step}" for step in STEPS)
        docker.run("run", *READ_ONLY, "-v", f"{place}:/work", spark, "sh", "-c", f"{commands} && chmod -R a+rwX /work/*/")
        written.append({name: place / name for name in ("tables", "features")})
    assert not differences(*written)
    FIGURES.append("ingest and build_features by Spark in its image: the files of DuckDB")


def test_without_it_a_step_says_what_is_missing(docker: Engine, images: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"dataset": {"kind": "world", "users": 10}, "ingest": {"engine": "spark"}}))
    tmp_path.chmod(0o777)
    command = ["python", "-m", "components.ingest", "--params", "/work/params.yaml", "--tables", "/work/tables", "--cache", "/work"]
    done = docker.run("run", *READ_ONLY, "-v", f"{tmp_path}:/work", images["data"], *command, check=False)
    assert done.returncode != 0 and "cluster.spark_image" in done.stderr
