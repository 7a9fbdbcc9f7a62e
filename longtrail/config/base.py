"""What all settings share: strictness, and the names of bounded numbers."""

from collections.abc import Iterator
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
MeanDecay = Annotated[
    float, Field(ge=0.0, lt=1.0, description="decay a step of the running means of weights that are judged and kept; 0: the weights as they are")
]


AS_WRITTEN = {"as_written": True}  # pydantic's context where somebody's file is read: not of models that were saved, which load as they are


class Settings(BaseModel):
    """Base of all settings: keyword-only, immutable, no unknown keys; in params.yaml, none that is changed in vain."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())

    def idle(self) -> Iterator[tuple[str, str]]:
        """Names of settings that have no say beside the others, and beside which: (`negatives`, `loss: softmax`)."""
        return iter(())

    @model_validator(mode="after")
    def _all_have_a_say(self, info: ValidationInfo) -> Self:
        """What is written out as the default does no harm: whoever writes settings down writes them all."""
        for name, why in self.idle() if info.context == AS_WRITTEN else ():
            value = getattr(self, name)
            if value != type(self).model_fields[name].get_default(call_default_factory=True):
                raise ValueError(f"{name} is {value}, which changes nothing with {why}; expected it left out")
        return self
