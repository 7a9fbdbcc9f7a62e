"""What an image needs of pyproject.toml, a requirement a line: `python tools/requirements.py data`. The versions come from requirements.lock."""

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
# What ingest, validate and build_features never import; tests/deploy/test_images.py follows their imports.
ONLY_TRAIN = {"torch", "lightning", "torchmetrics", "safetensors", "numba", "scikit-learn", "dvc", "dvclive", "bentoml", "psutil", "kfp-kubernetes"}


def requirements(image: str, pyproject: Path = PYPROJECT) -> list[str]:
    """Of the image `data` or `train`."""
    wanted = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    left_out = {"data": ONLY_TRAIN, "train": set()}[image]
    return [requirement for requirement in wanted if re.split(r"[\[<>=~! ;]", requirement, maxsplit=1)[0].lower() not in left_out]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))
