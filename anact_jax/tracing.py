"""An elementwise function as JAX sees it: traced once, with its constants as arguments."""

import dataclasses
import functools
import importlib
import operator
import sys
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun, jaxprs_in_params  # type: ignore[attr-defined,unused-ignore]
from jax.sharding import AbstractMesh, use_abstract_mesh
from jax.typing import DTypeLike
from jaxtyping import Array

Activation: TypeAlias = Callable[[Array], Array]
Constants: TypeAlias = tuple[Array | np.ndarray, ...]
ExplicitActivation: TypeAlias = Callable[[Constants, Array], Array]
T = TypeVar("T")

_NO_MESH = AbstractMesh((), ())
_ANY_LENGTH = 1789  # as no axis of a slope has
_LIBRARIES = ("anact_jax", "flax", "jax")


def wide_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype in which input of `dtype` is measured and scaled: float64 for float64, else float32.

    Examples:
        >>> wide_dtype(jnp.bfloat16)
        dtype('float32')
    """
    wide: jnp.dtype = jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
    return wide


def widened(value: Array) -> Array:
    """The array in its wide dtype."""
    return value.astype(wide_dtype(value.dtype))


def traced(f: Activation, x: Array | np.ndarray) -> tuple[ExplicitActivation, Constants]:
    """`(g, constants)` with `g(constants, x) = f(x)` for x of any shape, computed in the wide dtype of this x.

    f may close over arrays, traced ones too, such as a learned slope, in whatever way: all of them come out as
    constants, so that a rule for g can be differentiated in them.

    Raises:
        TypeError: x or f(x) is not real floating point, or f closes over arrays and has a reverse rule alone.
        ValueError: f changes the shape.
    """
    check_floating(x)
    wide = wide_dtype(x.dtype)

    def in_wide_dtype(x: Array) -> Array:
        return f(x.astype(wide)).astype(wide)

    closed = jax.make_jaxpr(lambda x: f(x.astype(wide)))(x)
    y = closed.out_avals[0]
    if len(closed.out_avals) > 1 or y.shape != x.shape:
        raise ValueError(f"f must be elementwise: {name_of(f)} turned shape {x.shape} into {y.shape}")
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(f"f must return floating-point values; {name_of(f)} returned dtype {y.dtype}")
    if _has_reverse_rule_alone(closed.jaxpr):
        if closed.consts:
            raise TypeError(
                "f closes over arrays and defines its derivative by jax.custom_vjp, which has no forward mode; define "
                "it by jax.custom_jvp, which serves both"
            )
        with_both_modes = _with_forward_mode(in_wide_dtype)
        return lambda constants, x: with_both_modes(x), ()
    if not closed.consts:
        return lambda constants, x: in_wide_dtype(x), ()

    def g(constants: Constants, x: Array) -> Array:
        # Traced for each shape: what closes over arrays is replaced by the constants, in the same order.
        (y,) = jaxpr_as_fun(ClosedJaxpr(jax.make_jaxpr(in_wide_dtype)(x).jaxpr, list(constants)))(x)
        return y  # type: ignore[no-any-return]

    return g, tuple(closed.consts)


def check_floating(x: Array | np.ndarray) -> None:
    """Raises TypeError unless x is real floating point."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating point, got dtype {x.dtype}; cast it first")


def value_and_slope(f: Activation, x: Array) -> tuple[Array, Array]:
    """f(x) and f'(x), by forward-mode autodiff."""
    return jax.jvp(f, (x,), (jnp.ones_like(x),))


def name_of(f: object) -> str:
    """A function as messages name it.

    Examples:
        >>> name_of(jax.nn.softmax)
        'softmax'
    """
    return str(getattr(f, "__name__", type(f).__name__))


def permanent(f: Any) -> bool:
    """Whether f can never compute anything else, so that what follows from it may be kept.

    Only functions of the libraries can: others may read what changes, by their rule for derivatives too.

    Examples:
        >>> permanent(jax.nn.swish), permanent(lambda x: x)
        (True, False)
    """
    f = f.f if isinstance(f, ByReference) else f
    module, name = getattr(f, "__module__", None), getattr(f, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module.partition(".")[0] not in _LIBRARIES:
        return False
    return _found(module, name) is f


@dataclasses.dataclass(frozen=True)
class Known:
    """A function that equals all that compute the same: its value and two derivatives, as JAX traced them, are equal.

    The text holds every number of the function, so that a function that reads a variable is another one when the
    variable changed.
    """

    f: Activation = dataclasses.field(compare=False)
    text: str

    def __call__(self, x: Array) -> Array:
        """The function of x."""
        return self.f(x)


def known(f: Activation, x: Array) -> Activation | None:
    """A static argument for a compiled function of x, such that no call gets what was traced for another f.

    None where that is impossible, as f closes over arrays or has a reverse rule alone, or does not pay: outside of a
    trace a number that changes from call to call would compile each.
    """
    if permanent(f):
        return f
    if not isinstance(jax.lax.full((), 0.0), jax.core.Tracer):
        return None
    wide = wide_dtype(x.dtype)

    def with_slope(x: Array) -> tuple[Array, Array]:
        return value_and_slope(f, x)

    try:
        derived = jax.make_jaxpr(lambda x: jax.jvp(with_slope, (x,), (jnp.ones_like(x),)))(x.astype(wide))
    except Exception:  # there need not be a second derivative; and what else is wrong with f, the step says
        return None
    return None if derived.consts else Known(f, str(derived))


def _found(module: str, name: str) -> Any:
    """What a module that was imported holds by this name, None for nothing."""
    try:
        return operator.attrgetter(name)(sys.modules.get(module))
    except AttributeError:
        return None


@dataclasses.dataclass(frozen=True)
class ByReference:
    """A function that a deep copy shares, and that pickles by its name, as plain functions do.

    Compiled functions such as `jax.nn.relu`, functions with rules of their own, and `functools.partial` copy to other
    objects, so that a layer would no longer equal its copy.
    """

    f: Activation

    @property
    def __name__(self) -> str:
        return name_of(self.f)

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        """What the function computes."""
        return self.f(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ByReference":
        return self

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        f = self.f
        if isinstance(f, functools.partial):
            return _partial_by_reference, (by_reference(f.func), f.args, f.keywords)
        module, name = getattr(f, "__module__", None), getattr(f, "__qualname__", None)
        if isinstance(module, str) and isinstance(name, str) and _found(module, name) is f:
            return _named_by_reference, (module, name)
        return ByReference, (f,)


def by_reference(f: Activation) -> Activation:
    """The function, in a form that equals its deep copy if it is of a type of JAX or a partial; see `ByReference`."""
    return ByReference(f) if type(f).__module__.partition(".")[0] in ("jax", "jaxlib", "functools") else f


def _partial_by_reference(f: Activation, args: tuple[Any, ...], keywords: dict[str, Any]) -> ByReference:
    return ByReference(functools.partial(f, *args, **keywords))


def _named_by_reference(module: str, name: str) -> ByReference:
    return ByReference(operator.attrgetter(name)(importlib.import_module(module)))


def check_elementwise(f: Activation) -> None:
    """Raises an error unless f takes arrays of any shape and each output depends on its own input only.

    The second is tried on one batch: an element changes, and no other output may follow. Where f closes over traced
    values, others stand in for them.

    Raises:
        TypeError, ValueError: f is not elementwise.
    """
    x = np.linspace(-1, 1, _ANY_LENGTH, dtype=jnp.result_type(float))
    try:
        jax.eval_shape(f, x)
    except Exception as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"an activation must be an elementwise function of arrays of any shape; {name_of(f)} refuses shape "
            f"{x.shape}: {error}. A slope for each channel is not supported, since the statistics of f under a normal "
            "input are those of one function: give the layer one slope, or each group of channels a layer of its own"
        ) from error
    g, constants = traced(f, x)
    stand_ins = tuple(_stand_in(value) for value in constants)
    if any(value is None for value in stand_ins):
        return
    changed = np.arange(x.size) == x.size // 3  # not the middle, which a reversal leaves where it is
    filled = functools.partial(g, stand_ins)
    high, low = (_computed(lambda f, at: f(jnp.where(changed, at, x)), filled, (at,))[~changed] for at in (9.0, -4.0))
    size = max(np.abs(y[np.isfinite(y)]).max(initial=0) for y in (high, low))
    # A loop that runs until all elements have converged moves the others, by rounding.
    if not np.allclose(high, low, rtol=0, atol=1e-4 * size, equal_nan=True):
        raise ValueError(
            f"an activation must be elementwise; outputs of {name_of(f)} depend on other elements of the input than "
            "their own: make it a layer beside the activation"
        )


def _stand_in(value: Array | np.ndarray) -> Any:
    """A constant, or a value that it may have where it is traced; None where that is no number."""
    if not isinstance(value, jax.core.Tracer):
        return value
    number = 1 if jnp.issubdtype(value.dtype, jnp.integer) else 0.5
    return jnp.full(value.shape, number, value.dtype) if jnp.issubdtype(value.dtype, jnp.number) else None


def while_tracing(compute: Callable[..., T], f: Activation, *options: Any) -> T:
    """`compute(f, *options)`, arrays that depend on f alone.

    They are NumPy arrays, computed while tracing whatever mesh is set, and kept if f is `permanent`. Where f closes
    over traced values they are part of the graph.

    Raises:
        TypeError, ValueError: f is not elementwise.
    """
    if permanent(f):
        kept: T = _kept(compute, f, options, jnp.result_type(float))
        return kept
    check_elementwise(f)
    constants = traced(f, np.zeros(_ANY_LENGTH, jnp.result_type(float)))[1]
    if any(isinstance(value, jax.core.Tracer) for value in constants):
        return compute(f, *options)
    return _computed(compute, f, options)


def _computed(compute: Callable[..., T], f: Activation, options: tuple[Any, ...]) -> T:
    with jax.core.eval_context(), use_abstract_mesh(_NO_MESH):
        found: T = jax.tree.map(np.asarray, compute(f, *options))
        return found


@functools.cache
def _kept(compute: Callable[..., T], f: Activation, options: tuple[Any, ...], dtype: jnp.dtype) -> T:
    del dtype  # under x64 the same numbers have more digits
    check_elementwise(f)
    return _computed(compute, f, options)


def _with_forward_mode(reversible: Activation) -> Activation:
    """The same function with the slope of its reverse rule in forward mode: elementwise, both are one number."""

    @jax.custom_jvp
    def f(x: Array) -> Array:
        return reversible(x)

    @f.defjvp
    def _jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        y, backward = jax.vjp(reversible, *primals)
        (slope,) = backward(jnp.ones_like(y))
        return f(*primals), slope.astype(y.dtype) * tangents[0].astype(y.dtype)

    return f


def _has_reverse_rule_alone(jaxpr: Any) -> bool:
    return any(
        "custom_vjp" in equation.primitive.name or any(map(_has_reverse_rule_alone, jaxprs_in_params(equation.params)))
        for equation in jaxpr.eqns
    )
