"""Names, as they are given at the command line."""

from collections.abc import Iterable
from typing import NamedTuple

from anact_jax import ACTIVATIONS


def check_name(what: str, name: str, known: Iterable[str]) -> None:
    """Raises ValueError unless `name` is one of `known`."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; expected one of {', '.join(known)}")


class ActivationName(NamedTuple):
    """An activation and its form: `""` as it is, `"n"` normalized, `"d"` by Deep Kernel Shaping."""

    form: str
    base: str

    @classmethod
    def parse(cls, name: str) -> "ActivationName":
        """Raises ValueError unless `name` is an activation, or one with the letter of its form before it."""
        if name in ACTIVATIONS:
            return cls("", name)
        if name[:1] in ("n", "d") and name[1:] in ACTIVATIONS:
            return cls(name[0], name[1:])
        raise ValueError(
            f"unknown activation {name!r}; expected one of {', '.join(ACTIVATIONS)}, or n (normalized) or d (Deep "
            "Kernel Shaping) and its name"
        )
