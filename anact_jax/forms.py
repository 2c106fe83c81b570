"""The default form, and what a form is: an object that knows its moments, its function, its factor and its shift."""

import dataclasses
import difflib
import math
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from anact_jax.activations import check_tempering, tempered
from anact_jax.published import Published, check_epsilon
from anact_jax.statistics import FactorAndShift, Stats, require
from anact_jax.tracing import Activation


@dataclasses.dataclass(frozen=True)
class Standardized:
    """BatchNorm's standardization of y = f(x), the default form: the output has mean 0 and deviation `std`.

    With mean and variance of y over the batch, for each channel,

        factor = std / sqrt(Var[y] + epsilon),    shift = E[y]

    and uncentered, `shift = 0` and `factor = std / sqrt(E[y^2] + epsilon)`. This project's own form, chosen by
    measurement (docs/results/details.md). The published rule is `Published`.

    Attributes:
        std: deviation of the output, > 0.
        center: subtract the mean.
        axis: the feature axis, whose channels have statistics of their own; None for one set a layer.
        stop_gradient: treat factor and shift as constants under differentiation. False differentiates through the
            statistics of the batch, as BatchNorm does.
        tempering: normalize `anact_jax.tempered(f, tempering)`, whose nonlinearity is at most this; None leaves f as it
            is.
        epsilon: added to the variance; it bounds what a nearly constant channel is multiplied by. At least 0.

    Raises:
        ValueError: an option is out of range.
        TypeError: `axis` is not an integer.

    Examples:
        >>> Standardized(std=1.0).moments
        ('mean_out', 'var_out')
        >>> stats = Stats(jnp.float32(1), mean_out=jnp.float32(2.0), var_out=jnp.float32(4.0))
        >>> [round(float(value), 3) for value in Standardized().factor_and_shift(stats)]
        [0.25, 2.0]
    """

    std: float = 0.5
    center: bool = True
    axis: int | None = -1
    stop_gradient: bool = False
    tempering: float | None = None
    epsilon: float = 1e-6

    moments: ClassVar[tuple[str, ...]] = ("mean_out", "var_out")
    learned: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.std < math.inf:
            raise ValueError(f"std must be a positive number, such as 1 or 0.5, got {self.std}")
        if self.axis is not None and (isinstance(self.axis, bool) or not isinstance(self.axis, int)):
            raise TypeError(f"axis must be one integer, such as -1, or None for one set a layer, got {self.axis!r}")
        if self.tempering is not None:
            check_tempering(self.tempering)
        check_epsilon(self.epsilon)

    def activation(self, f: Activation) -> Activation:
        """The function that is normalized."""
        return tempered(f, self.tempering)

    def factor_and_shift(self, stats: Stats, alpha: Float[Array, ""] | None = None) -> FactorAndShift:
        """Factor and shift for these statistics, finite for finite ones, in their shape.

        Args:
            stats: with at least `moments`.
            alpha: belongs to a learned form, which this is not.

        Raises:
            ValueError: a moment is missing, or alpha is given.
        """
        if alpha is not None:
            raise ValueError("alpha belongs to Published(learned=True), not to a Standardized form")
        mean, variance = require(stats, self.moments)
        if self.center:
            shift, square = mean, variance
        else:
            shift, square = jnp.zeros_like(mean), variance + mean**2
        return FactorAndShift(self.std * _inverse_root(jnp.where(square > 0, square + self.epsilon, 1)), shift)


Form: TypeAlias = Standardized | Published

_WORDS: dict[str, Form] = {"default": Standardized(), "published": Published()}


def form_of(form: Form | str | None = None, **options: Any) -> Form:
    """The form that a user means, by an object, a word, or options of `Standardized`.

    Args:
        form: an object, `"default"` or `"published"`; None for `Standardized` with the options.
        **options: of `Standardized`. Beside a form they must be those of this form, or the defaults.

    Raises:
        ValueError: the word is unknown, or form and options contradict each other.
        TypeError: it is neither a form nor a word.

    Examples:
        >>> form_of("published"), form_of(std=1.0).std
        (Published(center=False, learned=False, epsilon=1e-06), 1.0)
    """
    built = Standardized(**options)
    if form is None:
        return built
    if isinstance(form, str):
        if form not in _WORDS:
            near = difflib.get_close_matches(form, _WORDS, n=1)
            raise ValueError(
                f"unknown form {form!r}; expected 'default', 'published', or an object, as in "
                f"form=Standardized(std=1.0){f'. Did you mean {near[0]!r}?' if near else ''}"
            )
        form = _WORDS[form]
    if not isinstance(form, Standardized | Published):
        raise TypeError(f"form must be Standardized(...), Published(...), 'default' or 'published', got {form!r}")
    if built not in (Standardized(), form):
        given = ", ".join(
            f"{name}={value!r}" for name, value in options.items() if value != getattr(Standardized, name)
        )
        raise ValueError(f"{given} beside form={form}: give the options to the form, or leave the form out")
    return form


@jax.custom_jvp
def _inverse_root(value: Array) -> Array:
    """1 / sqrt(value). Its derivative takes no division of its own: XLA's CPU backend compiles a kernel for each."""
    return jnp.minimum(1 / jnp.sqrt(value), jnp.finfo(value.dtype).max)


@_inverse_root.defjvp
def _inverse_root_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    inverse = _inverse_root(*primals)
    return inverse, -(inverse**3) / 2 * tangents[0]
