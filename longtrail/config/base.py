"""What all settings share: strictness, and the names of bounded numbers."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
Confidence = Annotated[float, Field(gt=0.0, lt=1.0, description="of the intervals")]
LearningRate = Annotated[float, Field(gt=0, le=1, description="step size of the optimiser, AdamW")]
HistoryLength = Annotated[int, Field(gt=0, le=1_000_000, description="newest events of a history that are read")]
Seed = Annotated[int, Field(ge=0, lt=2**32, description="of all that is random")]  # what scikit-learn takes
MeanDecay = Annotated[
    float, Field(ge=0.0, lt=1.0, description="decay a step of the running means of weights that are judged and kept; 0: the weights as they are")
]


def _names_a_folder(name: str) -> str:
    """A model's name becomes part of paths (build/models/NAME): it must not lead out of the folder it is put in."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(f"{name!r} is no name for a model; expected letters, digits, '_', '.' and '-', the first a letter or a digit")
    return name


def _all(value: Any) -> Any:
    if value is None or value == "all":
        return "all"
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer() or value < 1:
        raise ValueError(f"{value!r}; expected a whole number above 0, or all")  # of a union pydantic would say what each of its parts expects
    return int(value)


# A word and not null, which Kubeflow's parameters cannot hold: what is left out there has its default.
AtMost = Annotated[Positive | Literal["all"], BeforeValidator(_all)]


def at_most(value: int | Literal["all"]) -> int | None:
    """The number of an `AtMost`; None is all."""
    return None if value == "all" else value


ModelName = Annotated[str, AfterValidator(_names_a_folder)]

AS_WRITTEN = {"as_written": True}  # pydantic's context where somebody's file is read: not of models that were saved, which load as they are


class Settings(BaseModel):
    """Base of all settings: keyword-only, immutable, no unknown keys; in params.yaml, none that is changed in vain."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False)

    def idle(self) -> Iterator[tuple[str, str]]:
        """Names of settings that have no say beside the others, and beside which: (`negatives`, `loss: softmax`)."""
        return iter(())

    def beyond(self) -> Iterator[tuple[str, str]]:
        """Names of settings that cannot have more than another gives, and of that other: (`top_k`, `max_history`)."""
        return iter(())

    @model_validator(mode="after")
    def _all_have_a_say(self, info: ValidationInfo) -> Self:
        """What is written out as the default does no harm: whoever writes settings down writes them all."""
        if info.context != AS_WRITTEN:
            return self
        for name, why in self.idle():
            if self._differs(name):
                raise ValueError(f"{name} is {getattr(self, name)}, which changes nothing with {why}; expected it left out")
        for name, source in self.beyond():
            value, most = getattr(self, name), getattr(self, source)
            if value > most and self._differs(name):
                raise ValueError(f"{name} is {value}, {source} is {most}; expected {name} of at most {source}")
        return self

    def _differs(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True))
