"""Names, as they are given at the command line."""

import difflib
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
        """From a name such as `nswish`, or as the modules are called, `NSwish`, `NLeakyReLU`.

        Raises:
            ValueError: it is neither an activation nor one with an n before it; the message suggests a near one.
        """
        plain = {known.replace("_", ""): known for known in ACTIVATIONS}
        known = plain | {f"n{short}": f"n{name}" for short, name in plain.items()}
        short = name.lower().replace("_", "")
        if short in known:
            return cls(short not in plain, plain.get(short) or plain[short[1:]])
        near = difflib.get_close_matches(short, known, n=1)
        raise ValueError(
            f"unknown activation {name!r}; expected one of {', '.join(ACTIVATIONS)}, or n (normalized) and its name"
            + (f". Did you mean {known[near[0]]!r}?" if near else "")
        )

    def __str__(self) -> str:
        return ("n" if self.normalized else "") + self.base
