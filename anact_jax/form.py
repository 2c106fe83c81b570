"""`Form`: the options that decide what a normalized activation is, in one object."""

import dataclasses
import difflib
import math
import operator
import re
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

Rule: TypeAlias = Literal["mean", "forward", "backward", "geometric", "harmonic", "exact"]
Reference: TypeAlias = Literal["input", "unit"]
RULES: tuple[Rule, ...] = get_args(Rule)
REFERENCES: tuple[Reference, ...] = get_args(Reference)

_UNWRITTEN_EPSILON = 1e-6  # what a text without `eps` means, for ever


@dataclasses.dataclass(frozen=True)
class Form:
    """The options of a normalized activation `factor * (f(x) - shift)`.

    A form is hashable, and checked when it is made. What takes a form takes its text as well.

    Attributes:
        rule: how factor and shift follow from the statistics; one of `RULES`, see `anact_jax.normalization`.
        center: subtract the mean of f(x).
        reference: `"input"` keeps the variance of the input, `"unit"` gives the output the variance 1; see
            `anact_jax.normalization`.
        nonlinearity: normalize `anact_jax.tempered(f, nonlinearity)`; None leaves f as it is.
        feature_axes: axes of the input that have statistics of their own: `-1` for one set a channel, `()` for one a
            layer. Stored as a tuple.
        stop_gradient: treat factor and shift as constants under differentiation; False differentiates through the
            statistics of the batch, as BatchNorm does.
        learned: add `0.3 tanh(alpha)` to the factor, with alpha a parameter that starts at 0.
        level: what the factor is multiplied by at the end; with `reference="unit"` about the standard deviation of the
            output.
        epsilon: added to `Var[x]`, to `E[(f(x) - shift)^2]` and to `E[f'(x)^2]`; it bounds what a nearly constant
            channel is multiplied by, as in BatchNorm. At least 0.

    Raises:
        ValueError: an option is unknown or out of range.
        TypeError: `feature_axes` are not integers.

    Examples:
        >>> print(Form())
        forward+center+unit+diff+feature+level0.5
        >>> Form.parse("mean").feature_axes, DEFAULT.replace(feature_axes=(0, -1)).feature_axes
        ((), (0, -1))
    """

    rule: Rule = "forward"
    center: bool = True
    reference: Reference = "unit"
    nonlinearity: float | None = None
    feature_axes: int | Sequence[int] = (-1,)
    stop_gradient: bool = False
    learned: bool = False
    epsilon: float = 1e-6
    level: float = 0.5

    def __post_init__(self) -> None:
        for name, known in (("rule", RULES), ("reference", REFERENCES)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; expected one of {', '.join(known)}")
        if self.nonlinearity is not None:
            check_nonlinearity(self.nonlinearity)
        if not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon must be a number from 0 on, such as 1e-6, got {self.epsilon}")
        if not 0 < self.level < math.inf:
            raise ValueError(f"level must be a positive number, such as 1 or 0.5, got {self.level}")
        axes = self.feature_axes
        try:
            axes = tuple(map(operator.index, axes if isinstance(axes, Sequence) else (axes,)))
        except TypeError:
            raise TypeError(f"feature_axes must be an integer or integers, such as -1 or (), got {axes!r}") from None
        if len(set(axes)) != len(axes):
            raise ValueError(f"feature_axes {axes} name the same axis twice")
        object.__setattr__(self, "feature_axes", axes)

    @property
    def axes(self) -> tuple[int, ...]:
        """`feature_axes`, as the tuple that it is stored as."""
        return tuple(self.feature_axes)  # type: ignore[arg-type]

    @property
    def moments(self) -> tuple[str, ...]:
        """The fields of `Stats` beside `count` that this form uses: what a step computes, and what state holds.

        Examples:
            >>> PUBLISHED.moments
            ('mean_in', 'var_in', 'mean_out', 'var_out', 'slope_sq')
            >>> DEFAULT.moments
            ('mean_out', 'var_out')
        """
        by_forward_gain_alone = self.rule == "forward" and self.reference == "unit"
        by_backward_gain_alone = self.rule == "backward" and self.reference == "input"
        of_input = () if by_forward_gain_alone or by_backward_gain_alone else ("mean_in", "var_in")
        of_slope = () if self.rule == "forward" else ("slope_sq",)
        return (*of_input, "mean_out", "var_out", *of_slope)

    def replace(self, **changes: Any) -> "Form":
        """The same form with other values of some options."""
        return dataclasses.replace(self, **changes)

    def __str__(self) -> str:
        """All options, in a text that `parse` reads; epsilon where it is not 1e-6, and level where it is not 1."""
        axes = {(): None, (-1,): "feature"}.get(self.axes, "axes" + ",".join(map(str, self.axes)))
        parts = (
            self.rule,
            "center" if self.center else None,
            "unit" if self.reference == "unit" else None,
            None if self.stop_gradient else "diff",
            axes,
            None if self.nonlinearity is None else f"nu{float(self.nonlinearity)!r}",
            "learned" if self.learned else None,
            None if self.epsilon == _UNWRITTEN_EPSILON else f"eps{float(self.epsilon)!r}",
            None if self.level == 1 else f"level{float(self.level)!r}",
        )
        return "+".join(part for part in parts if part)

    @classmethod
    def parse(cls, text: "str | Form") -> "Form":
        """The form that a text names: `"published"`, `"default"`, or a rule and what is added to it.

        | part | option | without it |
        | --- | --- | --- |
        | a rule, first | `rule` | an error |
        | `center` | `center=True` | False |
        | `unit` | `reference="unit"` | `"input"` |
        | `diff` | `stop_gradient=False` | True |
        | `feature` | `feature_axes=-1` | `()` |
        | `axes0,-1` | `feature_axes=(0, -1)` | `()` |
        | `nu0.1` | `nonlinearity=0.1` | None |
        | `learned` | `learned=True` | False |
        | `eps1e-05` | `epsilon=1e-5` | 1e-6 |
        | `level0.5` | `level=0.5` | 1 |

        A text keeps its meaning when the default form changes; store `str(form)`. A `Form` is returned as it is.

        Raises:
            ValueError: the text has a part that is unknown, comes twice, or contradicts another; the message lists
                what there is.

        Examples:
            >>> Form.parse("forward+center+unit+diff+feature+level0.5") == DEFAULT
            True
        """
        if isinstance(text, Form):
            return text
        if text in NAMED:
            return NAMED[text]
        rule, *parts = str(text).split("+")
        if rule not in RULES:
            near = difflib.get_close_matches(str(text), (*NAMED, *RULES), n=1)
            raise ValueError(
                f"unknown form {text!r}; expected {', '.join(map(repr, NAMED))}, or a rule and options, as in "
                f"{str(DEFAULT)!r}; rules: {', '.join(RULES)}{f'. Did you mean {near[0]!r}?' if near else ''}"
            )
        options: dict[str, Any] = {}
        for part in parts:
            name, value = _option(part, str(text))
            if name in options:
                raise ValueError(f"form {text!r} sets {name} twice")
            options[name] = value
        without = {"center": False, "reference": "input", "stop_gradient": True, "feature_axes": ()}
        without |= {"nonlinearity": None, "learned": False, "epsilon": _UNWRITTEN_EPSILON, "level": 1.0}
        return cls(rule, **(without | options))  # type: ignore[arg-type]  # a rule: it is in RULES


_SWITCHES: dict[str, tuple[str, Any]] = {
    "center": ("center", True),
    "unit": ("reference", "unit"),
    "diff": ("stop_gradient", False),
    "feature": ("feature_axes", (-1,)),
    "learned": ("learned", True),
}


def _option(part: str, text: str) -> tuple[str, Any]:
    """The option that a part of a form's text sets, and its value."""
    if part in _SWITCHES:
        return _SWITCHES[part]
    written = re.fullmatch(r"(nu|eps|axes|level)(.+)", part)
    try:
        match written and written[1]:
            case "nu":
                return "nonlinearity", float(written[2])  # type: ignore[index]
            case "eps":
                return "epsilon", float(written[2])  # type: ignore[index]
            case "level":
                return "level", float(written[2])  # type: ignore[index]
            case "axes":
                return "feature_axes", tuple(map(int, written[2].split(",")))  # type: ignore[index]
    except ValueError:
        pass
    raise ValueError(
        f"unknown part {part!r} of form {text!r}; expected one of {', '.join(_SWITCHES)}, or nu, eps, level or "
        "axes and numbers, as in nu0.1, eps1e-05, level0.5, axes0,-1"
    )


def check_nonlinearity(limit: float) -> None:
    """Raises ValueError unless it is a positive number."""
    if not 0 < limit < math.inf:
        raise ValueError(
            f"nonlinearity must be a positive number, or None to leave the activation as it is, got {limit}"
        )


PUBLISHED = Form("mean", False, "input", None, (), True, level=1.0)
"""The rule of arXiv 2208.13315, uncentered, one factor a layer."""

DEFAULT = Form()
"""The form of every function and module by default, chosen by measurement: docs/results/details.md."""

NAMED: dict[str, Form] = {"published": PUBLISHED, "default": DEFAULT}
"""Names of forms, for input only: what is stored is `str(form)`."""
