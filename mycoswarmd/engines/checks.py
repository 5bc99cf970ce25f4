"""The last checks before a prompt leaves for an engine; every adapter makes them."""

from collections.abc import Sequence

from mycoswarmd.core.policy.evaluate import Permit
from mycoswarmd.errors import LocalProtocolError, NotFound
from mycoswarmd.flow.ports import ModelInfo
from mycoswarmd.wire.prompt import Prompt


def find_model(models: Sequence[ModelInfo], prompt: Prompt, *, engine: str) -> ModelInfo:
    """Return the model a prompt names, exactly, or raise NotFound("model-not-found")."""
    for info in models:
        if info.name == prompt.model and prompt.kind in info.kinds:
            return info
    raise NotFound(
        "model-not-found",
        f"cannot find model {prompt.model[:80]!r} for {prompt.kind.value}: engine {engine!r} has none",
    )


def check_permit(permit: Permit, info: ModelInfo) -> None:
    """Refuse to send a prompt where its permit does not say it may go (M1)."""
    if not permit.covers(zone=info.zone, dest=info.dest, model=info.name, node=info.node):
        raise LocalProtocolError(
            "permit-mismatch",
            f"cannot send a prompt to model {info.name[:80]!r} at engine {info.engine!r}: "
            f"its permit does not cover zone {info.zone.value!r}",
        )
