"""Settings: what decides a result (`Recipe`), where it runs and what it keeps (`Run`, `Storage`), and their checks."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from tyro.conf import arg

from anact_jax import ACTIVATIONS, Form, Published, Standardized
from experiments.cli import at_home
from experiments.data import DATASETS, Augmentation, Dataset, check_dataset, load, with_subset, with_whole_path
from experiments.forms import WORDS, form_named, label_of
from experiments.networks import ActivationName, Init, ModelName, NormName, Stem, check_name

Kind = TypeVar("Kind")
Dtype: TypeAlias = Literal["float32", "bfloat16"]
SETTINGS = "config.json"  # file in a run's folder
LAST_WITH_CLOSED_FORM = "e6f5b91"
"""The commit at which factors can follow from the parameters of batch normalization."""
LAST_WITH_ALL_SETTINGS = "a55a799"
"""The commit at which the settings of `_GONE` can be other than here."""
_GONE: Mapping[str, Any] = MappingProxyType({"norm_momentum": 0.9, "group_size": 8, "memory_gib": 4.0, "keep": 3})
"""Settings of saved runs and cells that are no settings any more, with what they are."""
_ADDED: Mapping[str, Any] = MappingProxyType(
    {
        "dtype": "float32",
        "nesterov": False,
        "label_smoothing": 0.0,
        "mixup": 0.0,
        "clip_norm": None,
        "ema": 0.0,
        "image_size": None,
    }
)
"""Settings that the first saved cells do not name, with what they were."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """Where data sets are, and how they are read."""

    data_dir: Path | None = None
    """folder of data sets, by default $TFDS_DATA_DIR or ~/tensorflow_datasets"""
    workers: int = 4
    """processes that decode images of a data set that does not fit in memory"""

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""
        check_at_least(0, "workers", self.workers)


@dataclasses.dataclass(frozen=True)
class Data:
    """What is trained on."""

    dataset: Annotated[str, arg(help=f"one of {', '.join(DATASETS)}, or folder:PATH, of your own images")] = "digits"
    image_size: int | None = None
    """height and width of the images of folder:PATH, by default the medians of theirs, at most 224"""
    train_images: int | None = None
    """number of training images, by default all"""
    validation_images: int = 0
    """training images held out to measure on; 0 measures on the test split"""
    half: int | None = None
    """1 or 2: only this half of the training images; 1, on which choices are made, has a test part of its own"""
    pool: int = 1
    """width of the blocks of pixels averaged into one: 2 halves the resolution"""
    augment: bool = True
    """shift and mirror training images as is usual for the data set (digits: neither; folders: shift by an eighth)"""
    cutout: int = 0
    """side of a square in each training image that is blanked; 0 for none"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dataset", with_whole_path(self.dataset))

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""
        check_dataset(self.dataset)
        if self.image_size is not None:
            check_at_least(1, "image_size", self.image_size)
            if self.dataset in DATASETS:
                raise ValueError(f"image_size belongs to folder:PATH, not to {self.dataset}; leave it out")
        check_at_least(1, "pool", self.pool)
        for name in ("cutout", "validation_images"):
            check_at_least(0, name, getattr(self, name))

    def load(self, storage: Storage, batch_size: int = 1) -> Dataset:
        """The data set, or the part of it that these settings ask for, to be trained on in batches of this size.

        Raises:
            DataError: it cannot be read.
            ValueError: it is too small for these settings.
        """
        dataset = load(self.dataset, storage.data_dir, image_size=self.image_size, batch_size=batch_size)
        if self.train_images is not None or self.validation_images or self.half is not None or self.pool > 1:
            dataset = with_subset(
                dataset,
                train=self.train_images,
                validation=self.validation_images,
                half=self.half,
                pool=self.pool,
            )
        height, width, _ = dataset.train.shape
        if self.cutout > max(height, width):
            raise ValueError(f"cutout {self.cutout} is larger than the images, {height}x{width}")
        return dataset

    def augmentation(self, dataset: Dataset) -> Augmentation:
        """What training images go through."""
        usual = Augmentation(dataset.pad, dataset.flip) if self.augment else Augmentation()
        return dataclasses.replace(usual, cutout=self.cutout)


@dataclasses.dataclass(frozen=True)
class Parts:
    """How the parts of a network are made, whatever the network and its activation."""

    init: Init = "lecun"
    """variance of a kernel's weights, 1/fan_in (lecun, for normalized activations) or 2/fan_in (he)"""
    stem: Stem = "small"
    """first layers: a 3x3 convolution (small), or 7x7 of stride 2 and pooling (imagenet)"""
    activation_momentum: float = 0.9
    """weight of the past in the running statistics of activations, 0 to 1"""
    dtype: Dtype = "float32"
    """in which layers compute; parameters, statistics and loss are float32"""

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""
        check_fraction("activation_momentum", self.activation_momentum)


@dataclasses.dataclass(frozen=True)
class FormSettings:
    """What a normalized activation is."""

    form: Literal["default", "published"] = "default"
    """of normalized activations"""
    std: float = Standardized.std
    """deviation of the output, in the default form"""
    center: bool | None = None
    """subtract the mean; the default form does by default, the published one does not"""
    axis: int | None = Standardized.axis
    """the axis whose features have statistics of their own, in the default form; None for one set a layer"""
    stop_gradient: bool = Standardized.stop_gradient
    """take factor and shift as constants under differentiation, in the default form; the published one always does"""
    tempering: float | None = Standardized.tempering
    """largest nonlinearity of what is normalized, in the default form; by default any"""
    learned: bool = Published.learned
    """learn a correction of the factor, in the published form"""

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""
        for field in dataclasses.fields(FormSettings)[1:]:
            forms = [word for word, form in WORDS.items() if field.name in _options_of(form)]
            if self.form not in forms and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{field.name} belongs to form {forms[0]}, not to {self.form}; leave it out, or at {field.default}"
                )
        self.chosen  # noqa: B018 (it checks itself)

    @property
    def chosen(self) -> Form:
        """The form.

        Raises:
            ValueError: a setting is out of range.
        """
        usual = WORDS[self.form]
        options = {name: getattr(self, name) for name in _options_of(usual)}
        return dataclasses.replace(usual, **options | ({} if self.center is not None else {"center": usual.center}))

    @classmethod
    def of(cls, form: Form) -> "FormSettings":
        """The settings that say this form."""
        return cls("published" if isinstance(form, Published) else "default", **_options_of(form))


_FORM_SETTINGS = frozenset(field.name for field in dataclasses.fields(FormSettings))


def _options_of(form: Form) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(form).items() if name in _FORM_SETTINGS}


@dataclasses.dataclass(frozen=True)
class Network:
    """What is trained."""

    model: ModelName = "resnet20"
    """the network"""
    activation: Annotated[str, arg(help=f"one of {', '.join(ACTIVATIONS)}; with n before it, normalized")] = "nswish"
    norm: NormName = "batch"
    """normalization layer"""
    form: FormSettings = FormSettings()
    parts: Parts = Parts()

    @property
    def without_effect(self) -> frozenset[str]:
        """Settings that have no effect with this activation."""
        normalized = ActivationName.parse(self.activation).normalized
        return frozenset() if normalized else _FORM_SETTINGS | {"activation_momentum"}

    @property
    def label(self) -> str | None:
        """The label of its form, as results have it; None where it has no effect."""
        return None if "form" in self.without_effect else label_of(self.form.chosen)

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""
        self.form.check()
        self.parts.check()
        given, usual = flat(self), flat(Network())
        for name in sorted(self.without_effect):
            if given[name] != usual[name]:
                raise ValueError(
                    f"{name} has no effect with activation {self.activation!r}; leave it out, or at {usual[name]!r}"
                )


@dataclasses.dataclass(frozen=True)
class Training:
    """How it is trained, at any learning rate."""

    epochs: int = 15
    """passes over the training data"""
    batch_size: int = 64
    """examples in a step, over all devices"""
    warmup_epochs: float = 1.0
    """epochs during which the learning rate rises; at most half of them count"""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """the optimizer"""
    momentum: float = 0.9
    """weight of the past in the gradient's average, 0 to 1"""
    nesterov: bool = False
    """look ahead along that average, as Nesterov does (SGD)"""
    weight_decay: float = 5e-4
    """L2 penalty on kernels, added to their gradient"""
    clip_norm: float | None = None
    """largest norm of the gradient of all parameters together, by default any"""
    label_smoothing: float = 0.0
    """share of each label that is spread over all classes, 0 to 1"""
    mixup: float = 0.0
    """blend each image and label with another of the batch, by a weight from Beta(mixup, mixup); 0 for none"""
    ema: float = 0.0
    """evaluate an average of the weights and statistics over the steps, with this weight of the past; 0 for none"""

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""
        for name in ("epochs", "batch_size"):
            check_at_least(1, name, getattr(self, name))
        for name in ("warmup_epochs", "weight_decay", "mixup"):
            check_at_least(0, name, getattr(self, name))
        if self.clip_norm is not None:
            check_positive("clip_norm", self.clip_norm)
        if self.nesterov and self.optimizer != "sgd":
            raise ValueError(f"nesterov belongs to sgd, not to {self.optimizer}; leave it out")
        for name in ("momentum", "label_smoothing", "ema"):
            check_fraction(name, getattr(self, name))

    def check_batch(self, dataset: Dataset) -> None:
        """Raises ValueError unless the training data fill a batch."""
        if self.batch_size > len(dataset.train):
            raise ValueError(
                f"batch_size {self.batch_size} is larger than the training data, {len(dataset.train)} examples"
            )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides a result. The same recipe gives the same numbers on the same machine."""

    data: Data = Data()
    network: Network = Network()
    training: Training = Training()
    learning_rate: float = 0.05
    """peak learning rate; it rises linearly, then falls to 0 along a cosine"""
    seed: int = 0
    """of initial weights and of the order of examples"""

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""
        self.data.check()
        self.network.check()
        self.training.check()
        check_positive("learning_rate", self.learning_rate)
        check_at_least(0, "seed", self.seed)
        if self.seed >= 2**31:
            raise ValueError(f"seed must be less than 2**31, got {self.seed}")

    @property
    def key(self) -> dict[str, Any]:
        """Its settings by name, as results and checkpoints hold them: the form is a label."""
        settings = {name: value for name, value in flat(self).items() if name not in _FORM_SETTINGS}
        name = str(ActivationName.parse(self.network.activation))
        return settings | {"activation": name, "form": self.network.label}


@dataclasses.dataclass(frozen=True)
class Run:
    """Where a recipe is run, and what is kept of it."""

    workdir: Path | None = None
    """folder for results, by default a new one under runs/; where it holds this run, interrupted, the run goes on"""
    save_every_steps: int = 0
    """steps between checkpoints; 0 saves after each epoch only"""
    skip_bad_steps: bool = False
    """leave a step out whose loss or gradient is not finite, instead of stopping"""
    fresh_statistics: bool = False
    """go on from a checkpoint of another activation or form: statistics that it lacks start anew"""
    compare: bool = False
    """train with the plain activation too, first and with the same settings, and draw both in one picture"""
    processes: int = 1
    """processes that train together, each with its part of every batch; start all, with the same --workdir"""
    process: int = 0
    """which of them this one is, from 0; process 0 writes the results"""
    coordinator: str | None = None
    """where process 0 listens to the others, as in 127.0.0.1:7000"""

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""
        check_at_least(0, "save_every_steps", self.save_every_steps)
        if not 0 <= self.process < self.processes:
            raise ValueError(f"process must lie between 0 and processes - 1 ({self.processes - 1}), got {self.process}")
        if self.processes > 1 and not (self.coordinator and self.workdir):
            raise ValueError(f"{self.processes} processes need a --coordinator, as in 127.0.0.1:7000, and a --workdir")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Trains a residual network and reports its test accuracy.

    The same configuration and seed give the same numbers on the same machine.
    """

    recipe: Recipe = Recipe()
    run: Run = Run()
    storage: Storage = Storage()

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""
        self.recipe.check()
        self.run.check()
        self.storage.check()

    def load_data(self) -> Dataset:
        """See `Data.load`; ValueError too where the training data do not fill a batch."""
        return load_for(self.recipe.data, self.recipe.training, self.storage)

    def to_json(self) -> str:
        """All settings, readable."""
        data_dir = self.storage.data_dir and self.storage.data_dir.absolute()  # to be read from any folder
        name = str(ActivationName.parse(self.recipe.network.activation))
        settings = dataclasses.asdict(changed(self, activation=name, data_dir=data_dir))
        return json.dumps(settings, indent=2, default=str) + "\n"

    def check_same_run(self, saved: Mapping[str, Any], where: Path) -> None:
        """Raises ValueError, naming the settings that differ, unless a run with these saved settings can go on.

        Args:
            saved: the settings by name, those of the form as settings or as a label.
            where: they were saved.
        """
        before, now = as_today(saved, where), self.recipe.key
        if "std" in before:  # settings of a run, not the key of a recipe
            before["form"] = built(Network, before).label
        free = ("activation", "form") if self.run.fresh_statistics else ()
        differing = [
            f"{name} {before.get(name)!r}, now {value!r}"
            for name, value in now.items()
            if name not in free and before.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"{where} holds a run with other settings: {'; '.join(differing)}; "
                "give another --workdir, or the settings of that run"
            )


def load_for(data: Data, training: Training, storage: Storage) -> Dataset:
    """See `Data.load`; ValueError too where the training data do not fill a batch."""
    dataset = data.load(storage, training.batch_size)
    training.check_batch(dataset)
    return dataset


def flat(settings: Any) -> dict[str, Any]:
    """Settings by name: those of the parts, each of which has a name of its own, are taken out of them."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        found |= flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return found


def changed(settings: Kind, **values: Any) -> Kind:
    """The same settings with some of them changed, each by its name, in whatever part it is.

    Raises:
        TypeError: there is no such setting.
    """
    unknown = values.keys() - flat(settings).keys()
    if unknown:
        raise TypeError(f"no such settings: {', '.join(sorted(unknown))}")
    parts: dict[str, Any] = {}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            parts[field.name] = changed(value, **{name: values[name] for name in values.keys() & flat(value).keys()})
        elif field.name in values:
            parts[field.name] = values[field.name]
    return dataclasses.replace(settings, **parts)  # type: ignore[type-var]


def as_today(saved: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Saved settings by name, as they are called today: of runs of any age, and of the cells of studies.

    Raises:
        ValueError: they include one that is no setting any more, at another value than it has now.
    """
    settings = {**_ADDED, **_without_parts(saved)}
    if settings.pop("behind", None) == "closed":
        raise ValueError(
            f"{where} took its factors from the parameters of batch normalization (behind 'closed'); "
            f"commit {LAST_WITH_CLOSED_FORM} is the last that reads it"
        )
    for name, value in _GONE.items():
        if settings.pop(name, value) != value:
            raise ValueError(
                f"{where} has {name} {saved[name]!r}, which is {value!r} today; commit {LAST_WITH_ALL_SETTINGS} is the "
                "last that reads it"
            )
    return settings


def _without_parts(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a nested object by name; `form`, which is a part and one of its settings, stays the setting."""
    found: dict[str, Any] = {}
    for name, value in saved.items():
        found |= _without_parts(value) if isinstance(value, Mapping) else {name: value}
    return found


def read_settings(path: Path) -> dict[str, Any]:
    """The settings by name that a run wrote, in its folder or in a file.

    Raises:
        OSError: there are none.
        ValueError: they are damaged, or of a run that nothing reads today.
    """
    where, path = path, path / SETTINGS if path.is_dir() else path
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ValueError(f"{path} does not hold settings as a run writes them") from error
    return as_today(found, where)


def read_experiment(path: Path) -> Experiment:
    """The settings that a run wrote, as it ran; arguments and errors as for `read_settings`.

    Raises:
        ValueError: they are not settings of this program, or one is not what it has to be.
    """
    settings = read_settings(path)
    unknown = settings.keys() - flat(Experiment()).keys()
    if unknown:
        raise ValueError(f"{path} has settings that this program does not know: {', '.join(sorted(unknown))}")
    try:
        if settings.get("form") is None:  # it has no effect
            settings.pop("form", None)
        elif isinstance(settings["form"], str) and settings["form"] not in WORDS:  # a label, as settings held it before
            settings |= dataclasses.asdict(FormSettings.of(form_named(settings["form"])))
        return at_home(built(Experiment, settings))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


_EXPECTED = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    Path: "a folder, as text",
    NoneType: "null",
}


def built(kind: type[Kind], settings: Mapping[str, Any]) -> Kind:
    """An object of this kind with those of the settings that it has, which are as JSON has them.

    Raises:
        ValueError: one is of another kind; the message names it.
    """
    usual = kind()
    types: dict[str, Any] = _types(kind)
    values = {name: _from_json(name, settings[name], types[name]) for name in settings.keys() & flat(usual).keys()}
    return changed(usual, **values)


def _types(kind: Any) -> dict[str, Any]:
    """The type of each setting, by name."""
    found: dict[str, Any] = {}
    for name, part in typing.get_type_hints(kind).items():
        found |= _types(part) if dataclasses.is_dataclass(part) else {name: part}
    return found


def _from_json(name: str, value: Any, kind: Any) -> Any:
    """A setting of this kind, which may be a union; ValueError, naming it, where the value is of another."""
    if typing.get_origin(kind) is Literal:
        check_name(name, value, typing.get_args(kind))
        return value
    kinds = typing.get_args(kind) or (kind,)
    if type(value) in kinds:
        return value
    if Path in kinds and isinstance(value, str):
        return Path(value)
    if float in kinds and type(value) is int:
        return float(value)
    expected = " or ".join(_EXPECTED[one] for one in kinds)
    raise ValueError(f"{name} must be {expected}, got {json.dumps(value)}")


def check_positive(name: str, value: int | float) -> None:
    """Raises ValueError, naming the setting, unless the value is positive."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive number, got {value}")


def check_at_least(least: int, name: str, value: int | float) -> None:
    """Raises ValueError, naming the setting, where the value is less, or no number."""
    if not least <= value < float("inf"):
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_fraction(name: str, value: int | float) -> None:
    """Raises ValueError, naming the setting, unless the value lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
