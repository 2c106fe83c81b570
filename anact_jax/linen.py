"""Flax Linen modules: read state, call the pure functions, write state."""

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from anact_jax.activations import Activation
from anact_jax.factors import Reference, Rule, correction
from anact_jax.gaussian import gaussian_stats
from anact_jax.normalize import DEFAULT, anact, check_layer
from anact_jax.statistics import Stats, canonical_axes
from anact_jax.tempering import tempered


class ANAct(nn.Module):
    """An activation normalized by the statistics of its batch, threaded like `nn.BatchNorm`.

    `y = lambda * (f(x) - c)`; see `anact_jax.normalization` for lambda and c. In training they come
    from the batch, and running averages are kept in the collection `batch_stats`; in inference they
    come from those averages. Before the first training batch the averages are those of `fn` under
    a standard normal input.

    Initialize the weights before it with variance 1 / fan-in (LeCun, Flax's default): the activation
    supplies the gain that He's initialization would.

    Attributes:
        fn: any elementwise JAX function. Pass a named function, not a fresh lambda at each call,
            so that equal modules compile once.
        rule, center, reference: see `anact_jax.normalization`.
        nonlinearity: normalize `anact_jax.tempered(fn, nonlinearity)`, fn with as much of the identity added as
            keeps near examples together in deep networks; None leaves fn as it is.
        momentum: `new = momentum * old + (1 - momentum) * batch`; see `anact_jax.update_stats`.
        feature_axes: axes that keep statistics of their own: `-1` one set a channel, `()` one for the layer.
        use_running_average: inference (True) or training (False), here or in the call.
        update: take the batch into the running averages; by default in training only. With
            `use_running_average=True` it measures without using, with False it uses without keeping.
        axis_name: mapped axis (`pmap`, `shard_map`) over which statistics are shared. Not needed
            under `jit`, nor in `init` or inference.
        axis_index_groups: indices along `axis_name` that share statistics; see `anact_jax.activation_stats`.
        stop_gradient: treat factor and shift as constants under differentiation.
        learnable: add the published bounded correction `0.3 * tanh(alpha)` to the factor, with the
            parameter alpha starting at 0.
        collection: name of the collection that holds the state.

    >>> import jax, jax.numpy as jnp, flax.linen as nn
    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x, train):
    ...         x = nn.Dense(16)(x)
    ...         x = NSwish(use_running_average=not train)(x)
    ...         return nn.Dense(1)(x)
    >>> x = jnp.ones((8, 4)) * jnp.arange(8.0)[:, None]
    >>> variables = Net().init(jax.random.key(0), x, train=True)
    >>> sorted(variables["batch_stats"]["NSwish_0"])
    ['count', 'mean_in', 'mean_out', 'slope_sq', 'var_in', 'var_out']
    >>> y, updates = Net().apply(variables, x, train=True, mutable=["batch_stats"])
    >>> updates["batch_stats"]["NSwish_0"]["count"].shape  # statistics of their own for each of 16 channels
    (16,)
    >>> Net().apply(variables | updates, x, train=False).shape
    (8, 1)
    """

    fn: Activation = jax.nn.swish
    _: dataclasses.KW_ONLY
    rule: Rule = DEFAULT.rule
    center: bool = DEFAULT.center
    reference: Reference = DEFAULT.reference
    nonlinearity: float | None = DEFAULT.nonlinearity
    momentum: float = 0.9
    feature_axes: int | Sequence[int] = DEFAULT.feature_axes
    use_running_average: bool | None = None
    update: bool | None = None
    axis_name: Hashable | Sequence[Hashable] | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    stop_gradient: bool = DEFAULT.stop_gradient
    learnable: bool = False
    collection: str = "batch_stats"

    def __post_init__(self) -> None:
        check_layer(self.fn, self.rule, self.reference, self.momentum, self.nonlinearity)
        super().__post_init__()

    @nn.compact
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
            use_running_average: the mode, if the constructor did not set it.
            mask: broadcastable to x; elements where it is 0 or False are left out of the statistics.

        Raises:
            ValueError: the mode is set nowhere or twice; the state is missing, or not mutable in training.
        """
        use_running_average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        update = not use_running_average if self.update is None else self.update
        features = tuple(x.shape[axis] for axis in canonical_axes(self.feature_axes, x.ndim))
        if not self.is_initializing():
            self._check_state(update)
        state = self._variables(features)
        alpha = self.param("alpha", nn.initializers.zeros, features) if self.learnable else None

        y, new = anact(
            self.activation,
            x,
            Stats(*(jnp.asarray(variable.value) for variable in state)),
            rule=self.rule,
            center=self.center,
            reference=self.reference,
            momentum=self.momentum,
            feature_axes=self.feature_axes,
            # In init no batch is measured: no mapped axis is bound, and the state starts the same for any input.
            use_running_average=use_running_average or self.is_initializing(),
            update=update and not self.is_initializing(),
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            stop_gradient=self.stop_gradient,
            correction=0.0 if alpha is None else correction(alpha),
        )
        if update and not self.is_initializing():
            for variable, value in zip(state, new, strict=True):
                variable.value = value
        return y

    @property
    def activation(self) -> Activation:
        """What is normalized: `fn`, tempered where `nonlinearity` asks for it."""
        return tempered(self.fn, self.nonlinearity)

    def _variables(self, features: tuple[int, ...]) -> list[nn.Variable[Any]]:
        prior = functools.cache(lambda: gaussian_stats(self.activation))

        def initial(field: str) -> Array:
            return jnp.broadcast_to(getattr(prior(), field), features)

        return [self.variable(self.collection, field, initial, field) for field in Stats._fields]

    def _check_state(self, update: bool) -> None:
        where, name = "/".join(self.path) or type(self).__name__, self.collection
        mutable = self.is_mutable_collection(name)
        if update and not mutable:
            raise ValueError(
                f"{where} updates its running statistics, but collection {name!r} is not mutable in this apply. "
                f"In training: y, updates = model.apply(variables, x, ..., mutable=[{name!r}]), then carry "
                f"updates[{name!r}] to the next step. In inference: use_running_average=True"
            )
        if not mutable and not self.has_variable(name, Stats._fields[0]):
            raise ValueError(
                f"{where} has no running statistics: collection {name!r} is missing from the variables given to apply. "
                f"Pass {{'params': params, {name!r}: ...}} as model.init returned them and training updated them"
            )


class NReLU(ANAct):
    """`ANAct` of `jax.nn.relu`."""

    fn: Activation = jax.nn.relu


class NLeakyReLU(ANAct):
    """`ANAct` of `jax.nn.leaky_relu`."""

    fn: Activation = jax.nn.leaky_relu


class NELU(ANAct):
    """`ANAct` of `jax.nn.elu`."""

    fn: Activation = jax.nn.elu


class NTanh(ANAct):
    """`ANAct` of `jax.numpy.tanh`."""

    fn: Activation = jnp.tanh


class NSigmoid(ANAct):
    """`ANAct` of `jax.nn.sigmoid`."""

    fn: Activation = jax.nn.sigmoid


class NSoftplus(ANAct):
    """`ANAct` of `jax.nn.softplus`."""

    fn: Activation = jax.nn.softplus


class NSwish(ANAct):
    """`ANAct` of `jax.nn.swish`."""

    fn: Activation = jax.nn.swish


class NGELU(ANAct):
    """`ANAct` of `jax.nn.gelu`."""

    fn: Activation = jax.nn.gelu


class NMish(ANAct):
    """`ANAct` of `jax.nn.mish`."""

    fn: Activation = jax.nn.mish
