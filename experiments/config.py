"""Settings: what decides a training result (`Recipe`), where it runs and what it keeps (`Run`), and their checks."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Annotated, Any, TypeVar

from tyro.conf import arg

from anact_jax import ACTIVATIONS, Form, Published, Standardized
from experiments.cli import at_home
from experiments.data import DATASETS, Augmentation, Dataset, check_dataset, load, with_subset, with_whole_path
from experiments.forms import WORDS, form_named, label_of
from experiments.networks import INITS, MODELS, NORMS, STEMS, ActivationName, check_name

Kind = TypeVar("Kind", bound="Settings")
OPTIMIZERS = ("sgd", "adam")
SETTINGS = "config.json"  # file in a run's folder
DTYPES = ("float32", "bfloat16")
LAST_WITH_CLOSED_FORM = "e6f5b91"
"""The commit at which factors can follow from the parameters of batch normalization."""
_BEFORE_ADDED: Mapping[str, Any] = MappingProxyType(
    {"dtype": "float32", "nesterov": False, "label_smoothing": 0.0, "mixup": 0.0, "clip_norm": None, "ema": 0.0}
    | {"image_size": None}
)


def _one_of(*names: str) -> str:
    return "one of " + ", ".join(names)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all settings have in common; each kind checks its own, after those that it is made of."""

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""

    @classmethod
    def part_of(cls: type[Kind], settings: "Settings", **others: Any) -> Kind:
        """With what other settings have in common with these, and others."""
        names = [field.name for field in dataclasses.fields(cls) if hasattr(settings, field.name)]
        return cls(**{name: getattr(settings, name) for name in names} | others)


@dataclasses.dataclass(frozen=True)
class Storage(Settings):
    """Where data sets are, and how they are read."""

    data_dir: Path | None = None
    """folder of data sets, by default $TFDS_DATA_DIR or ~/tensorflow_datasets"""
    memory_gib: float = 4.0
    """size up to which decoded images are kept in memory; larger data sets are decoded as they are needed"""
    workers: int = 4
    """processes that decode then"""

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""
        super().check()
        for name in ("workers", "memory_gib"):
            check_at_least(0, name, getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Data(Settings):
    """What is trained on."""

    dataset: Annotated[str, arg(help=f"{_one_of(*DATASETS)}, or folder:PATH, of your own images")] = "digits"
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
        super().check()
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
        dataset = load(
            self.dataset,
            storage.data_dir,
            round(storage.memory_gib * 2**30),
            image_size=self.image_size,
            batch_size=batch_size,
        )
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
class Parts(Settings):
    """How the parts of a network are made, whatever the network and its activation."""

    init: Annotated[
        str, arg(help=f"{_one_of(*INITS)}: variance of a kernel's weights, 1/fan_in or 2/fan_in; normalized: lecun")
    ] = "lecun"
    stem: Annotated[
        str, arg(help=f"first layers, {_one_of(*STEMS)}: a 3x3 convolution, or 7x7 of stride 2 and pooling")
    ] = "small"
    norm_momentum: float = 0.9
    """weight of the past in the running statistics of batch normalization, 0 to 1"""
    group_size: int = 8
    """channels in a group of group normalization"""
    activation_momentum: float = 0.9
    """weight of the past in the running statistics of activations, 0 to 1"""
    dtype: Annotated[
        str, arg(help=f"in which layers compute, {_one_of(*DTYPES)}; parameters, statistics and loss are float32")
    ] = "float32"

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""
        super().check()
        check_name("init", self.init, INITS)
        check_name("stem", self.stem, STEMS)
        check_name("dtype", self.dtype, DTYPES)
        check_at_least(1, "group_size", self.group_size)
        for name in ("norm_momentum", "activation_momentum"):
            check_fraction(name, getattr(self, name))


@dataclasses.dataclass(frozen=True)
class FormSettings(Settings):
    """What a normalized activation is."""

    form: Annotated[str, arg(help=f"of normalized activations, {_one_of(*WORDS)}")] = "default"
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
        super().check()
        check_name("form", self.form, WORDS)
        for field in dataclasses.fields(FormSettings)[1:]:
            forms = [word for word, form in WORDS.items() if field.name in _options_of(form)]
            if self.form not in forms and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{field.name} belongs to form {forms[0]}, not to {self.form}; leave it out, or at {field.default}"
                )
        self.chosen_form  # noqa: B018 (it checks itself)

    @property
    def chosen_form(self) -> Form:
        """The form.

        Raises:
            ValueError: a setting is out of range.
        """
        usual = WORDS[self.form]
        options = {name: getattr(self, name) for name in _options_of(usual)}
        return dataclasses.replace(usual, **options | ({} if self.center is not None else {"center": usual.center}))


FORM_SETTINGS = frozenset(field.name for field in dataclasses.fields(FormSettings))


def form_settings(form: Form) -> dict[str, Any]:
    """The settings of `FormSettings` that say this form."""
    return {"form": "published" if isinstance(form, Published) else "default"} | _options_of(form)


def _options_of(form: Form) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(form).items() if name in FORM_SETTINGS}


@dataclasses.dataclass(frozen=True)
class Network(FormSettings, Parts):
    """What is trained."""

    model: Annotated[str, arg(help=_one_of(*MODELS))] = "resnet20"
    activation: Annotated[str, arg(help=f"{_one_of(*ACTIVATIONS)}; with n before it, as in nswish, normalized")] = (
        "nswish"
    )
    norm: Annotated[str, arg(help=f"normalization layer: {_one_of(*NORMS)}")] = "batch"

    @property
    def unheeded(self) -> frozenset[str]:
        """Settings that have no effect with this activation and normalization layer."""
        normalized = ActivationName.parse(self.activation).normalized
        heeded = {
            **dict.fromkeys(FORM_SETTINGS, normalized),
            "activation_momentum": normalized,
            "norm_momentum": self.norm == "batch",
            "group_size": self.norm == "group",
        }
        return frozenset(name for name, has_effect in heeded.items() if not has_effect)

    @property
    def label(self) -> str | None:
        """The label of its form, as results have it; None where it has no effect."""
        return None if "form" in self.unheeded else label_of(self.chosen_form)

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""
        super().check()
        check_name("model", self.model, MODELS)
        check_name("norm", self.norm, NORMS)
        for field in dataclasses.fields(Network):
            if field.name in self.unheeded and getattr(self, field.name) != field.default:
                sort = f"activation {self.activation!r} and norm {self.norm!r}"
                raise ValueError(f"{field.name} has no effect with {sort}; leave it out, or at {field.default!r}")


@dataclasses.dataclass(frozen=True)
class Training(Settings):
    """How it is trained, at any learning rate."""

    epochs: int = 15
    """passes over the training data"""
    batch_size: int = 64
    """examples in a step, over all devices"""
    warmup_epochs: float = 1.0
    """epochs during which the learning rate rises; at most half of them count"""
    optimizer: Annotated[str, arg(help=_one_of(*OPTIMIZERS))] = "sgd"
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
        super().check()
        check_name("optimizer", self.optimizer, OPTIMIZERS)
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
class Recipe(Training, Network, Data):
    """All that decides a result. The same recipe gives the same numbers on the same machine."""

    learning_rate: float = 0.05
    """peak learning rate; it rises linearly, then falls to 0 along a cosine"""
    seed: int = 0
    """of initial weights and of the order of examples"""

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""
        super().check()
        check_positive("learning_rate", self.learning_rate)
        check_at_least(0, "seed", self.seed)
        if self.seed >= 2**31:
            raise ValueError(f"seed must be less than 2**31, got {self.seed}")

    @property
    def recipe(self) -> dict[str, Any]:
        """Its settings by name, as results and checkpoints hold them: the form is a label."""
        names = [field.name for field in dataclasses.fields(Recipe) if field.name not in FORM_SETTINGS]
        settings = {name: getattr(self, name) for name in names}
        return settings | {"activation": str(ActivationName.parse(self.activation)), "form": self.label}


@dataclasses.dataclass(frozen=True)
class Run(Storage):
    """Where a recipe is run, and what is kept of it."""

    workdir: Path | None = None
    """folder for results, by default a new one under runs/; where it holds this run, interrupted, the run goes on"""
    save_every_steps: int = 0
    """steps between checkpoints; 0 saves after each epoch only"""
    keep: int = 3
    """how many of the latest checkpoints are kept, beside the one with the best test accuracy"""
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
        super().check()
        check_at_least(0, "save_every_steps", self.save_every_steps)
        check_at_least(1, "keep", self.keep)
        if not 0 <= self.process < self.processes:
            raise ValueError(f"process must lie between 0 and processes - 1 ({self.processes - 1}), got {self.process}")
        if self.processes > 1 and not (self.coordinator and self.workdir):
            raise ValueError(f"{self.processes} processes need a --coordinator, as in 127.0.0.1:7000, and a --workdir")


@dataclasses.dataclass(frozen=True)
class Experiment(Run, Recipe):
    """Trains a residual network and reports its test accuracy.

    The same configuration and seed give the same numbers on the same machine.
    """

    def load_data(self) -> Dataset:
        """See `Data.load`; ValueError too where the training data do not fill a batch."""
        dataset = self.load(self, self.batch_size)
        self.check_batch(dataset)
        return dataset

    def to_json(self) -> str:
        """All settings, readable."""
        settings = dataclasses.asdict(self) | {"activation": str(ActivationName.parse(self.activation))}
        settings["data_dir"] = self.data_dir and self.data_dir.absolute()  # to be read from any folder
        return json.dumps(settings, indent=2, default=str) + "\n"

    def check_same_run(self, saved: Mapping[str, Any], where: Path) -> None:
        """Raises ValueError, naming the settings that differ, unless a run with these saved settings can go on."""
        before, now = with_added(saved, where), self.recipe
        if before.get("form") in tuple(WORDS):  # as `to_json` has it
            before["form"] = Network(**_fields(Network, before)).label
        free = ("activation", "form") if self.fresh_statistics else ()
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


def with_added(saved: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Saved settings, and what those were that did not exist when they were saved.

    Raises:
        ValueError: their factors followed from the parameters of batch normalization, which nothing does today.
    """
    settings = {**_BEFORE_ADDED, **saved}
    if settings.pop("behind", None) == "closed":
        raise ValueError(
            f"{where} took its factors from the parameters of batch normalization (behind 'closed'); "
            f"commit {LAST_WITH_CLOSED_FORM} is the last that reads it"
        )
    return settings


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that a run wrote, in its folder or in a file.

    Raises:
        OSError: there are none.
        ValueError: they are damaged.
    """
    path = path / SETTINGS if path.is_dir() else path
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ValueError(f"{path} does not hold settings as a run writes them") from error
    return found


def read_experiment(path: Path) -> Experiment:
    """The settings that a run wrote, as it ran; arguments and errors as for `read_settings`.

    Raises:
        ValueError: they are not settings of this program, or one is not what it has to be.
    """
    settings = with_added(read_settings(path), path)
    unknown = settings.keys() - {field.name for field in dataclasses.fields(Experiment)}
    if unknown:
        raise ValueError(f"{path} has settings that this program does not know: {', '.join(sorted(unknown))}")
    try:
        if settings.get("form") is None:  # it has no effect
            settings.pop("form", None)
        elif isinstance(settings["form"], str) and settings["form"] not in WORDS:  # a label, as settings held it before
            settings |= form_settings(form_named(settings["form"]))
        return at_home(Experiment(**_fields(Experiment, settings)))
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


def _fields(kind: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of settings as JSON has them, those that a dataclass has; ValueError, naming it, where one is of another kind."""
    kinds = typing.get_type_hints(kind)
    return {name: _from_json(name, settings[name], kinds[name]) for name in settings.keys() & kinds.keys()}


def _from_json(name: str, value: Any, kind: Any) -> Any:
    """A setting of this kind, which may be a union; ValueError, naming it, where the value is of another."""
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
