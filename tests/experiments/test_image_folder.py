"""Folders of one's own images: what is found, what is refused, and training on them."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from experiments import inspect_runs, predict, train_resnet
from experiments.config import SETTINGS, Data, Experiment, changed, read_experiment
from experiments.data import DataError, load, training_batches
from experiments.data.examples import Arrays
from experiments.data.image_folder import LARGEST_SIDE, Pictures
from experiments.data.kept import FILE, check_kept, keep, read_kept

pytestmark = pytest.mark.usefixtures("standard_promotion")


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)
    return path


def gray(value, height=8, width=8):
    return np.full((height, width), value, np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Ten dark cats and ten light dogs, gray."""
    for number in range(10):
        save(tmp_path / "pets" / "cat" / f"{number}.png", gray(number))
        save(tmp_path / "pets" / "dog" / f"{number}.png", gray(200 + number))
    return tmp_path / "pets"


def move_into(folder, split):
    """Moves the classes into a split of the same folder."""
    (folder / split).mkdir()
    for name in ("cat", "dog"):
        (folder / name).rename(folder / split / name)


def read(folder, **options):
    return load(f"folder:{folder}", **options)


def values(examples):
    """The first pixel of each image with its label."""
    images, labels = examples.fetch(np.arange(len(examples)))
    return sorted(zip(images[:, 0, 0, 0].tolist(), labels.tolist(), strict=True))


# What is found.


@pytest.mark.parametrize("split", [None, "train"])
def test_a_fifth_of_each_class_is_held_out(folder, split):
    if split:
        move_into(folder, split)
    dataset = read(folder)
    assert (dataset.names, dataset.classes, dataset.train.shape) == (("cat", "dog"), 2, (8, 8, 1))
    assert np.bincount([label for _, label in values(dataset.train)]).tolist() == [8, 8]
    assert np.bincount([label for _, label in values(dataset.test)]).tolist() == [2, 2]
    everything = [(value, 0) for value in range(10)] + [(value, 1) for value in range(200, 210)]
    assert sorted(values(dataset.train) + values(dataset.test)) == everything
    again = read(folder)
    np.testing.assert_array_equal(again.test.images, dataset.test.images)
    assert dataset.description == (
        "16 images for training and 4 held out for testing, 2 classes, gray, scaled to 8x8 (--image-size)"
    )


def test_the_folder_test_is_the_test_split(folder):
    move_into(folder, "train")
    for name, value in (("cat", 50), ("dog", 250)):
        save(folder / "test" / name / "new.png", gray(value))
    dataset = read(folder)
    assert (len(dataset.train), values(dataset.test)) == (20, [(50, 0), (250, 1)])
    assert "20 images for training and 2 for testing" in dataset.description


def test_new_files_leave_most_others_in_their_split(folder):
    before = dict(values(read(folder).test))
    for number in range(10, 15):
        save(folder / "cat" / f"{number}.png", gray(number))
    after = dict(values(read(folder).test))
    assert {value for value in after if value >= 200} == {value for value in before if value >= 200}
    assert len([value for value in after if value < 200]) == 3


def test_first_test_images_are_of_all_classes(tmp_path):
    for name in ("a", "b", "c"):
        for number in range(50):
            save(tmp_path / name / f"{number}.png", gray(number))
    labels = read(tmp_path).test.labels
    assert set(labels[:10]) == {0, 1, 2}


def test_classes_named_train_and_test_are_classes(tmp_path):
    for name in ("bus", "train", "test"):
        for number in range(3):
            save(tmp_path / name / f"{number}.png", gray(number))
    assert read(tmp_path).names == ("bus", "test", "train")


def test_only_pictures_count_by_their_names(folder):
    for name in ("Thumbs.db", ".DS_Store", "readme.txt", ".hidden.png", "noending"):
        (folder / "cat" / name).write_bytes(b"no picture")
        (folder / name).write_bytes(b"no picture")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "cat" / ".thumbnails").mkdir()
    (folder / "dog" / "9.png").rename(folder / "dog" / "9.PNG")
    dataset = read(folder)
    assert (len(dataset.train) + len(dataset.test), dataset.names) == (20, ("cat", "dog"))


@pytest.mark.parametrize(
    ("sizes", "image_size", "expected"),
    [
        ([(10, 20)] * 3 + [(30, 60)] * 2, None, (10, 20)),
        ([(10, 20), (11, 23)], None, (10, 22)),
        ([(10, 20)], 16, (16, 16)),
        ([(300, 448)], None, (150, LARGEST_SIDE)),
        ([(1, 40)], None, (1, 40)),
    ],
)
def test_size_is_the_median_unless_given(tmp_path, sizes, image_size, expected):
    sizes = [sizes[0]] * 2 if len(sizes) == 1 else sizes
    for name in ("a", "b"):
        for number, size in enumerate(sizes):
            save(tmp_path / "train" / name / f"{number}.png", gray(7, *size))
        save(tmp_path / "test" / name / "large.png", gray(7, 100, 100))
    assert read(tmp_path, image_size=image_size).train.shape == (*expected, 1)


def test_size_is_that_of_the_picture_as_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a", "b"):
        for number in range(2):
            save(tmp_path / name / f"{number}.jpg", gray(7, 8, 20), exif=exif)
    assert read(tmp_path).train.shape == (20, 8, 1)


def kinds():
    """Pictures of half dark, half light; all but the last are gray."""
    seen = np.repeat([[0], [204]], [4, 4], axis=0).repeat(8, axis=1).astype(np.uint8)
    picture = Image.fromarray(seen)
    clear = Image.merge("LA", (Image.fromarray(seen * 0), Image.fromarray(255 - seen)))
    color = np.stack([seen, seen // 2, seen // 2], -1)
    exif = Image.Exif()
    exif[0x0112] = 3
    return {
        "gray.png": (picture, {}),
        "rgb.png": (picture.convert("RGB"), {}),
        "palette.png": (picture.convert("P"), {}),
        "deep.png": (Image.fromarray(seen.astype(np.uint16) * 257), {}),
        "clear.png": (clear, {}),
        "turned.png": (Image.fromarray(seen[::-1].copy()), {"exif": exif}),
        "gray.jpg": (picture, {"quality": 98}),
        "cmyk.jpg": (picture.convert("CMYK"), {"quality": 98}),
        "float.tif": (Image.fromarray(seen.astype(np.float32) / 255), {}),
        "animated.gif": (picture, {"save_all": True, "append_images": [Image.fromarray(255 - seen)]}),
        "color.png": (Image.fromarray(color), {}),
    }


@pytest.mark.parametrize("memory_limit", [2**30, 0], ids=["in memory", "decoded when fetched"])
def test_pictures_of_all_kinds_are_read_alike(tmp_path, memory_limit):
    everything = kinds()
    color = everything.pop("color.png")
    for name in ("a", "b"):
        for file, (picture, options) in everything.items():
            (tmp_path / name).mkdir(exist_ok=True)
            picture.save(tmp_path / name / file, **options)

    def columns(dataset):
        assert isinstance(dataset.train, Arrays if memory_limit else Pictures)
        images, _ = dataset.train.fetch(np.arange(len(dataset.train)))
        return images.astype(int)

    images = columns(read(tmp_path, memory_limit=memory_limit))
    assert images.shape[1:] == (8, 8, 1)
    np.testing.assert_allclose(images[:, :4], 0, atol=4)
    np.testing.assert_allclose(images[:, 4:], 204, atol=4)
    color[0].save(tmp_path / "b" / "color.png")
    dataset = read(tmp_path, memory_limit=memory_limit)
    images = np.concatenate([columns(dataset), dataset.test.fetch(np.arange(len(dataset.test)))[0]])
    assert images.shape[1:] == (8, 8, 3)
    assert "color" in dataset.description
    np.testing.assert_allclose(images[:, 4:, :, 0], 204, atol=4)
    np.testing.assert_allclose(np.sort(images[:, 6, 2, 1])[0], 102, atol=4)


def test_in_memory_and_fetched_images_are_equal(folder):
    whole, fetched = read(folder), read(folder, memory_limit=0)
    assert isinstance(fetched.train, Pictures)
    rows = np.array([5, 1, 1])
    for one, other in ((whole.train, fetched.train), (whole.test, fetched.test)):
        for values_of_one, values_of_other in zip(one.fetch(rows % 4), other.fetch(rows % 4), strict=True):
            np.testing.assert_array_equal(values_of_one, values_of_other)
    batch = next(training_batches(fetched, 8, seed=0, epochs=1))
    np.testing.assert_array_equal(batch.images, next(training_batches(whole, 8, seed=0, epochs=1)).images)
    (folder / "cat" / "1.png").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"1\.png is not an image file"):
        fetched.train.fetch(np.arange(16)), fetched.test.fetch(np.arange(4))


def test_gray_images_count_as_gray_for_memory(folder):
    assert isinstance(read(folder, memory_limit=20 * 64).train, Arrays)
    assert isinstance(read(folder, memory_limit=20 * 64 - 1).train, Pictures)


def test_images_are_shifted_by_an_eighth_not_mirrored(tmp_path):
    for name in ("a", "b"):
        for number in range(2):
            save(tmp_path / name / f"{number}.png", gray(7, 24, 40))
    dataset = read(tmp_path)
    assert (dataset.pad, dataset.flip) == (3, False)


# What is refused.


def test_all_problems_are_named_at_once(folder):
    move_into(folder, "train")
    for name in ("cat", "empty", "extra"):
        (folder / "test" / name).mkdir(parents=True)
    save(folder / "test" / "cat" / "1.png", gray(3))
    (folder / "train" / "empty").mkdir()
    save(folder / "train" / "single" / "1.png", gray(3))
    save(folder / "train" / "lost.png", gray(3))
    (folder / "train" / "dog" / "more").mkdir()
    (folder / "val").mkdir()
    whole = (folder / "train" / "cat" / "3.png").read_bytes()
    (folder / "train" / "cat" / "3.png").write_bytes(whole[: len(whole) // 2])
    (folder / "train" / "cat" / "4.png").write_text("no image")
    with pytest.raises(DataError) as caught:
        read(folder, batch_size=64)
    text = str(caught.value)
    assert text.startswith(f"{folder} cannot be trained on: ")
    assert text.endswith("; and 2 more")  # than ten
    for problem in (
        "val beside train; expected test, with a folder for each class",
        "21 training images do not fill a batch of 64 (--batch-size)",
        f"{folder}/train/dog/more is a folder",
        f"{folder}/train/empty has no pictures; expected at least two",
        f"{folder}/train/single has a single picture; expected at least two",
        f"{folder}/test/dog has no pictures",
        f"{folder}/test/extra is a class without training images",
        f"{folder}/train/lost.png lies in no class's folder",
    ):
        assert problem in text


def test_damaged_files_and_small_batches_are_named(folder):
    whole = (folder / "cat" / "3.png").read_bytes()
    (folder / "cat" / "3.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cat" / "4.jpg").write_text("no image")
    (folder / "dog" / "gone.png").symlink_to(folder / "nowhere")
    (folder / "dog" / "0.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        read(folder, batch_size=64)
    text = str(caught.value)
    assert "18 training images do not fill a batch of 64 (--batch-size)" in text
    for file in ("cat/3.png", "cat/4.jpg", "dog/gone.png", "dog/0.png"):
        assert f"{folder}/{file}" in text
    assert "more" not in text


def test_folders_without_classes_are_refused(folder, tmp_path):
    for path in (tmp_path / "nowhere", folder / "cat" / "1.png"):
        with pytest.raises(DataError, match=f"{path} is not a folder; expected PATH/train/CLASS"):
            read(path)
    with pytest.raises(DataError, match=r"cat holds no classes; expected PATH/train/CLASS"):
        read(folder / "cat")
    shutil.rmtree(folder / "dog")
    with pytest.raises(DataError, match="there is one class, cat; expected at least two"):
        read(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "folder:"}, "dataset folder: names no folder; expected folder:PATH"),
        ({"dataset": "imagenet"}, "unknown dataset 'imagenet'; expected one of digits, .*, folder:PATH"),
        ({"dataset": "digits", "image_size": 8}, "image_size belongs to folder:PATH, not to digits; leave it out"),
        ({"dataset": "folder:pets", "image_size": 0}, "image_size must be at least 1, got 0"),
    ],
)
def test_bad_settings_of_folders_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Data(**settings).check()


def test_program_refuses_a_bad_folder_in_one_line(folder, tmp_path, refused):
    (folder / "cat" / "3.png").write_text("no image")
    (folder / "dog" / "new\nline.png").write_text("no image")
    refused(
        train_resnet,
        *("--dataset", f"folder:{folder}", "--model", "mlp5", "--workdir", tmp_path / "run", "--no-compare"),
        message="17 training images do not fill a batch of 64 (--batch-size); ",
    )
    assert not (tmp_path / "run" / SETTINGS).exists()


# What a run keeps.


def test_a_path_is_kept_whole(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("pets", "./pets/", "~/pets", folder):
        assert Data(dataset=f"folder:{path}").dataset == f"folder:{folder}"
    config = changed(Experiment(), dataset="folder:pets", batch_size=8)
    train_resnet.prepare_workdir(tmp_path / "run", config)
    monkeypatch.chdir("/")
    assert read_experiment(tmp_path / "run") == config
    assert config.recipe.data.dataset == f"folder:{folder}"


def test_kept_data_say_what_was_trained_on(folder, tmp_path):
    dataset, name = read(folder), f"folder:{folder}"
    keep(tmp_path, name, dataset)
    keep(tmp_path, name, dataset)
    keep(tmp_path, "folder:other", dataset)
    kept = read_kept(tmp_path, name)
    assert (kept.names, kept.classes, kept.train.shape) == (dataset.names, 2, (8, 8, 1))
    assert (len(kept.train), len(kept.test)) == (16, 4)
    np.testing.assert_array_equal(kept.mean, dataset.mean)
    np.testing.assert_array_equal(kept.std, dataset.std)
    keep(tmp_path / "nowhere", "digits", load("digits"))


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "another size"])
def test_changed_folders_are_seen(folder, tmp_path, change):
    name, dog = f"folder:{folder}", folder / "dog" / "1.png"
    keep(tmp_path, name, read(folder))
    if change == "added":
        save(folder / "dog" / "new.png", gray(3))
    elif change == "removed":
        dog.unlink()
    elif change == "renamed":
        dog.rename(folder / "dog" / "1b.png")
    else:
        dog.write_bytes(dog.read_bytes() + b"\0")
    for look in (keep, check_kept):
        with pytest.raises(ValueError, match=r"holds results on other images: files in folder:.* were added, removed"):
            look(tmp_path, name, read(folder))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"NAME": 3}', '{"NAME": {"counts": [1, 2]}}'])
def test_damaged_kept_data_are_refused(tmp_path, text):
    (tmp_path / FILE).write_text(text.replace("NAME", "folder:x"))
    with pytest.raises(ValueError, match=r"data\.json does not hold what a run keeps of its images"):
        read_kept(tmp_path, "folder:x")


@pytest.mark.slow
def test_a_run_on_a_folder_predicts_names(folder, tmp_path, run_main, refused, monkeypatch):
    for number in range(10, 40):
        save(folder / "cat" / f"{number}.png", gray(number))
        save(folder / os.fsdecode(b"d\xf8g $x$") / f"{number}.png", gray(200 + number, 9, 9))
    (folder / "dog").rename(tmp_path / "dog")
    workdir = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    command = (
        *("--dataset", "folder:pets", "--model", "mlp5", "--norm", "none", "--batch-size", "8", "--epochs", "6"),
        *("--no-compare", "--workdir", workdir),
    )
    status, output = run_main(train_resnet, *command)
    assert status == 0, output.err
    said = "56 images for training and 14 held out for testing, 2 classes, gray, scaled to 8x8 (--image-size)"
    assert output.err.splitlines()[0] == f"train_resnet.py: {said}"
    accuracy = re.search(r"test_accuracy=([0-9.]+)", output.out).group(1)
    assert float(accuracy) > 0.9
    monkeypatch.chdir("/")
    status, output = run_main(predict, workdir)
    assert (status, output.out) == (0, f"accuracy={accuracy} examples=14 split=test\n")
    assert run_main(inspect_runs, workdir)[0] == 0
    files = [save(tmp_path / "a.png", gray(5)), save(tmp_path / "b.png", gray(230))]

    def names():
        status, output = run_main(predict, workdir, *files)
        assert (status, output.err) == (0, "")
        return [re.search(r": class (.*), probability", line).group(1) for line in output.out.splitlines()]

    assert names() == ["cat", "d\\udcf8g $x$"]
    monkeypatch.chdir(tmp_path)
    save(folder / "cat" / "new.png", gray(3))
    for program, arguments in ((train_resnet, command), (predict, [workdir]), (inspect_runs, [workdir])):
        refused(program, *arguments, message=f"files in folder:{folder} were added, removed or changed since")
    shutil.rmtree(folder)
    assert names() == ["cat", "d\\udcf8g $x$"]
    assert list(json.loads((workdir / FILE).read_text())) == [f"folder:{folder}"]
