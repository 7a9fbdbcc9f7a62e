"""What all settings share: strictness, and the names of bounded numbers."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
MeanDecay = Annotated[
    float, Field(ge=0.0, lt=1.0, description="decay a step of the running means of weights that are judged and kept; 0: the weights as they are")
]


class Settings(BaseModel):
    """Base of all settings: keyword-only, immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())
