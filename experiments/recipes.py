"""Recipes by name, with what to expect of them: `python experiments/train_resnet.py --recipe NAME`."""

from typing import NamedTuple

from experiments.config import Experiment, changed


class Known(NamedTuple):
    """Settings and what they give.

    Attributes:
        config: what `--recipe` starts from; other arguments change it.
        score: test accuracy to expect, marked as measured (here, with these settings) or published (elsewhere).
        hardware: what it is meant for, or was measured on.
        time: measured, or that it was not.
    """

    config: Experiment
    score: str
    hardware: str
    time: str

    def __str__(self) -> str:
        return f"expect {self.score}; {self.hardware}, {self.time}"


_CIFAR100 = changed(
    Experiment(),
    dataset="cifar100",
    model="resnet18",
    form="published",
    learning_rate=0.1,
    batch_size=128,
    epochs=200,
    warmup_epochs=1.0,
)
_ABSTRACT = (
    "published: normalized Swish above Swish by {} points (arXiv 2208.13315, abstract; absolute values not at hand)"
)
_ANOTHER = "BatchNorm and ReLU {}, one run (github.com/weiaicunzai/pytorch-cifar100, steps instead of a cosine)"
_GPU = "one GPU"
_NOT_MEASURED = "estimated 0.1 to 0.5 hours on an H100; time and score not measured here"

RECIPES = {
    "digits": Known(
        changed(Experiment(), model="resnet32", norm="none", epochs=6, compare=True),
        score="measured: 0.983, 0.975, 0.978 with NSwish, 0.111, 0.286, 0.100 with plain Swish (seeds 0, 1, 2)",
        hardware="two CPU cores",
        time="three quarters of a minute for both, with compilation",
    ),
    "fashion_mnist": Known(
        changed(
            Experiment(),
            dataset="fashion_mnist",
            train_images=10_000,
            pool=2,
            epochs=5,
            batch_size=128,
            learning_rate=0.1,
            norm="none",
        ),
        score="measured: 0.820, 0.814, 0.822 (seeds 0, 1, 2), on 10,000 of the training images at half resolution",
        hardware="two CPU cores",
        time="a minute each",
    ),
    "resnet18_cifar100": Known(
        _CIFAR100,
        score=f"{_ABSTRACT.format('more than 1.2')}; {_ANOTHER.format(0.756)}",
        hardware=_GPU,
        time=_NOT_MEASURED,
    ),
    "resnet50_cifar100": Known(
        changed(_CIFAR100, model="resnet50"),
        score=f"{_ABSTRACT.format('more than 1.2')}; {_ANOTHER.format(0.774)}",
        hardware=_GPU,
        time=_NOT_MEASURED,
    ),
    "vgg16_cifar100": Known(
        changed(_CIFAR100, model="vgg16"),
        score=f"{_ABSTRACT.format('more than 1.2')}; {_ANOTHER.format(0.729)} (with three dense layers)",
        hardware=_GPU,
        time=_NOT_MEASURED,
    ),
    "resnet50_tiny_imagenet": Known(
        changed(_CIFAR100, dataset="tiny_imagenet", model="resnet50", stem="imagenet", epochs=100),
        score=f"{_ABSTRACT.format('1.4')}; BatchNorm and ReLU 0.692 to 0.694 (github.com/cs-giung/giung2-jax)",
        hardware=_GPU,
        time=_NOT_MEASURED,
    ),
}
