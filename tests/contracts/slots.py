"""What may stand in the slots of a model."""

from typing import Any

TABLES = ("dense", "recjpq")
ATTENTIONS = ("full", "full learned", "blossom")


def slots_of(settings: Any) -> tuple[tuple[str, str], ...]:
    """(slot, what fills it) of each slot that the model has; full attention with learned positions is one of its own."""
    filled = ((name, getattr(settings, name)) for name in ("items", "attention") if hasattr(settings, name))
    return tuple((name, f"{slot.kind} learned" if getattr(slot, "positions", "") == "learned" else slot.kind) for name, slot in filled)
