"""Names, as they are given at the command line."""

from collections.abc import Iterable
from typing import NamedTuple

from anact_jax import ACTIVATIONS


def check_name(what: str, name: str, known: Iterable[str]) -> None:
    """Raises ValueError unless `name` is one of `known`."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; expected one of {', '.join(known)}")


class ActivationName(NamedTuple):
    """An activation, and whether it is normalized: `"nswish"` is Swish, normalized."""

    normalized: bool
    base: str

    @classmethod
    def parse(cls, name: str) -> "ActivationName":
        """Raises ValueError unless `name` is an activation, or one with an n before it."""
        if name in ACTIVATIONS:
            return cls(False, name)
        if name[:1] == "n" and name[1:] in ACTIVATIONS:
            return cls(True, name[1:])
        raise ValueError(
            f"unknown activation {name!r}; expected one of {', '.join(ACTIVATIONS)}, or n (normalized) and its name"
        )
