"""Settings of live experiments (`serving.experiment`) and of the log they are judged by (`serving.answer_log`)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from longtrail.config.base import Positive, PositiveFloat, Settings

PACKAGED, CHAMPION, INCUMBENT = "packaged", "champion", "incumbent"  # models by role
RESERVED = "popularity_fallback"  # the arm of lists that no arm chose

Share = Annotated[float, Field(ge=0, le=1)]
ArmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class PlackettLuceDraw(Settings):
    kind: Literal["plackett_luce"] = "plackett_luce"
    temperature: PositiveFloat = Field(description="logits are divided by it: higher explores more")


class EpsilonGreedyDraw(Settings):
    kind: Literal["epsilon_greedy"] = "epsilon_greedy"
    epsilon: Share = Field(description="at each place, the chance that any candidate left is shown instead of the best one")


class BestDraw(Settings):
    kind: Literal["best"] = "best"


Draw = Annotated[PlackettLuceDraw | EpsilonGreedyDraw | BestDraw, Field(discriminator="kind")]


class ArmSettings(Settings):
    model: str = Field(PACKAGED, description="champion, incumbent, packaged (which of the two the A/B verdict chose), or a ranking model's name")
    policy: Draw | None = Field(None, description="how lists are drawn from its scores; null: as serving.explore_temperature says")
    share: Share | None = Field(None, description="of all users; null for the canary's arm alone")


class ShadowSettings(Settings):
    """A model that scores what the others are asked, is logged, and never shown."""

    model: str = Field(description="as an arm's model")
    waiting: Positive = Field(256, description="requests that wait for a quiet moment to be scored; more are left out, and counted")


class CanarySettings(Settings):
    """An arm whose share grows by itself while it does no harm, and goes back to 0 by itself when it does."""

    arm: ArmName = Field(description="which of the arms")
    steps: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field((0.01, 0.05, 0.25, 0.5), min_length=1, description="its shares, one after another")
    hold_requests: Positive = Field(1_000, description="requests of the canary at a step before the next")
    hold_minutes: PositiveFloat = Field(30.0, description="and minutes")
    max_error_rate: Share = Field(0.01, description="share of the canary's requests that may fail")
    max_p99_ms: PositiveFloat = Field(100.0, description="p99 of the canary's requests inside the service")
    max_ctr_loss: Share = Field(0.0, description="of the others' click rate, that the canary may lose")
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = Field(
        0.95, description="that a canary that breaks no guardrail is never rolled back, over all steps, looks and guardrails together"
    )
    check_seconds: PositiveFloat = Field(5.0, description="between two looks")

    @model_validator(mode="after")
    def _rising(self) -> "CanarySettings":
        if any(after <= before for before, after in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError(f"steps are {list(self.steps)}; expected each share to be larger than the one before")
        return self


class ExperimentSettings(Settings):
    """Who is shown which arm. Without arms there is one: the packaged ranker."""

    arms: dict[ArmName, ArmSettings] = Field(default_factory=dict, description="name to arm; the name stands in answers, logs and reports")
    salt: str = Field("", max_length=128, description="another salt is another random assignment of users: set one for each experiment")
    shadow: ShadowSettings | None = None
    canary: CanarySettings | None = None

    @model_validator(mode="after")
    def _shares_add_up(self) -> "ExperimentSettings":
        if RESERVED in self.arms:
            raise ValueError(f"arms: {RESERVED!r} is the name of lists that no arm chose; expected another")
        canary = self.canary.arm if self.canary else None
        if canary is not None and canary not in self.arms:
            raise ValueError(f"canary.arm is {canary!r}; arms has {', '.join(self.arms) or 'none'}")
        if canary is not None and self.arms[canary].share is not None:
            raise ValueError(f"arms.{canary}.share: expected none, the canary's steps set it")
        others = {name: arm.share for name, arm in self.arms.items() if name != canary}
        for name, share in others.items():
            if share is None:
                raise ValueError(f"arms.{name}.share: missing; expected the share of users")
        total = sum(share or 0.0 for share in others.values())
        if self.arms and abs(total - 1) > 1e-9:
            without = f" (without the canary {canary})" if canary else ""
            raise ValueError(f"the shares of arms{without} add up to {total:g}; expected 1")
        return self

    @property
    def models(self) -> tuple[str, ...]:
        """Every model named, roles included, each once."""
        named = [arm.model for arm in self.arms.values()] + ([self.shadow.model] if self.shadow else [])
        return tuple(dict.fromkeys(named))


class AnswerLogSettings(Settings):
    """When the answer log is rotated."""

    segment_bytes: Positive = Field(67_108_864, description="a segment of this size is closed and converted to Parquet")
    segment_minutes: PositiveFloat = Field(60.0, description="and one of this age, at the next answer")
