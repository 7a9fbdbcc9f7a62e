"""What an image needs of pyproject.toml, a requirement a line: `python tools/requirements.py data`. The versions come from requirements.lock."""

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
# What the service's image has too.
COMMON = {"numpy", "pandas", "pyarrow", "duckdb", "ibis-framework", "pydantic", "pyyaml", "typer", "tqdm", "scipy", "feast"}
# What ingest, validate and build_features never import; tests/deploy/test_images.py follows their imports.
ONLY_TRAIN = {"torch", "lightning", "torchmetrics", "safetensors", "numba", "scikit-learn", "dvclive", "bentoml", "uv", "psutil", "kfp-kubernetes"}


def requirements(image: str, pyproject: Path = PYPROJECT) -> list[str]:
    """Of the image `data` or `train`; of `spark`, what comes on top of `data`; `common`: what these and the service's share, installed once."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    if image == "spark":
        return list(project["optional-dependencies"]["spark"])  # pinned there: in the lock, everybody would install its 0.4 GB
    wanted = [*project["dependencies"], *project["optional-dependencies"]["s3"]]  # logs and artifacts may lie in object storage
    names = [re.split(r"[\[<>=~! ;]", requirement, maxsplit=1)[0].lower() for requirement in wanted]
    kept = {"common": COMMON, "data": set(names) - ONLY_TRAIN, "train": set(names)}[image]
    return [requirement for name, requirement in zip(names, wanted, strict=True) if name in kept]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))
