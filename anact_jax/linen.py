"""Flax Linen modules: they read state, call a pure function of `anact_jax`, and write state."""

import dataclasses
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import bind
from flax.linen.transforms import get_module_scopes, set_module_scopes
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Shaped

from anact_jax.forms import Form, form_of
from anact_jax.running import averaged, check_momentum, without_batches
from anact_jax.statistics import FactorAndShift, Stats, feature_axes
from anact_jax.step import anact, check_activation, check_state, check_width, initial_stats, warn_of_sharing
from anact_jax.tracing import Activation, by_reference, widened

# For each pass that is under way (one `apply` or `init`, or one body of a transform), the layers that updated in it.
_updated: weakref.WeakKeyDictionary[Any, set[tuple[str, ...]]] = weakref.WeakKeyDictionary()


class ANAct(nn.Module):
    """An activation normalized by the statistics of its batch, threaded like `nn.BatchNorm`.

    `y = factor * (f(x) - shift)`, by default with mean 0 and deviation 0.5 in each channel; see
    `anact_jax.Standardized`. In training factor and shift come from the batch, and running averages are kept in the
    collection `batch_stats`; in inference they come from those averages. Before the first training batch the averages
    are those of `fn` under a standard normal input.

    Initialize the weights before it with variance 1 / fan-in (LeCun, Flax's default). Do not use He initialization: the
    layer already applies the gain it compensates for.

    Attributes:
        fn: any elementwise JAX function, or a Linen module that is one, such as `nn.PReLU()`. A function that closes
            over a parameter is differentiated in it, through the statistics as well. A module is made once, outside of
            the function: `ANAct(nn.PReLU())`, not `ANAct(lambda x: nn.PReLU()(x))`.
        form: `Standardized(...)`, `Published(...)`, `"default"` or `"published"`. Without it the options below make a
            `Standardized`; beside it they are refused.
        std: deviation of the output.
        center: subtract the mean.
        axis: the feature axis; None for one set of statistics a layer.
        tempering: largest nonlinearity of what is normalized; see `anact_jax.tempered`.
        stop_gradient: treat factor and shift as constants under differentiation.
        momentum: `new = momentum * old + (1 - momentum) * batch`; see `anact_jax.update_stats`. It may be traced, and
            it may be an array with one for each channel.
        use_running_average: inference (True) or training (False), here or in the call.
        update: take the batch into the running averages; by default in training only. With `use_running_average=True`
            it measures without using, with False it uses without keeping.
        axis_name: mapped axis (`pmap`, `shard_map`) over which statistics are shared. Not needed under `jit`, nor in
            `init` or inference.
        axis_index_groups: indices along `axis_name` that share statistics; see `anact_jax.activation_stats`.
        dtype: of the output; by default the input's. Statistics are float32 or wider in any case.
        shared: this layer is meant to be called several times in one pass. Otherwise the second training call in one
            `apply` or `init` warns; bodies of `nn.scan`, `nn.remat` and `nn.jit` count as passes of their own.
        collection: name of the collection that holds the state.

    Examples:
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
        ['count', 'mean_out', 'var_out']
        >>> y, updates = Net().apply(variables, x, train=True, mutable=["batch_stats"])
        >>> updates["batch_stats"]["NSwish_0"]["count"].shape  # statistics of their own for each of 16 channels
        (16,)
        >>> Net().apply(variables | updates, x, train=False).shape
        (8, 1)
    """

    # Not in the class, where `nnx.bridge.ToNNX` would take it for a method.
    fn: Activation = dataclasses.field(default_factory=lambda: jax.nn.swish)
    _: dataclasses.KW_ONLY
    form: Form | str | None = None
    std: float = 0.5
    center: bool = True
    axis: int | None = -1
    tempering: float | None = None
    stop_gradient: bool = False
    momentum: ArrayLike = 0.9
    use_running_average: bool | None = None
    update: bool | None = None
    axis_name: Hashable | Sequence[Hashable] | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    dtype: DTypeLike | None = None
    shared: bool = False
    collection: str = "batch_stats"

    def __post_init__(self) -> None:
        check_activation(self.fn, type(self).__name__)
        check_momentum(self.momentum)
        options = {name: getattr(self, name) for name in ("std", "center", "axis", "tempering", "stop_gradient")}
        object.__setattr__(self, "form", form_of(self.form, **options))
        if not isinstance(self.fn, nn.Module):
            if any(kind.__module__.startswith("flax.nnx") for kind in type(self.fn).__mro__):
                name = type(self).__name__
                raise TypeError(
                    f"fn of {name}, a Linen layer, is the NNX module {type(self.fn).__name__}, whose parameters would "
                    f"not learn; take a Linen module such as nn.PReLU(), or anact_jax.nnx.{name}"
                )
            object.__setattr__(self, "fn", by_reference(self.fn))
        super().__post_init__()

    @nn.compact
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
            use_running_average: the mode, if the constructor did not set it.
            mask: broadcastable to x; elements where it is 0 or False are left out of the statistics.

        Raises:
            ValueError: the mode is set nowhere or twice; the state is missing, not mutable in training, of another form
                or of another width.
        """
        form = form_of(self.form)
        inference = self._mode(use_running_average)
        update = not inference if self.update is None else self.update
        features = tuple(x.shape[axis] for axis in feature_axes(form.axis, x.ndim))
        if not self.is_initializing():
            self._check_state(form, update)
        f = function_of(self, x)
        known = set(self.variables.get("params", ())) if self.is_initializing() else set()
        state = self._variables(f, form, features)
        if update and not self.shared:
            self._check_first()
        alpha = self.param("alpha", nn.initializers.zeros, features) if form.learned else None

        y, new = anact(
            f,
            x,
            Stats(**{name: variable.value for name, variable in state.items()}),
            form,
            momentum=self.momentum,
            # In init no batch is measured: no mapped axis is bound, and the state starts the same for any input.
            use_running_average=inference or self.is_initializing(),
            update=update and not self.is_initializing(),
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            alpha=alpha,
            dtype=self.dtype,
        )
        if update and not self.is_initializing():
            for name, variable in state.items():
                variable.value = getattr(new, name)
        if self.is_initializing():
            self._check_made_nothing(known)
        return y

    @property
    def activation(self) -> Activation:
        """What is normalized: `fn`, tempered if the form says so."""
        return form_of(self.form).activation(function_of(self))

    def running_stats(self) -> Stats:
        """Running statistics of a bound layer, in float32 or wider.

        Raises:
            ValueError: the layer is not bound to its variables, or they are those of another form.
        """
        form = form_of(self.form)
        held = {name: self._held(self.collection, name) for name in ("count", *form.moments)}
        check_state(self.variables[self.collection], form, self._where)
        return Stats(**{name: widened(value) for name, value in held.items()})

    def normalization(self) -> FactorAndShift:
        """Factor and shift of a bound layer in inference.

        `layer.bind({"batch_stats": ...})` binds one, with what `model.init` and training put under the layer's name; of
        a learned form its `"params"` too. Before training they are those of a standard normal input.

        Raises:
            ValueError: the layer is not bound to its variables.

        Examples:
            >>> import jax, jax.numpy as jnp
            >>> layer = NReLU(std=1.0, use_running_average=True)
            >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 1)))
            >>> [round(float(value[0]), 3) for value in layer.bind(variables).normalization()]
            [1.713, 0.399]
        """
        form = form_of(self.form)
        return form.factor_and_shift(self.running_stats(), self._held("params", "alpha") if form.learned else None)

    def _held(self, collection: str, name: str) -> Array:
        value: Array | None = None if self.scope is None else self.get_variable(collection, name)
        if value is None:
            wanted = (self.collection, *(["params"] if form_of(self.form).learned else []))
            raise ValueError(
                f"{type(self).__name__} has no {collection}/{name}: a Linen layer must be bound to its own variables, "
                f"layer.bind({{{', '.join(f'{kind!r}: ...' for kind in wanted)}}}), each as it stands in the model's "
                "under the layer's name"
            )
        return jnp.asarray(value)

    @property
    def _where(self) -> str:
        """The layer, as errors name it."""
        name = type(self).__name__
        path = "/".join(self.path) if self.scope is not None else ""
        return f"{name} {path!r}" if path else name

    def _check_made_nothing(self, known: set[str]) -> None:
        """Raises TypeError if tracing fn has made parameters, beside those that were known."""
        made = sorted(set(self.variables.get("params", ())) - known - {"alpha"})
        if made:
            name = type(self).__name__
            raise TypeError(
                f"fn of {self._where} makes a module each time it is called ({made[0]}), and it is traced several "
                f"times; make the module once and hand it over, as in {name}(nn.PReLU()) or "
                f"{name}(nn.Sequential([nn.PReLU(), nn.tanh]))"
            )

    def _mode(self, called_with: bool | None) -> bool:
        mode = self.use_running_average
        if mode is None and called_with is None:
            raise ValueError(
                f"{self._where} does not know whether this is training or inference: pass use_running_average=False or "
                "True, to the constructor or to the call"
            )
        if mode is not None and called_with is not None:
            raise ValueError(
                f"{self._where} was given use_running_average twice, in the constructor and in the call; leave one out"
            )
        return bool(called_with if mode is None else mode)

    def _check_first(self) -> None:
        assert self.scope is not None
        before = _updated.setdefault(self.scope.root, set())
        if self.path in before:
            warn_of_sharing(self._where)
        before.add(self.path)

    def _variables(self, f: Activation, form: Form, features: tuple[int, ...]) -> dict[str, nn.Variable[Any]]:
        names = ("count", *form.moments)
        missing = [name for name in names if not self.has_variable(self.collection, name)]
        prior = initial_stats(f, form, features) if missing else None
        state = {name: self.variable(self.collection, name, lambda name=name: getattr(prior, name)) for name in names}
        check_width(jnp.shape(state["count"].value), features, form, self._where)  # `init` may have met another one
        return state

    def _check_state(self, form: Form, update: bool) -> None:
        name, mutable = self.collection, self.is_mutable_collection(self.collection)
        if update and not mutable:
            raise ValueError(
                f"{self._where} updates its running statistics, but collection {name!r} is not mutable in this apply. "
                f"In training: y, updates = model.apply(variables, x, ..., mutable=[{name!r}]), then carry "
                f"updates[{name!r}] to the next step. In inference: use_running_average=True"
            )
        held = self.variables.get(name, {})
        if not any(field in held for field in Stats._fields):
            raise ValueError(
                f"{self._where} has no running statistics: collection {name!r} is missing from the variables given to "
                f"apply. Pass {{'params': params, {name!r}: ...}} as model.init returned them and training updated them"
            )
        check_state(held, form, self._where)


def function_of(layer: ANAct, x: Array | None = None) -> Activation:
    """A layer's `fn`; of a Linen module, what it computes with its parameters, which `init` makes for this x."""
    if not isinstance(layer.fn, nn.Module):
        return layer.fn
    if layer.is_initializing() and x is not None:
        layer.fn(x)
    return unbound(layer.fn)


def unbound(module: nn.Module) -> Callable[..., Any]:
    """What a bound module computes with its variables, as a function that may be traced by any transform."""
    # A module made in a compact method holds others that stand beside it: as Flax's transforms do, take the scopes of
    # all of them.
    scopes, _, _ = get_module_scopes(module, (), {})
    variables = [scope.variables() for scope in scopes]

    def f(*args: Any, **kwargs: Any) -> Any:
        clone, _, _ = set_module_scopes(module, (), {}, [bind(held) for held in variables])
        return clone(*args, **kwargs)

    f.__name__ = type(module).__name__
    return f


def estimate_stats(
    apply: Callable[[Any, Any], Mapping[str, Any]],
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    collection: str = "batch_stats",
) -> dict[str, Any]:
    """Running statistics estimated again, for weights that no batch was trained with: averaged ones (EMA, SWA).

    The old statistics are forgotten, and those of the batches averaged with equal weights, as in one large batch.
    Layers such as `nn.BatchNorm` in the same collection go on with their running average from batch to batch.

    Args:
        apply: runs the model in training on a batch, and returns the updated collections, as in
            `lambda variables, x: model.apply(variables, x, train=True, mutable=["batch_stats"])[1]`. It is compiled.
        variables: of the model, with the weights that the statistics are for.
        batches: any number of batches, as `apply` takes them; of equal sizes, best as large as in training.
        collection: where the layers keep their state.

    Returns:
        The variables with new statistics.

    Raises:
        ValueError: there are no batches, or the collection is missing.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> model = nn.Sequential([nn.Dense(8), NSwish(use_running_average=False)])
        >>> batches = jax.random.normal(jax.random.key(0), (5, 32, 4))
        >>> variables = model.init(jax.random.key(1), batches[0])
        >>> run = lambda variables, x: model.apply(variables, x, mutable=["batch_stats"])[1]
        >>> variables = estimate_stats(run, variables, batches)
        >>> float(variables["batch_stats"]["layers_1"]["count"][0])
        5.0
    """
    if collection not in variables:
        raise ValueError(f"the variables have no collection {collection!r}, only {', '.join(variables)}")
    compiled, state = jax.jit(apply), variables[collection]

    def each() -> Iterator[Mapping[str, Any]]:
        nonlocal state
        for batch in batches:
            state = compiled({**variables, collection: without_batches(state)}, batch)[collection]
            yield state

    return {**variables, collection: averaged(each())}


class NReLU(ANAct):
    """`ANAct` of `jax.nn.relu`."""

    fn: Activation = jax.nn.relu


class NLeakyReLU(ANAct):
    """`ANAct` of `jax.nn.leaky_relu`."""

    fn: Activation = jax.nn.leaky_relu


class NELU(ANAct):
    """`ANAct` of `jax.nn.elu`."""

    fn: Activation = jax.nn.elu


class NSELU(ANAct):
    """`ANAct` of `jax.nn.selu`."""

    fn: Activation = jax.nn.selu


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
    """`ANAct` of `jax.nn.swish`, also named SiLU."""

    fn: Activation = jax.nn.swish


class NGELU(ANAct):
    """`ANAct` of `jax.nn.gelu`."""

    fn: Activation = jax.nn.gelu


class NMish(ANAct):
    """`ANAct` of `jax.nn.mish`."""

    fn: Activation = jax.nn.mish


NSiLU = NSwish
