"""Flax NNX modules: they read state, call a pure function of `anact_jax`, and write state."""

import functools
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Shaped

from anact_jax.forms import Form, form_of
from anact_jax.running import averaged, check_momentum, without_batches
from anact_jax.statistics import FactorAndShift, Stats, feature_axes
from anact_jax.step import anact, check_activation, check_state, initial_stats, warn_of_sharing
from anact_jax.tracing import Activation, by_reference, widened

# What layers wrote in a trace that is under way, by identity.
_written: weakref.WeakValueDictionary[int, Array] = weakref.WeakValueDictionary()


class ANAct(nnx.Module):
    """An activation normalized by the statistics of its batch, threaded like `nnx.BatchNorm`.

    `y = factor * (f(x) - shift)`, the same numbers as `anact_jax.linen.ANAct` with the same options, whose docstring
    describes them. What only NNX has:

    - `fn` may be an NNX module, such as `nnx.PReLU()`: its parameters are part of this module's state.
    - `features`: the size of the feature axis, the width of the layer before. Without it the state is
      of shape () until the first training batch, which then shapes it; name it where shapes must not change, as under
      `nnx.scan`, to restore a checkpoint, or to save `jax.jit` a second trace.
    - A new layer trains, as `nnx.BatchNorm` does. `.train()` and `.eval()` of this module, or of one that holds it, set
      `use_running_average`, as `nnx.view(model, use_running_average=True)` does for a view of it; `frozen=True`
      withstands them: running statistics are used, and stay as they are, in either mode.
    - `shared=True` says that this layer is meant to be called several times in one pass. Otherwise the second training
      call in one trace warns. Calls that are not traced cannot be told from steps of training, and do not warn.
    - `rngs` is accepted, as by `nnx.BatchNorm`, and not used.

    The statistics are variables of type `nnx.BatchStat`, so that a training loop written for `nnx.BatchNorm` splits and
    merges them with no change, and `nnx.bridge.to_linen` puts them into `batch_stats`.

    Examples:
        >>> import jax
        >>> from flax import nnx
        >>> class Net(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.hidden, self.act = nnx.Linear(4, 16, rngs=rngs), NSwish(16, rngs=rngs)
        ...         self.out = nnx.Linear(16, 1, rngs=rngs)
        ...     def __call__(self, x):
        ...         return self.out(self.act(self.hidden(x)))
        >>> net = Net(nnx.Rngs(0))
        >>> net.train()
        >>> net(jax.random.normal(jax.random.key(0), (8, 4))).shape, float(net.act.count[0])
        ((8, 1), 1.0)
        >>> net.eval()
        >>> net(jax.random.normal(jax.random.key(1), (8, 4))).shape, float(net.act.count[0])
        ((8, 1), 1.0)
    """

    count: nnx.BatchStat[Array]

    def __init__(
        self,
        fn: Activation = jax.nn.swish,
        features: int | None = None,
        *,
        form: Form | str | None = None,
        std: float = 0.5,
        center: bool = True,
        axis: int | None = -1,
        tempering: float | None = None,
        stop_gradient: bool = False,
        momentum: ArrayLike = 0.9,
        use_running_average: bool = False,
        update: bool | None = None,
        frozen: bool = False,
        axis_name: Hashable | Sequence[Hashable] | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        dtype: DTypeLike | None = None,
        shared: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        del rngs
        check_activation(fn, type(self).__name__)
        check_momentum(momentum)
        self.form = form_of(form, std=std, center=center, axis=axis, tempering=tempering, stop_gradient=stop_gradient)
        sizes = self._sizes(features)
        self.fn = fn if isinstance(fn, nnx.Module) else by_reference(fn)
        self.momentum = momentum
        self.use_running_average = use_running_average
        self.update = update
        self.frozen = frozen
        self.axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
        self.axis_index_groups = None if axis_index_groups is None else tuple(map(tuple, axis_index_groups))  # no state
        self.dtype = dtype
        self.shared = shared
        prior = initial_stats(fn, self.form, sizes)
        for name in ("count", *self.form.moments):
            setattr(self, name, nnx.BatchStat(getattr(prior, name)))
        self.alpha = nnx.Param(jnp.zeros(sizes)) if self.form.learned else None

    def __call__(
        self,
        x: Float[Array, "*shape"],
        use_running_average: bool | None = None,
        *,
        mask: Shaped[Array, "..."] | None = None,
    ) -> Float[Array, "*shape"]:
        """Normalized activation of x, in its shape.

        Args:
            x: floating-point input of any shape.
            use_running_average: the mode; it takes precedence over that of the module.
            mask: broadcastable to x; elements where it is 0 or False are left out of the statistics.

        Raises:
            ValueError: the state is of another form, or has another width.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if self.frozen:
            use_running_average = True
        update = not self.frozen and (not use_running_average if self.update is None else self.update)
        features = tuple(x.shape[axis] for axis in feature_axes(self.form.axis, x.ndim))
        variables = self._variables(features)
        y, new = anact(
            self.fn,
            x,
            Stats(**{name: variable[...] for name, variable in variables.items()}),
            self.form,
            momentum=self.momentum,
            use_running_average=use_running_average,
            update=update,
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            alpha=None if self.alpha is None else self.alpha[...],
            dtype=self.dtype,
        )
        if update:
            count = variables["count"][...]
            if _written.get(id(count)) is count and not self.shared:
                warn_of_sharing(type(self).__name__)
            if isinstance(new.count, jax.core.Tracer):
                _written[id(new.count)] = new.count
            for name, variable in variables.items():
                variable.set_value(getattr(new, name))
        return y

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Sets the mode; `nnx.view` calls it.

        Args:
            use_running_average: inference (True) or training (False).
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    @property
    def activation(self) -> Activation:
        """What is normalized: `fn`, tempered if the form says so."""
        return self.form.activation(self.fn)

    def running_stats(self) -> Stats:
        """Running statistics, in float32 or wider."""
        return Stats(**{name: widened(variable[...]) for name, variable in self._variables().items()})

    def normalization(self) -> FactorAndShift:
        """Factor and shift in inference; before training they are those of a standard normal input.

        Examples:
            >>> [round(float(value), 3) for value in NReLU(std=1.0).normalization()]
            [1.713, 0.399]
        """
        return self.form.factor_and_shift(self.running_stats(), None if self.alpha is None else self.alpha[...])

    def _variables(self, features: tuple[int, ...] | None = None) -> dict[str, nnx.BatchStat[Array]]:
        held = {name: getattr(self, name) for name in Stats._fields if hasattr(self, name)}
        check_state(held, self.form, type(self).__name__, features)
        return {name: held[name] for name in ("count", *self.form.moments)}

    def _sizes(self, features: Any) -> tuple[int, ...]:
        name = type(self).__name__
        if isinstance(features, jax.Array | np.ndarray) and features.ndim:
            raise TypeError(
                f"{name} is a layer: {name}(...)(x); it takes the number of features, got an array of shape "
                f"{features.shape} and dtype {features.dtype}"
            )
        # One set of statistics a layer has the shape () whatever the width.
        return () if features is None or self.form.axis is None else (int(features),)


def estimate_stats(
    model: Any, batches: Iterable[Any], *, call: Callable[[Any, Any], Any] = lambda model, batch: model(batch)
) -> None:
    """Estimates running statistics again, in place; see `anact_jax.linen.estimate_stats`.

    Args:
        model: a module, with the weights that the statistics are for. It is run in training, and left in its mode.
        batches: any number of batches; of equal sizes, best as large as in training.
        call: runs the model on a batch. It is compiled.

    Raises:
        ValueError: there are no batches.

    Examples:
        >>> import jax
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), NSwish(8))
        >>> estimate_stats(model, jax.random.normal(jax.random.key(0), (5, 32, 4)))
        >>> float(model.layers[1].count[0])
        5.0
    """
    trained = nnx.clone(model)
    trained.train()
    graph, state, rest = nnx.split(trained, nnx.BatchStat, ...)  # type: ignore[misc]

    @jax.jit
    def after(state: Any, rest: Any, batch: Any) -> Any:
        model = nnx.merge(graph, state, rest)
        call(model, batch)
        return nnx.state(model, nnx.BatchStat)

    def each() -> Iterator[Mapping[str, Any]]:
        nonlocal state
        for batch in batches:
            nnx.replace_by_pure_dict(state, without_batches(nnx.to_pure_dict(state)))
            state = after(state, rest, batch)
            yield nnx.to_pure_dict(state)

    found = averaged(each())
    nnx.replace_by_pure_dict(state, found)
    nnx.update(model, state)


class NReLU(ANAct):
    """`ANAct` of `jax.nn.relu`."""

    __init__ = functools.partialmethod(ANAct.__init__, jax.nn.relu)


class NLeakyReLU(ANAct):
    """`ANAct` of `jax.nn.leaky_relu`."""

    __init__ = functools.partialmethod(ANAct.__init__, jax.nn.leaky_relu)


class NELU(ANAct):
    """`ANAct` of `jax.nn.elu`."""

    __init__ = functools.partialmethod(ANAct.__init__, jax.nn.elu)


class NSELU(ANAct):
    """`ANAct` of `jax.nn.selu`."""

    __init__ = functools.partialmethod(ANAct.__init__, jax.nn.selu)


class NTanh(ANAct):
    """`ANAct` of `jax.numpy.tanh`."""

    __init__ = functools.partialmethod(ANAct.__init__, jnp.tanh)


class NSigmoid(ANAct):
    """`ANAct` of `jax.nn.sigmoid`."""

    __init__ = functools.partialmethod(ANAct.__init__, jax.nn.sigmoid)


class NSoftplus(ANAct):
    """`ANAct` of `jax.nn.softplus`."""

    __init__ = functools.partialmethod(ANAct.__init__, jax.nn.softplus)


class NSwish(ANAct):
    """`ANAct` of `jax.nn.swish`, also named SiLU."""

    __init__ = functools.partialmethod(ANAct.__init__, jax.nn.swish)


class NGELU(ANAct):
    """`ANAct` of `jax.nn.gelu`."""

    __init__ = functools.partialmethod(ANAct.__init__, jax.nn.gelu)


class NMish(ANAct):
    """`ANAct` of `jax.nn.mish`."""

    __init__ = functools.partialmethod(ANAct.__init__, jax.nn.mish)


NSiLU = NSwish
