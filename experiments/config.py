"""Every number that changes a training result, and the checks on it."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from anact_jax import ACTIVATIONS, DEFAULT, REFERENCES, RULES, Form
from experiments.data import DATASETS, Augmentation, Dataset, load, with_subset
from experiments.models import BOUNDS, INITS, MODELS, NORMS, STEMS, TEMPERINGS, TRACKINGS, check_name

OPTIMIZERS = ("sgd", "adam")
SETTINGS = "config.json"  # file in a run's folder
NO_PART_IN_THE_RESULT = (
    "workdir",
    "data_dir",
    "memory_gib",
    "workers",
    "save_every_steps",
    "keep",
    "skip_bad_steps",  # as long as no step is bad
    "fresh_statistics",
    "coordinator",
    "processes",
    "process",
)
FORM_SETTINGS = ("rule", "center", "reference", "nonlinearity", "per_feature", "stop_gradient")


def _one_of(*names: str) -> str:
    return "one of " + ", ".join(names)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is trained on and how: all but the network, the learning rate and the seed."""

    dataset: Annotated[str, arg(help=_one_of(*DATASETS))] = "digits"
    data_dir: Path | None = None
    """folder of tensorflow-datasets, by default $TFDS_DATA_DIR or ~/tensorflow_datasets"""
    train_images: int | None = None
    """number of training images, by default all"""
    validation_images: int = 0
    """training images held out to measure on; 0 measures on the test split"""
    half: int | None = None
    """1 or 2: only this half of the training images; 1, on which choices are made, has a test part of its own"""
    pool: int = 1
    """width of the blocks of pixels averaged into one: 2 halves the resolution"""
    augment: bool = True
    """shift and mirror training images as is usual for the data set (digits: neither)"""
    cutout: int = 0
    """side of a square in each training image that is blanked; 0 for none"""
    memory_gib: float = 4.0
    """size up to which decoded images are kept in memory; larger data sets are decoded as they are needed"""
    workers: int = 4
    """processes that decode then"""
    epochs: int = 15
    """passes over the training data"""
    batch_size: int = 64
    """examples in a step, over all devices"""
    warmup_epochs: float = 1.0
    """epochs during which the learning rate rises"""
    optimizer: Annotated[str, arg(help=_one_of(*OPTIMIZERS))] = "sgd"
    momentum: float = 0.9
    """weight of the past in the gradient's average, 0 to 1"""
    weight_decay: float = 5e-4
    """L2 penalty on kernels, added to their gradient"""
    init: Annotated[
        str, arg(help=f"{_one_of(*INITS)}: variance of a kernel's weights, 1/fan_in or 2/fan_in; normalized: lecun")
    ] = "lecun"
    norm_momentum: float = 0.9
    """weight of the past in the running statistics of batch normalization, 0 to 1"""
    group_size: int = 8
    """channels in a group of group normalization"""
    stem: Annotated[
        str, arg(help=f"first layers, {_one_of(*STEMS)}: a 3x3 convolution, or 7x7 of stride 2 and pooling")
    ] = "small"

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""
        check_name("dataset", self.dataset, DATASETS)
        check_name("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("epochs", "batch_size", "group_size", "pool"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_epochs", "weight_decay", "cutout", "workers", "memory_gib", "validation_images"):
            check_not_negative(name, getattr(self, name))
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs must be less than epochs ({self.epochs}), got {self.warmup_epochs}")
        for name in ("momentum", "norm_momentum"):
            check_fraction(name, getattr(self, name))

    def load_data(self) -> Dataset:
        """The data set, or the part of it that these settings ask for.

        Raises:
            DataError: it cannot be read.
            ValueError: it is too small for these settings.
        """
        dataset = load(self.dataset, self.data_dir, round(self.memory_gib * 2**30))
        if self.train_images is not None or self.validation_images or self.half is not None or self.pool > 1:
            dataset = with_subset(
                dataset,
                train=self.train_images,
                validation=self.validation_images,
                half=self.half,
                pool=self.pool,
            )
        if self.batch_size > len(dataset.train):
            raise ValueError(
                f"batch_size {self.batch_size} is larger than the training data, {len(dataset.train)} examples"
            )
        return dataset

    def augmentation(self, dataset: Dataset) -> Augmentation:
        """What training images go through."""
        usual = Augmentation(dataset.pad, dataset.flip) if self.augment else Augmentation()
        return dataclasses.replace(usual, cutout=self.cutout)


@dataclasses.dataclass(frozen=True)
class TrainConfig(Recipe):
    """Trains a residual network and reports its test accuracy.

    The same configuration and seed give the same numbers on the same machine.
    """

    model: Annotated[str, arg(help=_one_of(*MODELS))] = "resnet20"
    activation: Annotated[
        str,
        arg(help=f"{_one_of(*ACTIVATIONS)}; with n before it, as in nswish, normalized; with d, Deep Kernel Shaping"),
    ] = "nswish"
    rule: Annotated[str, arg(help=f"how the normalization factor is chosen: {_one_of(*RULES)}")] = DEFAULT.rule
    center: bool = DEFAULT.center
    """subtract the mean of f(x) before scaling"""
    reference: Annotated[
        str, arg(help=f"output variance is kept relative to that of the input, or to 1: {_one_of(*REFERENCES)}")
    ] = DEFAULT.reference
    nonlinearity: float | None = DEFAULT.nonlinearity
    """add as much of the identity to the activation as limits how far it bends, by default none"""
    per_feature: bool = DEFAULT.axes == (-1,)
    """statistics of their own for each channel, instead of one set for the layer"""
    stop_gradient: bool = DEFAULT.stop_gradient
    """treat factor and shift as constants under differentiation"""
    tracking: Annotated[
        str,
        arg(help=f"statistics that training normalizes with, {_one_of(*TRACKINGS)}: lag, those of the steps before"),
    ] = "batch"
    tempering: Annotated[
        str,
        arg(help=f"what limits the bend, {_one_of(*TEMPERINGS)}: scale, of the input; measured, the same from batches"),
    ] = "leak"
    bounds: Annotated[
        str,
        arg(help=f"of the factor, {_one_of(*BOUNDS)}: step, from the running one; range, around that of normal input"),
    ] = "none"
    learnable: bool = DEFAULT.learned
    """learn a bounded correction of each factor"""
    activation_momentum: float = 0.9
    """weight of the past in the running statistics of activations, 0 to 1"""
    activation_scale: float = 1.0
    """multiplies every activation: what happens where the gain is not what the rule makes it"""
    norm: Annotated[str, arg(help=f"normalization layer: {_one_of(*NORMS)}")] = "batch"
    learning_rate: float = 0.05
    """peak learning rate of SGD; it rises linearly, then falls to 0 along a cosine"""
    seed: int = 0
    """of initial weights and of the order of examples"""
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
    processes: int = 1
    """processes that train together, each with its part of every batch; start all, with the same --workdir"""
    process: int = 0
    """which of them this one is, from 0; process 0 writes the results"""
    coordinator: str | None = None
    """where process 0 listens to the others, as in 127.0.0.1:7000"""

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be; `make_network` tries the network's."""
        super().check()
        check_name("rule", self.rule, RULES)
        check_name("reference", self.reference, REFERENCES)
        check_name("tracking", self.tracking, TRACKINGS)
        check_name("tempering", self.tempering, TEMPERINGS)
        check_name("bounds", self.bounds, BOUNDS)
        check_positive("learning_rate", self.learning_rate)
        check_positive("activation_scale", self.activation_scale)
        if self.nonlinearity is not None:
            check_positive("nonlinearity", self.nonlinearity)
        check_not_negative("seed", self.seed)
        check_not_negative("save_every_steps", self.save_every_steps)
        if not 0 <= self.process < self.processes:
            raise ValueError(f"process must lie between 0 and processes - 1 ({self.processes - 1}), got {self.process}")
        if self.processes > 1 and not (self.coordinator and self.workdir):
            raise ValueError(f"{self.processes} processes need a --coordinator, as in 127.0.0.1:7000, and a --workdir")
        if self.keep < 1:
            raise ValueError(f"keep must be at least 1, got {self.keep}")
        check_fraction("activation_momentum", self.activation_momentum)

    @property
    def form(self) -> Form:
        """Of the normalized activations."""
        return Form(
            rule=self.rule,  # type: ignore[arg-type]  # a form checks its options
            center=self.center,
            reference=self.reference,  # type: ignore[arg-type]
            nonlinearity=self.nonlinearity,
            feature_axes=-1 if self.per_feature else (),
            stop_gradient=self.stop_gradient,
            learned=self.learnable,
        )

    def to_json(self) -> str:
        """All settings, readable."""
        return json.dumps(self.settings, indent=2) + "\n"

    @property
    def settings(self) -> dict[str, Any]:
        """All settings by name, as JSON holds them."""
        settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return settings

    def check_same_run(self, saved: Mapping[str, Any], where: Path) -> None:
        """Raises ValueError, naming the settings that differ, unless a run with settings `saved` can go on with these.

        A setting that `saved` lacks was added since, and had its default.
        """
        before, now = TrainConfig().settings | dict(saved), self.settings
        free = {*NO_PART_IN_THE_RESULT, *(("activation", *FORM_SETTINGS) if self.fresh_statistics else ())}
        differing = [
            f"{name} {before.get(name)!r}, now {now.get(name)!r}"
            for name in before | now
            if name not in free and before.get(name) != now.get(name)
        ]
        if differing:
            raise ValueError(
                f"{where} holds a run with other settings: {'; '.join(differing)}; "
                "give another --workdir, or the settings of that run"
            )


def read_settings(workdir: Path) -> dict[str, Any]:
    """The settings of the run in a folder, by name.

    Raises:
        OSError: there is none.
        ValueError: the file is damaged.
    """
    try:
        settings: dict[str, Any] = json.loads((workdir / SETTINGS).read_text())
    except ValueError as error:
        raise ValueError(f"{workdir / SETTINGS} is damaged ({error}); give another --workdir") from error
    return settings


def read_config(workdir: Path) -> TrainConfig:
    """The settings of the run in a folder.

    Raises:
        OSError: there is none.
        ValueError: the file is damaged, or has settings that there are no more.
    """
    settings = read_settings(workdir)
    unknown = sorted(settings.keys() - TrainConfig().settings.keys())
    if unknown:
        raise ValueError(f"{workdir / SETTINGS} has settings that are not known here: {', '.join(unknown)}")
    folders = {name: Path(settings[name]) for name in ("data_dir", "workdir") if settings.get(name)}
    return TrainConfig(**settings | folders)


def check_positive(name: str, value: int | float) -> None:
    """Raises ValueError unless it is a positive number."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive number, got {value}")


def check_not_negative(name: str, value: int | float) -> None:
    """Raises ValueError unless it is a number from 0 on."""
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be at least 0, got {value}")


def check_fraction(name: str, value: int | float) -> None:
    """Raises ValueError unless it lies between 0 and 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
