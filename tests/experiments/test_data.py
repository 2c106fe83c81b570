import itertools
import multiprocessing
import random

import chex
import numpy as np
import pytest
from mnist1d.data import get_dataset_args, make_dataset

from experiments.data import (
    Augmentation,
    Dataset,
    Shard,
    evaluation_batches,
    first_examples,
    load,
    training_batches,
    with_subset,
)
from experiments.data.examples import Arrays, DataError, Stored, check_example, dataset_of
from experiments.data.pipeline import cut_out, shifted, standardize

ALL_CHANGES = Augmentation(pad=2, flip=True, cutout=3)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def made_of(train, test, mean=0.0, std=1.0):
    channels = train.shape[-1]
    return Dataset(train, test, 10, np.full(channels, mean), np.full(channels, std), pad=0, flip=False)


def numbered(n):
    """Examples whose label is their position."""
    examples = Arrays(np.zeros((n, 1, 1, 1), np.uint8), np.arange(n))
    return made_of(examples, examples)


def noise(n, shape=(6, 5, 3)):
    """Random images whose label is their position."""
    return Arrays(np.random.default_rng(0).integers(1, 256, (n, *shape), np.uint8), np.arange(n))


def picture(*rows):
    """An image out of lines of text: 0 where it is blank, 255 for #, and so on through `_INK`."""
    return np.array([[_INK[point] for point in row] for row in rows], np.uint8)[None, :, :, None]


def drawn(image):
    """The lines of text of an image."""
    signs = {value: sign for sign, value in _INK.items()}
    return ["".join(signs[int(value)] for value in row) for row in image[..., 0]]


_INK = {".": 0, "a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6, "g": 7, "h": 8, "i": 9, "#": 255}
LETTERS = picture("abc", "def", "ghi")


# What is in the data sets.


def test_digits_are_whole_and_disjoint(digits):
    assert (len(digits.train), len(digits.test), digits.classes) == (1437, 360, 10)
    chex.assert_shape(digits.train.images, (1437, 8, 8, 1))
    chex.assert_type([digits.train.images, digits.train.labels], [np.uint8, np.int32])
    assert min(np.bincount(digits.test.labels)) >= 34
    together = np.concatenate([digits.train.images, digits.test.images]).reshape(1797, -1)
    assert len(np.unique(together, axis=0)) == 1797


def test_digits_are_the_same_every_time(digits):
    again = load("digits")
    for part, same in ((digits.train, again.train), (digits.test, again.test)):
        chex.assert_trees_all_equal((part.images, part.labels), (same.images, same.labels))


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_types")  # which items of a tuple are checked is drawn at random
def test_mnist1d_is_the_authors():
    np.random.seed(7)
    random.seed(7)
    expected = np.random.random(), random.random()
    np.random.seed(7)
    random.seed(7)
    signals = load("mnist1d")
    assert (np.random.random(), random.random()) == expected
    assert (len(signals.train), len(signals.test), signals.train.shape) == (12_000, 3_000, (1, 40, 1))
    settings = get_dataset_args()
    settings.num_samples = 15_000
    made = make_dataset(settings)
    images = standardize(signals.test.images, signals)
    np.testing.assert_allclose(images.reshape(3_000, 40), np.clip(made["x_test"], -4.55, 4.55), atol=0.05)
    np.testing.assert_array_equal(signals.train.labels, made["y"])


def test_validation_split_leaves_training_images():
    dataset = made_of(noise(50), noise(7))
    smaller = with_subset(dataset, train=20, validation=10)
    assert (len(smaller.train), len(smaller.test), smaller.classes) == (20, 10, 10)
    assert not set(smaller.train.labels) & set(smaller.test.labels)
    for part in (smaller.train, smaller.test):
        np.testing.assert_array_equal(part.images, dataset.train.images[part.labels])
    np.testing.assert_allclose(smaller.mean, smaller.train.images.mean((0, 1, 2)))
    np.testing.assert_allclose(smaller.std, smaller.train.images.std((0, 1, 2)))
    again = with_subset(dataset, validation=10)
    np.testing.assert_array_equal(again.test.labels, smaller.test.labels)
    assert len(again.train) == 40
    np.testing.assert_array_equal(with_subset(dataset, train=20).test.labels, dataset.test.labels)


def test_halves_have_nothing_in_common():
    dataset = made_of(noise(61), noise(7))
    first, second = (with_subset(dataset, half=half) for half in (1, 2))
    choice = with_subset(dataset, half=1, validation=6)
    assert (len(first.train), len(first.test), len(second.train), len(second.test)) == (26, 5, 30, 7)
    assert not {*first.train.labels, *first.test.labels} & {*second.train.labels}
    assert not {*first.train.labels} & {*first.test.labels}
    assert {*choice.test.labels} | {*choice.train.labels} == {*first.train.labels}
    np.testing.assert_array_equal(second.test.labels, dataset.test.labels)


def test_pooling_averages_blocks():
    image = np.array([[0, 4, 10, 10], [8, 8, 10, 13]], np.uint8)[None, :, :, None]
    dataset = made_of(Arrays(image, np.zeros(1, int)), Arrays(image, np.zeros(1, int)))
    smaller = with_subset(dataset, pool=2)
    assert smaller.train.images[..., 0].tolist() == [[[5, 11]]]
    assert smaller.test.images[..., 0].tolist() == [[[5, 11]]]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"train": 51}, "51 images for training and 0 for validation out of 50"),
        ({"train": 0}, "0 images for training"),
        ({"train": 45, "validation": 6}, "45 images for training and 6 for validation out of 50"),
        ({"half": 3}, "half must be 1 or 2, got 3"),
        ({"validation": 50}, "0 images for training"),
        ({"validation": -1}, "-1 for validation"),
        ({"pool": 2}, "pool must divide the size of the images"),
    ],
)
def test_subsets_that_cannot_be_are_refused(settings, problem):
    with pytest.raises(ValueError, match=problem):
        with_subset(made_of(noise(50), noise(7)), **settings)


def test_a_half_too_small_for_a_test_part_is_refused():
    with pytest.raises(
        ValueError, match="half 1 keeps a sixth for tests and needs at least 11 training images, got 10"
    ):
        with_subset(made_of(noise(10), noise(7)), half=1)
    assert len(with_subset(made_of(noise(11), noise(7)), half=1).test) == 1


# Augmentation, in pictures.


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        ((1, 1), ["abc", "def", "ghi"]),
        ((0, 1), ["...", "abc", "def"]),
        ((2, 1), ["def", "ghi", "..."]),
        ((1, 0), [".ab", ".de", ".gh"]),
        ((1, 2), ["bc.", "ef.", "hi."]),
        ((2, 0), [".de", ".gh", "..."]),
    ],
)
def test_shift(shift, expected):
    assert drawn(shifted(LETTERS, np.array([shift]), pad=1)[0]) == expected


@pytest.mark.parametrize(
    ("side", "centre", "expected"),
    [
        (1, (1, 2), ["#####", "##.##", "#####", "#####"]),
        (3, (1, 2), ["#...#", "#...#", "#...#", "#####"]),
        (2, (1, 2), ["#..##", "#..##", "#####", "#####"]),
        (3, (0, 0), ["..###", "..###", "#####", "#####"]),
        (4, (3, 4), ["#####", "##...", "##...", "##..."]),
        (9, (2, 2), [".....", ".....", ".....", "....."]),
    ],
)
def test_cutout(side, centre, expected):
    image = np.repeat(picture(*["#####"] * 4).astype(np.float32), 3, axis=-1)
    (cut,) = cut_out(image, np.array([centre]), side)
    assert drawn(cut) == expected
    assert (cut == cut[..., :1]).all()  # in all channels


def images_seen(dataset, augmentation, epochs=1):
    """Training images before standardization, and their positions in the data set."""
    batches = list(training_batches(dataset, 50, seed=0, epochs=epochs, augmentation=augmentation))
    return np.concatenate([batch.images for batch in batches]), np.concatenate([batch.labels for batch in batches])


def test_every_shift_occurs_about_equally_often():
    images = np.repeat(picture(".....", ".....", "..#..", ".....", "....."), 5000, axis=0)
    dataset = made_of(Arrays(images, np.arange(5000)), noise(1))
    seen, _ = images_seen(dataset, Augmentation(pad=2))
    assert (seen.sum((1, 2, 3)) == 255).all()  # the bright pixel never leaves
    assert ((seen != 0).sum(0)[..., 0] > 120).all()  # 200 are expected at each of 25 places


def test_half_of_the_images_are_mirrored_exactly():
    dataset = made_of(noise(1000), noise(1))
    seen, rows = images_seen(dataset, Augmentation(flip=True))
    original = dataset.train.images[rows]
    plain = (seen == original).all((1, 2, 3))
    mirrored = (seen == original[:, :, ::-1]).all((1, 2, 3))
    assert (plain ^ mirrored).all()
    assert 440 < mirrored.sum() < 560


def test_cutout_reaches_every_pixel():
    dataset = made_of(noise(1000, (7, 9, 3)), noise(1))
    seen, rows = images_seen(dataset, Augmentation(cutout=3))
    blank = (seen == 0).all(-1)
    np.testing.assert_array_equal(np.where(blank[..., None], 0, dataset.train.images[rows]), seen)
    assert blank.any(0).all()
    sizes = blank.sum((1, 2))
    assert set(sizes) == {4, 6, 9}
    touches_border = blank[:, 0].any(1) | blank[:, -1].any(1) | blank[:, :, 0].any(1) | blank[:, :, -1].any(1)
    assert (sizes[~touches_border] == 9).all()


def test_cutout_leaves_the_mean():
    dataset = made_of(noise(50), noise(1), mean=100.0, std=50.0)
    seen, _ = images_seen(dataset, Augmentation(cutout=20))
    assert (seen == 0).all()


def test_shifts_change_from_epoch_to_epoch():
    dataset = made_of(noise(50), noise(1))
    seen, rows = images_seen(dataset, Augmentation(pad=2), epochs=2)
    first, second = (seen[part][np.argsort(rows[part])] for part in (slice(0, 50), slice(50, 100)))
    assert (first != second).any((1, 2, 3)).mean() > 0.8


def test_nothing_changes_without_augmentation():
    dataset = made_of(noise(100), noise(1))
    seen, rows = images_seen(dataset, Augmentation())
    np.testing.assert_array_equal(seen, dataset.train.images[rows])


def test_training_images_are_standardized(digits):
    images = standardize(digits.train.images, digits)
    chex.assert_type(images, np.float32)
    np.testing.assert_allclose((images.mean(), images.std()), (0, 1), atol=1e-4)
    colour = with_subset(made_of(noise(500), noise(1)), train=500)
    np.testing.assert_allclose(standardize(colour.train.images, colour).mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(standardize(colour.train.images, colour).std((0, 1, 2)), 1, atol=1e-4)


@pytest.mark.parametrize(("side", "most"), [(32, 10_000), (64, 10_000), (512, 156), (10_000, 1)])
def test_moments_of_large_images_are_of_few(side, most):
    class Large(Arrays):
        def fetch(self, rows):
            assert len(rows) == most
            return super().fetch(rows)

    examples = Large(np.full((20_000, 1, 1, 3), 7, np.uint8), np.zeros(20_000, int))
    examples.shape = (side, side, 3)
    dataset = dataset_of(examples, examples, classes=2, pad=0, flip=False)
    np.testing.assert_array_equal(dataset.mean, [7, 7, 7])


def test_constant_images_stay_finite():
    blank = Arrays(np.full((4, 2, 2, 1), 7, np.uint8), np.zeros(4, int))
    dataset = with_subset(made_of(blank, blank), train=4)
    assert (standardize(dataset.train.images, dataset) == 0).all()


# Batches.


def order(dataset, batch_size, seed, epochs=1):
    return np.concatenate([batch.labels for batch in training_batches(dataset, batch_size, seed=seed, epochs=epochs)])


def test_training_order_follows_seed_and_epoch():
    dataset = numbered(50)
    first, second = order(dataset, 8, 0, epochs=2).reshape(2, 48)
    np.testing.assert_array_equal(order(dataset, 8, 0), first)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, order(dataset, 8, 1))
    for epoch in (first, second):
        assert len(set(epoch)) == 48


def test_a_batch_is_valid_and_typed():
    batch = next(training_batches(made_of(noise(50), noise(1)), 8, seed=0, epochs=1, augmentation=ALL_CHANGES))
    chex.assert_shape(batch, [(8, 6, 5, 3), (8,), (8,)])
    chex.assert_type(batch, [np.float32, np.int32, bool])
    assert batch.valid.all()


@pytest.mark.parametrize("count", [2, 4])
def test_shards_together_see_what_one_process_would(count):
    dataset = made_of(noise(50), noise(21))
    streams = [
        lambda shard: training_batches(dataset, 8, seed=3, epochs=2, augmentation=ALL_CHANGES, shard=shard),
        lambda shard: evaluation_batches(dataset, 8, shard=shard),
    ]
    for stream in streams:
        wholes = list(stream(Shard()))
        parts = [list(stream(Shard(index, count))) for index in range(count)]
        assert [len(part) for part in parts] == [len(wholes)] * count
        for whole, *own in zip(wholes, *parts, strict=True):
            for index, batch in enumerate(own):
                chex.assert_trees_all_equal(batch, type(whole)(*(field[index::count] for field in whole)))


@pytest.mark.parametrize("steps", [1, 6, 9, 18])
def test_an_iterator_goes_on_where_another_one_stopped(steps):
    dataset = made_of(noise(50), noise(1))

    def start():
        return training_batches(dataset, 8, seed=0, epochs=3, augmentation=ALL_CHANGES)

    whole = list(start())
    stopped = start()
    seen = list(itertools.islice(stopped, steps))
    resumed = start()
    resumed.set_state(stopped.get_state())
    seen += resumed
    chex.assert_trees_all_equal(seen, whole)
    for epoch in range(3):
        labels = np.concatenate([batch.labels for batch in seen[6 * epoch : 6 * (epoch + 1)]])
        assert len(set(labels)) == 48


@pytest.mark.parametrize(
    ("examples", "batch_size", "count"), [(10_000, 192, 8), (360, 64, 1), (8, 8, 2), (3, 8, 4), (9, 4, 2)]
)
def test_evaluation_sees_every_example_once(examples, batch_size, count):
    """Partial batches were dropped or counted twice elsewhere (flax#263, #527)."""
    shards = [list(evaluation_batches(numbered(examples), batch_size, shard=Shard(i, count))) for i in range(count)]
    batches = [batch for shard in shards for batch in shard]
    assert all(len(batch.labels) == batch_size // count for batch in batches)
    seen = np.concatenate([batch.labels[batch.valid] for batch in batches])
    np.testing.assert_array_equal(np.sort(seen), np.arange(examples))


@pytest.mark.parametrize(("most", "count"), [(1, 1), (20, 20), (21, 21), (5000, 21)])
def test_first_examples_are_never_filled_up(most, count):
    images, labels, valid = first_examples(made_of(noise(1), noise(21), mean=100.0, std=50.0), most)
    np.testing.assert_array_equal(labels, np.arange(count))
    np.testing.assert_allclose(images * 50 + 100, noise(21).images[:count], atol=1e-3)
    assert valid.all()


def test_evaluation_images_are_not_augmented():
    dataset = made_of(noise(1), noise(20), mean=100.0, std=50.0)
    seen = np.concatenate([batch.images for batch in evaluation_batches(dataset, 10)])
    np.testing.assert_allclose(seen * 50 + 100, dataset.test.images, atol=1e-3)


class Source(list):
    """Stands for a source of tensorflow-datasets: a list of examples that can be had many at once."""

    def __getitems__(self, rows):
        return [self[row] for row in rows]


def test_stored_subset_is_read_on_demand():
    class Unread(Source):
        def __getitems__(self, rows):
            assert len(rows) < 10
            return super().__getitems__(rows)

    examples = noise(50)
    pairs = zip(examples.images, examples.labels, strict=True)
    source = Source({"image": image, "label": label} for image, label in pairs)
    whole = made_of(Stored(source, examples.shape, len(examples)), noise(1))
    in_memory = with_subset(made_of(examples, noise(1)), train=9, validation=10)
    source.__class__ = Unread
    part = with_subset(whole, train=9, validation=10)
    rows = np.array([3, 1])
    chex.assert_trees_all_equal(part.test.fetch(rows), in_memory.test.fetch(rows))
    chex.assert_trees_all_equal(part.train.fetch(rows), in_memory.train.fetch(rows))


@pytest.mark.slow
def test_workers_give_the_same_batches_resume_and_end():
    examples = noise(50)
    pairs = zip(examples.images, examples.labels, strict=True)
    stored = Stored(Source({"image": image, "label": label} for image, label in pairs), examples.shape, len(examples))

    def start(train, workers):
        return training_batches(
            made_of(train, noise(1)), 8, seed=0, epochs=2, augmentation=ALL_CHANGES, workers=workers
        )

    whole = list(start(examples, 0))
    streamed = start(stored, 2)
    chex.assert_trees_all_equal(list(itertools.islice(streamed, 5)), whole[:5])
    state = streamed.get_state()
    streamed.close()
    resumed = start(stored, 2)
    resumed.set_state(state)
    chex.assert_trees_all_equal(list(resumed), whole[5:])
    resumed.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("image", "label", "problem"),
    [
        (np.full((4, 4, 1), np.nan), 0, "its pixels are float64, some of them NaN or infinite; expected uint8"),
        (np.full((4, 4, 1), np.inf, np.float32), 0, "its pixels are float32, some of them NaN or infinite"),
        (np.zeros((4, 4, 1), np.float32), 0, "its pixels are float32; expected uint8"),
        (np.zeros((4, 4, 1), np.int64), 0, "its pixels are int64; expected uint8"),
        (np.zeros((4, 5, 1), np.uint8), 0, r"its image has shape (4, 5, 1); expected (4, 4, 1)"),
        (np.zeros((4, 4), np.uint8), 0, r"its image has shape (4, 4); expected (4, 4, 1)"),
        (np.zeros((4, 4, 1), np.uint8), 3, "its label is 3; expected a whole number from 0 to 2"),
        (np.zeros((4, 4, 1), np.uint8), -1, "its label is -1; expected"),
        (np.zeros((4, 4, 1), np.uint8), np.nan, "its label is nan; expected"),
        (np.zeros((4, 4, 1), np.uint8), 1.5, "its label is 1.5; expected"),
    ],
)
def test_an_example_that_cannot_be_is_named(image, label, problem):
    class Source(list):
        def __getitems__(self, rows):
            return [self[row] for row in rows]

    good = {"image": np.zeros((4, 4, 1), np.uint8), "label": 2}
    check_example(0, good["image"], good["label"], (4, 4, 1), 3)
    examples = Stored(Source([good] * 5 + [{"image": image, "label": label}]), (4, 4, 1), 3)
    examples.fetch(np.arange(5))
    with pytest.raises(DataError) as caught:
        examples.fetch(np.array([1, 5, 2]))
    assert str(caught.value).startswith(f"example 5 cannot be used: {problem}")
