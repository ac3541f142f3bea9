"""A training state as plain tensors, to be compared bit for bit."""

from typing import Any

from torch import Tensor


def tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor of the modules and optimisers of a state, by name."""
    found: dict[str, Tensor] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[name] = value.detach().clone()
        elif hasattr(value, "state_dict"):
            collect(name, value.state_dict())
        elif isinstance(value, dict):
            for key, entry in value.items():
                collect(f"{name}/{key}", entry)

    collect("state", state)
    return found
