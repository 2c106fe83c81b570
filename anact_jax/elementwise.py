"""An elementwise function as JAX sees it: traced once, with its constants as arguments."""

import functools
import inspect
import sys
from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun, jaxprs_in_params  # type: ignore[attr-defined,unused-ignore]
from jax.sharding import AbstractMesh, use_abstract_mesh
from jax.typing import DTypeLike
from jaxtyping import Array

Activation: TypeAlias = Callable[[Array], Array]
Constants: TypeAlias = tuple[Array, ...]
ExplicitActivation: TypeAlias = Callable[[Constants, Array], Array]
T = TypeVar("T")

_NO_MESH = AbstractMesh((), ())
_ANY_LENGTH = 1789  # as no axis of a slope has


def wide_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype in which input of `dtype` is measured and scaled: float64 for float64, else float32.

    Examples:
        >>> wide_dtype(jnp.bfloat16)
        dtype('float32')
    """
    wide: jnp.dtype = jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
    return wide


def traced(f: Activation, x: Array | np.ndarray) -> tuple[ExplicitActivation, Constants]:
    """`(g, constants)` with `g(constants, x) = f(x)` for x of any shape, computed in the wide dtype of this x.

    f may close over arrays, traced ones too, such as a learned slope, in whatever way: all of them come out as
    constants, so that a rule for g can be differentiated in them.

    Raises:
        TypeError: x or f(x) is not real floating point, or f closes over arrays and has a reverse rule alone.
        ValueError: f changes the shape.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating point, got dtype {x.dtype}; cast it first")
    wide = wide_dtype(x.dtype)

    def widened(x: Array) -> Array:
        return f(x.astype(wide)).astype(wide)

    closed = jax.make_jaxpr(lambda x: f(x.astype(wide)))(x)
    y = closed.out_avals[0]
    if len(closed.out_avals) > 1 or y.shape != x.shape:
        raise ValueError(f"f must be elementwise: it turned shape {x.shape} into {y.shape}")
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(f"f must return floating-point values, got dtype {y.dtype}")
    if _has_reverse_rule_alone(closed.jaxpr):
        if closed.consts:
            raise TypeError(
                "f closes over arrays and defines its derivative by jax.custom_vjp, which has no forward mode; define "
                "it by jax.custom_jvp, which serves both"
            )
        with_both_modes = _with_forward_mode(widened)
        return lambda constants, x: with_both_modes(x), ()
    if not closed.consts:
        return lambda constants, x: widened(x), ()

    def g(constants: Constants, x: Array) -> Array:
        # Traced for each shape: what closes over arrays is replaced by the constants, in the same order.
        (y,) = jaxpr_as_fun(ClosedJaxpr(jax.make_jaxpr(widened)(x).jaxpr, list(constants)))(x)
        return y  # type: ignore[no-any-return]

    return g, tuple(closed.consts)


def value_and_slope(f: Activation, x: Array) -> tuple[Array, Array]:
    """f(x) and f'(x), by forward-mode autodiff."""
    return jax.jvp(f, (x,), (jnp.ones_like(x),))


def permanent(f: Any) -> bool:
    """Whether f can never compute anything else, so that what follows from it may be kept.

    So can functions of the libraries below, and functions that a module holds by name and that read nothing but these
    libraries: no array, and no variable that could be set anew.

    Examples:
        >>> permanent(jax.nn.swish), permanent(lambda x: x)
        (True, False)
    """
    module, name = getattr(f, "__module__", None), getattr(f, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        return False
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is f and _reads_libraries_alone(inspect.unwrap(f)) and _holds_no_arrays(f)


_LIBRARIES = ("anact_jax", "flax", "jax", "math", "numpy")


def _reads_libraries_alone(f: Any) -> bool:
    def from_library(value: Any) -> bool:
        name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        return str(name).partition(".")[0] in _LIBRARIES

    if from_library(f):
        return True
    if not isinstance(f, FunctionType) or f.__closure__ or f.__defaults__ or f.__kwdefaults__:
        return False
    nested = any(isinstance(value, CodeType) for value in f.__code__.co_consts)
    read = [f.__globals__[name] for name in f.__code__.co_names if name in f.__globals__]
    return not nested and all(map(from_library, read))


@functools.cache
def _holds_no_arrays(f: Activation) -> bool:
    return not traced(f, jnp.zeros(()))[1]


def while_tracing(compute: Callable[..., T], f: Activation, *numbers: float) -> T:
    """`compute(f, *numbers)`, arrays that depend on f alone.

    They are NumPy arrays, computed while tracing whatever mesh is set, and kept if f is `permanent`. Where f closes
    over traced values they are part of the graph.

    Raises:
        ValueError: f takes arrays of one shape only.
    """
    if permanent(f):
        kept: T = _kept(compute, f, numbers, jnp.result_type(float))
        return kept
    try:
        constants = traced(f, np.zeros(_ANY_LENGTH, jnp.result_type(float)))[1]
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"an activation must take arrays of any shape; this one refuses shape ({_ANY_LENGTH},): {error}. A slope "
            "for each channel is not supported, since the statistics of f under a normal input are those of one "
            "function: give the layer one slope, or each group of channels a layer of its own"
        ) from error
    if any(isinstance(value, jax.core.Tracer) for value in constants):
        return compute(f, *numbers)
    return _computed(compute, f, numbers)


def _computed(compute: Callable[..., T], f: Activation, numbers: tuple[float, ...]) -> T:
    with jax.core.eval_context(), use_abstract_mesh(_NO_MESH):
        found: T = jax.tree.map(np.asarray, compute(f, *numbers))
        return found


@functools.cache
def _kept(compute: Callable[..., T], f: Activation, numbers: tuple[float, ...], dtype: jnp.dtype) -> T:
    del dtype  # under x64 the same numbers have more digits
    return _computed(compute, f, numbers)


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
