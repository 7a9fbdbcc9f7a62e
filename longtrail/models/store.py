"""A model on disk: model.safetensors, model.json (the card) and lineage.json in one folder. No pickle."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic import ValidationError as PydanticError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from longtrail.config import Model, Settings
from longtrail.config.messages import explain
from longtrail.errors import ModelError
from longtrail.files import atomic_directory, read_json, write_json
from longtrail.models.contracts import SizedByData, Sizes
from longtrail.models.registry import build_model
from longtrail.models.vocabulary import Vocabulary

WEIGHTS, CARD, LINEAGE = "model.safetensors", "model.json", "lineage.json"
FORMAT = 1
_SETTINGS: TypeAdapter[Any] = TypeAdapter(Model)


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """All that is needed to build the model again and to know what its ids mean."""

    name: str
    settings: Any  # one of longtrail.config's model settings
    sizes: Sizes
    actions: tuple[str, ...]  # action id = index + 1
    prior_click_rate: float

    @property
    def stage(self) -> str:
        """retrieval or ranking."""
        return self.settings.stage


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model on the CPU in eval mode, with its card; `vocabulary` only where somebody needs it (longtrail.models.vocabulary)."""

    module: nn.Module
    card: ModelCard
    vocabulary: Vocabulary | None = None


def save_model(folder: Path, module: nn.Module, card: ModelCard, lineage: dict[str, Any]) -> None:
    """Write the folder whole or not at all; what stood in it before is replaced. Equal weights are equal bytes."""
    weights = _bytes(module)
    with atomic_directory(folder) as aside:
        (aside / WEIGHTS).write_bytes(weights)
        document = {
            "format": FORMAT,
            "name": card.name,
            "settings": card.settings.model_dump(mode="json"),
            "sizes": asdict(card.sizes),
            "actions": list(card.actions),
            "prior_click_rate": card.prior_click_rate,
            "weights": {"file": WEIGHTS, "sha256": hashlib.sha256(weights).hexdigest(), "bytes": len(weights)},
        }
        write_json(aside / CARD, document)
        write_json(aside / LINEAGE, lineage)


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of the weights as save_model writes them."""
    return hashlib.sha256(_bytes(module)).hexdigest()


def _bytes(module: nn.Module) -> bytes:
    return save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()})


def load_card(folder: Path) -> ModelCard:
    """The card alone, weights unread. Raises ModelError naming file and field."""
    return _card(Path(folder) / CARD)[0]


def load_model(folder: Path, *, settings: type[Settings] | None = None) -> LoadedModel:
    """`settings`: their class, for a kind of one's own that longtrail.config does not know; its model must be in registry.MODELS.

    Raises ModelError naming file and what differs where a file is missing or damaged, or weights and card do not fit.
    """
    folder = Path(folder)
    card, expected = _card(folder / CARD, Model if settings is None else settings)
    tensors = _tensors(folder / WEIGHTS, expected)
    module = build_model(card.settings, card.sizes)
    if isinstance(module, SizedByData):
        module.allocate({name: tensor.shape for name, tensor in tensors.items()})
    _check_tensors(folder / WEIGHTS, tensors, module.state_dict())
    module.load_state_dict(tensors)
    return LoadedModel(module=module.eval(), card=card)


def check_fits(card: ModelCard, sizes: Sizes, actions: Sequence[str]) -> None:
    """Raises ModelError where a model's ids cannot mean what the data's do: other actions or categories, or items the data does not hold.

    Data with more items than the model is fine: items are only appended, and the model reads the new ones as unknown.
    """
    if tuple(actions) != card.actions:
        raise ModelError(f"model {card.name}: actions {list(card.actions)}; the data has {list(actions)}")
    for field in ("items", "categories"):
        held, given = getattr(card.sizes, field), getattr(sizes, field)
        if held > given:
            raise ModelError(f"model {card.name}: {held} {field}; the data has {given}: it was trained on other data")


def _card(path: Path, known: Any = Model) -> tuple[ModelCard, dict[str, Any]]:
    """`known`: what settings may be, a class or a choice of classes."""
    try:
        document = read_json(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; expected a model's card") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ModelError(f"{path}: format {document.get('format') if isinstance(document, dict) else None!r}; expected {FORMAT}")
    try:
        settings: Any = (_SETTINGS if known is Model else TypeAdapter(known)).validate_python(_of_today(document["settings"]))
        sizes = Sizes(**document["sizes"])
        card = ModelCard(
            name=str(document["name"]),
            settings=settings,
            sizes=sizes,
            actions=tuple(document["actions"]),
            prior_click_rate=float(document["prior_click_rate"]),
        )
        return card, {"sha256": str(document["weights"]["sha256"]), "bytes": int(document["weights"]["bytes"])}
    except PydanticError as error:
        raise ModelError(f"{path}: {'; '.join(f'settings.{line}' for line in explain(error, known))}") from None
    except KeyError as error:
        raise ModelError(f"{path}: no field {error}") from None
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from None


def _of_today(settings: Any) -> Any:
    """Settings of a card, with the words for what went without saying when it was written: full attention had learned positions alone."""
    attention = settings.get("attention") if isinstance(settings, dict) else None
    if isinstance(attention, dict) and attention.get("kind") == "full":
        return {**settings, "attention": {"positions": "learned", **attention}}
    return settings


def _tensors(path: Path, expected: dict[str, Any]) -> dict[str, Tensor]:
    try:
        weights = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; expected the weights of {CARD}") from None
    if len(weights) != expected["bytes"]:
        raise ModelError(f"{path}: {len(weights)} bytes; {CARD} says {expected['bytes']}")
    found = hashlib.sha256(weights).hexdigest()
    if found != expected["sha256"]:
        raise ModelError(f"{path}: SHA-256 {found}; {CARD} says {expected['sha256']}")
    try:
        return load_tensors(weights)
    except SafetensorError as error:
        raise ModelError(f"{path}: not safetensors: {error}") from None


def _check_tensors(path: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        raise ModelError(f"{path}: tensors missing: {', '.join(missing) or 'none'}; not in the model: {', '.join(unknown) or 'none'}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            is_, wanted = found[name], tensor
            raise ModelError(f"{path}: {name} is {is_.dtype} {list(is_.shape)}; the card's model needs {wanted.dtype} {list(wanted.shape)}")
