"""What a killed run leaves behind, so that the next one ends with the very same weights.

One file, written anew after each epoch and, where settings say so, within epochs; whole or not at all. safetensors for every tensor and JSON in its
header for the rest. No pickle: reading it runs no code.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longtrail.files import atomic_file

FORMAT = 4  # in every fingerprint: a file written by another layout of this module is never picked up
STATE_FILE = "state.safetensors"

log = logging.getLogger(__name__)

Weights = dict[str, Tensor]
Row = dict[str, float]  # one row of the learning curve: epoch (from 1), train_loss, valid_METRIC…; 0, without a loss: what training goes on from


@dataclass(kw_only=True)
class Progress:
    """Where a training run stands after `epochs` whole epochs and `step` steps of the next one."""

    epochs: int = 0
    step: int = 0
    loss: tuple[float, float] = (0.0, 0.0)  # of those steps: Σ loss · weight, Σ weight
    waited: int = 0  # epochs since the best one
    best_value: float | None = None
    best_epoch: int = 0
    best: Weights = field(default_factory=dict)  # the best epoch's weights, on the CPU
    averaged: int = 0  # steps that `average` is of
    average: Weights = field(default_factory=dict)  # the running means of weights, where the model trains; none where none are kept
    curve: list[Row] = field(default_factory=list)

    def exhausted(self, patience: int) -> bool:
        """True when the best epoch is `patience` epochs ago."""
        return self.best_value is not None and self.waited >= patience

    def facts(self) -> dict[str, Any]:
        names = ("epochs", "step", "loss", "waited", "best_value", "best_epoch", "averaged", "curve")
        return {name: getattr(self, name) for name in names}


def fingerprint(**parts: Any) -> str:
    """16 hex digits of `parts` (JSON values), this file's format and torch's version: what must not differ between a run and its resumption."""
    text = json.dumps({**parts, "format": FORMAT, "torch": torch.__version__}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Checkpoint:
    """The resume file of one model, one data set and one set of settings: `ROOT/NAME-FINGERPRINT/state.safetensors`."""

    def __init__(self, root: Path, name: str, identity: str) -> None:
        self.folder = Path(root) / f"{name}-{identity}"
        self.file = self.folder / STATE_FILE

    def save(self, progress: Progress, model: Mapping[str, Tensor], optimiser: Mapping[str, Any]) -> None:
        """`optimiser` is a torch optimiser's state_dict; its hyper-parameters are not kept, since the fingerprint already fixes them."""
        tensors = {f"model.{name}": value for name, value in model.items()}
        tensors |= {f"best.{name}": value for name, value in progress.best.items()}
        tensors |= {f"average.{name}": value for name, value in progress.average.items()}
        for index, state in optimiser["state"].items():
            tensors |= {f"optimiser.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        # Clones: safetensors refuses tensors that share memory.
        tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
        with atomic_file(self.file) as aside:
            save_file(tensors, aside, metadata={"progress": json.dumps(progress.facts())})

    def load(self) -> tuple[Progress, Weights, dict[int, dict[str, Tensor]]] | None:
        """The progress, the model's weights and the optimiser's state by parameter; None where there is nothing to resume.

        A damaged file is worth a warning and a start from scratch, not an error: all it holds can be computed again.
        """
        if not self.file.exists():
            return None
        try:
            with safe_open(self.file, framework="pt") as content:
                facts = json.loads(content.metadata()["progress"])
                tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            log.warning("%s: damaged (%s); training starts from scratch", self.file, error)
            return None
        optimiser: dict[int, dict[str, Tensor]] = {}
        for name, value in _below(tensors, "optimiser.").items():
            index, key = name.split(".", 1)
            optimiser.setdefault(int(index), {})[key] = value
        facts["loss"] = tuple(facts["loss"])
        return Progress(**facts, best=_below(tensors, "best."), average=_below(tensors, "average.")), _below(tensors, "model."), optimiser

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _below(tensors: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
