"""Flax NNX modules: read state, call the pure functions, write state."""

import functools
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from anact_jax.activations import Activation
from anact_jax.factors import Reference, Rule, correction
from anact_jax.gaussian import gaussian_stats
from anact_jax.normalize import DEFAULT, anact, check_layer
from anact_jax.statistics import Stats, canonical_axes
from anact_jax.tempering import tempered


class ActivationStat(nnx.BatchStat[Array]):
    """A running statistic of an activation."""


class ANAct(nnx.Module):
    """An activation normalized by the statistics of its batch, threaded like `nnx.BatchNorm`.

    `y = lambda * (f(x) - c)`, the same numbers as `anact_jax.linen.ANAct` with the same options, whose
    docstring describes them. Options that only NNX has:

    - `features`: the sizes of `feature_axes`, such as the width of the layer before. Without it the state is of shape
      () until the first training batch, which then shapes it; name it where shapes must not change, as
      under `nnx.scan`, to restore a checkpoint, or to save `jax.jit` a second trace.
    - `.train()` and `.eval()` of this module, or of one that holds it, set `use_running_average`; `frozen=True`
      withstands them: running statistics are used, and stay as they are, in either mode.

    The statistics are variables of type `ActivationStat`, a `nnx.BatchStat`, so that a training loop
    written for `nnx.BatchNorm` splits and merges them with no change.

    >>> import jax
    >>> from flax import nnx
    >>> class Net(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.hidden, self.act = nnx.Linear(4, 16, rngs=rngs), NSwish(features=16)
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

    def __init__(
        self,
        fn: Activation = jax.nn.swish,
        *,
        features: int | Sequence[int] | None = None,
        rule: Rule = DEFAULT.rule,
        center: bool = DEFAULT.center,
        reference: Reference = DEFAULT.reference,
        nonlinearity: float | None = DEFAULT.nonlinearity,
        momentum: float = 0.9,
        feature_axes: int | Sequence[int] = DEFAULT.feature_axes,
        use_running_average: bool | None = None,
        update: bool | None = None,
        frozen: bool = False,
        axis_name: Hashable | Sequence[Hashable] | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        stop_gradient: bool = DEFAULT.stop_gradient,
        learnable: bool = False,
    ) -> None:
        check_layer(fn, rule, reference, momentum, nonlinearity)
        axes = (feature_axes,) if isinstance(feature_axes, int) else tuple(feature_axes)
        sizes = (features,) if isinstance(features, int) else tuple(features or ())
        if len(axes) != len(sizes) and (features is not None or learnable):
            raise ValueError(
                f"features must give the size of each of feature_axes {axes}, as in feature_axes=-1, features=64, "
                f"where it is given or learnable=True; got {features}"
            )
        self.fn = fn
        self.rule: Rule = rule
        self.center = center
        self.reference: Reference = reference
        self.nonlinearity = nonlinearity
        self.momentum = momentum
        self.feature_axes = axes
        self.use_running_average = use_running_average
        self.update = update
        self.frozen = frozen
        self.axis_name = axis_name
        self.axis_index_groups = None if axis_index_groups is None else tuple(map(tuple, axis_index_groups))  # no state
        self.stop_gradient = stop_gradient
        prior = gaussian_stats(self.activation)
        for field, value in zip(Stats._fields, prior, strict=True):
            setattr(self, field, ActivationStat(jnp.broadcast_to(value, sizes)))
        self.alpha = nnx.Param(jnp.zeros(sizes)) if learnable else None

    def __call__(
        self,
        x: Float[Array, "*shape"],
        use_running_average: bool | None = None,
        *,
        mask: Shaped[Array, "..."] | None = None,
    ) -> Float[Array, "*shape"]:
        """Normalized activation of x, in its shape and dtype.

        Args:
            x: floating-point input of any shape.
            use_running_average: the mode; it takes precedence over that of the module.
            mask: broadcastable to x; elements where it is 0 or False are left out of the statistics.

        Raises:
            ValueError: the mode is set nowhere.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if self.frozen:
            use_running_average = True
        if use_running_average is None:
            raise ValueError(
                "ANAct does not know whether this is training or inference: call model.train() or model.eval(), or "
                "pass use_running_average=False or True to the call or the constructor"
            )
        update = not self.frozen and (not use_running_average if self.update is None else self.update)
        variables = [getattr(self, field) for field in Stats._fields]
        running = Stats(*(jnp.asarray(variable[...]) for variable in variables))
        if not running.count.shape:  # not shaped by a batch yet
            sizes = tuple(x.shape[axis] for axis in canonical_axes(self.feature_axes, x.ndim))
            running = Stats(*(jnp.broadcast_to(value, sizes) for value in running))
        y, new = anact(
            self.activation,
            x,
            running,
            rule=self.rule,
            center=self.center,
            reference=self.reference,
            momentum=self.momentum,
            feature_axes=self.feature_axes,
            use_running_average=use_running_average,
            update=update,
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            stop_gradient=self.stop_gradient,
            correction=0.0 if self.alpha is None else correction(self.alpha[...]),
        )
        if update:
            for variable, value in zip(variables, new, strict=True):
                variable.set_value(value)
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
        """What is normalized: `fn`, tempered where `nonlinearity` asks for it."""
        return tempered(self.fn, self.nonlinearity)


class NReLU(ANAct):
    """`ANAct` of `jax.nn.relu`."""

    __init__ = functools.partialmethod(ANAct.__init__, jax.nn.relu)


class NLeakyReLU(ANAct):
    """`ANAct` of `jax.nn.leaky_relu`."""

    __init__ = functools.partialmethod(ANAct.__init__, jax.nn.leaky_relu)


class NELU(ANAct):
    """`ANAct` of `jax.nn.elu`."""

    __init__ = functools.partialmethod(ANAct.__init__, jax.nn.elu)


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
    """`ANAct` of `jax.nn.swish`."""

    __init__ = functools.partialmethod(ANAct.__init__, jax.nn.swish)


class NGELU(ANAct):
    """`ANAct` of `jax.nn.gelu`."""

    __init__ = functools.partialmethod(ANAct.__init__, jax.nn.gelu)


class NMish(ANAct):
    """`ANAct` of `jax.nn.mish`."""

    __init__ = functools.partialmethod(ANAct.__init__, jax.nn.mish)
