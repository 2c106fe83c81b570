import dataclasses
import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import small_dataset, small_experiment, small_model
from PIL import Image

from anact_jax import Published, Standardized
from experiments import inspect_runs, predict, train_resnet
from experiments.config import SETTINGS, Experiment, FormSettings, as_today, changed, read_experiment
from experiments.data import load
from experiments.networks import make_layers
from experiments.networks.mlp import MLP
from experiments.predict import look_inverted, make_classifier, read_image
from experiments.training.load_run import TrainedRun
from experiments.training.steps import make_steps

DATASET = small_dataset()

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def classify():
    with jax.numpy_dtype_promotion("standard"):
        state = make_steps(small_model(), small_experiment().recipe.training, DATASET).create(0, 0.1)
        yield make_classifier(small_model(), state.variables, DATASET, batch_size=16)


@pytest.fixture
def untrained(monkeypatch, tmp_path):
    """The folder of a run on the digits, as `predict` finds it, whose network has its initial weights."""
    digits = load("digits")
    model = MLP(make_layers("nswish", "none"), classes=10, depth=2, width=16)
    state = make_steps(model, small_experiment().recipe.training, digits).create(0, 0.1)
    monkeypatch.setattr(
        predict, "load_run", lambda *args, **options: TrainedRun(small_experiment(), digits, model, state, state)
    )
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def save_digit(path, row=3, negative=False):
    grey = np.rint(load("digits").test.images[row, ..., 0] / 16 * 255).astype(np.uint8)
    Image.fromarray(255 - grey if negative else grey).save(path, "PNG")
    return path


def test_one_image_gets_the_same_as_among_many(classify):
    images = DATASET.test.images[:40]
    together = classify(images)
    assert together.shape == (40, 2)
    np.testing.assert_allclose(together.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(np.concatenate([classify(images[row : row + 1]) for row in range(40)]), together)
    np.testing.assert_array_equal(classify(images[7:23]), together[7:23])


def test_an_image_file_is_read_as_the_data_set_has_it(tmp_path):
    digits = load("digits")
    image = digits.test.images[3]
    Image.fromarray(np.rint(image[..., 0] / 16 * 255).astype(np.uint8)).save(tmp_path / "digit.png")
    np.testing.assert_array_equal(read_image(tmp_path / "digit.png", digits), image)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png is not an image file"):
        read_image(tmp_path / "text.png", digits)


@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_is_read_as_its_exif_tag_turns_it(tmp_path, orientation, ending):
    stored_as = {  # the tag says how to get from what is stored to what is seen
        1: lambda seen: seen,
        2: np.fliplr,
        3: lambda seen: np.rot90(seen, 2),
        4: np.flipud,
        5: np.transpose,
        6: np.rot90,
        7: lambda seen: np.rot90(seen, 2).T,
        8: lambda seen: np.rot90(seen, -1),
    }[orientation]
    digits, exif = load("digits"), Image.Exif()
    seen = np.zeros((64, 64), np.uint8)
    seen[:16, :40] = 255
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored_as(seen))).save(tmp_path / f"phone.{ending}", exif=exif, quality=98)
    Image.fromarray(seen).save(tmp_path / "seen.png")
    found, expected = (read_image(tmp_path / name, digits) for name in (f"phone.{ending}", "seen.png"))
    np.testing.assert_allclose(found.astype(int), expected, atol=1)


@pytest.mark.parametrize("kind", ["16 bits", "transparent", "palette"])
def test_any_sort_of_image_is_read_by_its_brightness(tmp_path, kind):
    digits = load("digits")
    grey = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    image = {
        "16 bits": Image.fromarray(grey.astype(np.uint16) * 257),
        "transparent": Image.merge("LA", (Image.fromarray(grey * 0), Image.fromarray(255 - grey))),  # black on nothing
        "palette": Image.fromarray(grey).convert("P"),
    }[kind]
    image.save(tmp_path / "image.png")
    found = read_image(tmp_path / "image.png", digits)[..., 0]
    np.testing.assert_allclose(found, grey / 255 * 16, atol=0.6)


@pytest.mark.parametrize(
    ("dtype", "white"),
    [(np.float32, 1), (np.float32, 255), (np.float32, 65535), (np.int32, 255), (np.int32, 65535), (np.uint16, 255)],
)
def test_white_of_deep_pixels_is_found(tmp_path, dtype, white):
    digits = load("digits")
    grey = np.linspace(0, 1, 64).reshape(8, 8)
    Image.fromarray((grey * white).astype(dtype)).save(tmp_path / "image.tif")
    found = read_image(tmp_path / "image.tif", digits)[..., 0]
    np.testing.assert_allclose(found, grey * 16, atol=0.6)
    np.testing.assert_array_equal(read_image(tmp_path / "image.tif", digits, invert=True)[..., 0], found[::-1, ::-1])


def test_values_that_interpolation_added_are_cut(tmp_path):
    Image.fromarray(np.tile(np.float32([-0.04, 1.06]), (8, 4))).save(tmp_path / "image.tif")
    found = read_image(tmp_path / "image.tif", load("digits"))[..., 0]
    np.testing.assert_array_equal(found, np.tile([0, 16], (8, 4)))


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (np.float32([-1, 1]), "-1 to 1"),
        (np.float32([np.nan, 1]), "nan to nan"),
        (np.float32([0, np.inf]), "0 to inf"),
        (np.int32([0, 100_000]), "0 to 100000"),
    ],
)
def test_pixels_of_unknown_range_are_refused(tmp_path, pixels, said):
    Image.fromarray(np.tile(pixels, (8, 4))).save(tmp_path / "image.tif")
    with pytest.raises(
        ValueError, match=rf"image\.tif cannot .*\(its pixels go from {said}; expected from 0 to 1, 255"
    ):
        read_image(tmp_path / "image.tif", load("digits"))


def test_negatives_are_told_from_images():
    digits = load("digits")
    images = digits.test.images
    assert not look_inverted(images, digits).any()
    assert look_inverted(16 - images, digits).all()
    grey_paper = (12 - images.clip(max=12)).astype(np.uint8)
    assert look_inverted(grey_paper, digits).mean() > 0.9
    noise = DATASET.test.images  # borders of any brightness: nothing can be said
    assert look_inverted(255 - noise, DATASET).mean() < 0.05


def test_images_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    digits = load("digits")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.png cannot be read as an image"):
        read_image(tmp_path / "cut.png", digits)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"whole\.png cannot be read as an image \(Image size"):
        read_image(tmp_path / "whole.png", digits)


def test_a_name_of_any_bytes_costs_no_line(tmp_path, run_main, untrained):
    files = [
        save_digit(tmp_path / os.fsdecode(name), row) for row, name in enumerate((b"0.png", b"\xff.png", b"2.png"))
    ]
    status, output = run_main(predict, untrained, *files)
    assert (status, output.err) == (0, "")
    names = [line.partition(": class")[0] for line in output.out.splitlines()]
    assert names == [str(tmp_path / name) for name in ("0.png", "\\udcff.png", "2.png")]


def test_classes_are_printed_by_name(tmp_path, run_main, untrained, monkeypatch):
    run, file = predict.load_run(untrained), save_digit(tmp_path / "digit.png")

    def printed():
        return re.search(r": class (.*), probability", run_main(predict, untrained, file)[1].out).group(1)

    number = int(printed())
    names = tuple(f"number {row}" for row in range(10))
    named = run._replace(dataset=dataclasses.replace(run.dataset, names=names))
    monkeypatch.setattr(predict, "load_run", lambda *args, **options: named)
    assert printed() == f"number {number}"


def test_negatives_are_named_and_inverted_when_asked(tmp_path, run_main, untrained):
    light, dark = save_digit(tmp_path / "light.png"), save_digit(tmp_path / "dark.png", negative=True)

    def classes(*arguments):
        status, output = run_main(predict, untrained, *arguments)
        assert status == 0
        return [line.partition(": ")[2] for line in output.out.splitlines()], output.err

    (of_light, of_dark), said = classes(light, dark)
    assert of_light != of_dark
    assert said == (
        f"predict.py: beside the training images, light and dark look swapped in {dark}; --invert swaps them\n"
    )
    assert classes(dark, "--invert") == ([of_light], "")
    assert classes(light) == ([of_light], "")
    (of_both, _), said = classes(light, light, "--invert")
    assert of_both == of_dark
    assert said.endswith(f"look swapped in {light}, {light}; leave out --invert?\n")


def test_read_only_run_prints_its_accuracy(run_main, untrained):
    (untrained / "confusion.png").mkdir()  # stands for a folder of somebody else's: it cannot be written either
    status, output = run_main(predict, untrained)
    assert status == 0
    assert re.fullmatch(r"accuracy=0\.\d{4} examples=360 split=test\n", output.out)
    assert output.err.startswith("predict.py: no picture, which --output can put elsewhere: ")
    assert output.err.count("\n") == 1
    elsewhere = untrained.parent / "new" / "picture.svg"
    status, output = run_main(predict, untrained, "--output", elsewhere)
    assert (status, output.err) == (0, f"predict.py: the picture is {elsewhere}\n")
    assert "<svg" in elsewhere.read_text()


def test_a_picture_that_fails_costs_no_accuracy(monkeypatch, run_main, untrained):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(predict, "draw_confusion", full)
    status, output = run_main(predict, untrained)
    assert status == 1
    assert output.out.startswith("accuracy=")
    assert output.err == "predict.py: no picture: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "picture.txt"], "output must end in one of .png, .pdf, .svg, .jpg, .webp, got picture.txt"),
        (["--output", "picture"], "output must end in one of"),
        (["--output", "/dev/null/new/picture.png"], "Not a directory"),
        (["--output", "folder.png"], "Is a directory"),
        (["image.png", "--output", "picture.png"], "output is for the picture of a split"),
        (["--invert"], "invert is for image files, and none are given"),
    ],
)
def test_settings_are_checked_before_the_run_is_read(arguments, message, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    monkeypatch.setattr(predict, "load_run", lambda *_, **__: pytest.fail("the run was read"))
    refused(predict, tmp_path, *arguments, message=message)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_data_folder_is_found_from_anywhere(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    workdir = tmp_path / "run"
    train_resnet.prepare_workdir(workdir, changed(Experiment(), dataset="mnist", model="mlp5", data_dir=Path("data")))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    refused(predict, workdir, message=f"mnist is not prepared in {tmp_path / 'data' / 'mnist'}")
    other = tmp_path / "other"
    refused(predict, workdir, "--data-dir", other, message=f"mnist is not prepared in {other / 'mnist'}")
    refused(inspect_runs, workdir, "--data-dir", other, message=f"mnist is not prepared in {other / 'mnist'}")


def test_settings_come_back_as_they_were_written(tmp_path):
    config = changed(Experiment(), model="mlp5", data_dir=tmp_path, workdir=tmp_path, train_images=100)
    for form in ({"std": 1.0, "axis": None}, {"center": False}, {"form": "published", "learned": True}):
        config = changed(config, **dataclasses.asdict(FormSettings()) | form)
        train_resnet.prepare_workdir(tmp_path, config)
        assert read_experiment(tmp_path) == config
        config.check_same_run(json.loads(config.to_json()), tmp_path)
        with pytest.raises(ValueError, match=r"other settings: form '.*', now 'mean\+center'"):
            other = changed(config, **dataclasses.asdict(FormSettings("published", center=True)))
            other.check_same_run(json.loads(config.to_json()), tmp_path)


def as_before(config, form):
    """The settings of a run as they were written when a form was a text."""
    settings = as_today(json.loads(config.to_json()), Path())
    others = {name: value for name, value in settings.items() if not hasattr(FormSettings, name)}
    return others | {"form": form, "behind": "measured", "keep": 3, "group_size": 8}


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("forward+center+unit+diff+feature+level0.5", Standardized()),
        ("mean", Published()),
        ("mean+learned", Published(learned=True)),
        ("forward+center+unit", Standardized(std=1.0, axis=None, stop_gradient=True)),
    ],
)
def test_old_text_of_a_form_is_read(tmp_path, text, form):
    saved = as_before(Experiment(), text)
    (tmp_path / SETTINGS).write_text(json.dumps(saved))
    found = read_experiment(tmp_path)
    assert found.recipe.network.form.chosen == form
    found.check_same_run(saved, tmp_path)


def test_plain_runs_of_old_are_read(tmp_path):
    config = changed(Experiment(), activation="swish")
    (tmp_path / SETTINGS).write_text(json.dumps(as_before(config, None)))
    assert read_experiment(tmp_path) == config


@pytest.mark.parametrize(
    ("program", "option"), [(predict, ()), (inspect_runs, ()), (train_resnet, ("--no-compare", "--config"))]
)
def test_run_of_a_gone_form_names_its_last_commit(tmp_path, program, option, refused):
    saved = as_before(Experiment(), "mean+center+unit")
    (tmp_path / SETTINGS).write_text(json.dumps(saved))
    refused(program, *option, tmp_path, message="commit 517581d is the last that runs them")
    with pytest.raises(ValueError, match=r"form 'mean\+center\+unit', now 'forward"):
        Experiment().check_same_run(saved, tmp_path)


@pytest.mark.parametrize("old", [{"behind": "measured"}, {"behind": None}, {}])
def test_settings_of_old_runs_are_read(tmp_path, old):
    config = Experiment()
    saved = as_today(json.loads(config.to_json()), tmp_path) | old
    del saved["mixup"]
    (tmp_path / SETTINGS).write_text(json.dumps(saved))
    assert read_experiment(tmp_path).recipe == config.recipe
    config.check_same_run(saved, tmp_path)


@pytest.mark.parametrize(
    ("program", "option"), [(predict, ()), (inspect_runs, ()), (train_resnet, ("--no-compare", "--workdir"))]
)
def test_a_run_in_closed_form_names_its_last_commit(tmp_path, program, option, refused):
    saved = json.loads(Experiment().to_json()) | {"behind": "closed"}
    (tmp_path / SETTINGS).write_text(json.dumps(saved))
    message = (
        "took its factors from the parameters of batch normalization (behind 'closed'); commit e6f5b91 is the last"
    )
    refused(program, *option, tmp_path, message=f"{tmp_path} {message} that reads it")


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path, run_main):
    for make, message in ((lambda: None, "No such file"), (lambda: write(tmp_path), "has no checkpoint yet")):
        make()
        status, output = run_main(predict, tmp_path)
        assert status == 2
        assert message in output.err
        assert output.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def write(workdir):
    train_resnet.prepare_workdir(workdir, changed(Experiment(), model="mlp5", epochs=2))


@pytest.mark.slow
def test_a_run_classifies_its_test_split_and_files(tmp_path, run_main):
    workdir = tmp_path / "run"
    status, output = run_main(train_resnet, "--model", "mlp5", "--epochs", "3", "--no-compare", "--workdir", workdir)
    assert status == 0
    accuracy = re.search(r"test_accuracy=([0-9.]+)", output.out).group(1)
    for batch_size in ("1", "256"):
        status, output = run_main(predict, workdir, "--batch-size", batch_size)
        assert (status, output.out) == (0, f"accuracy={accuracy} examples=360 split=test\n")
    assert (workdir / "confusion.png").read_bytes().startswith(b"\x89PNG")
    digits, files = load("digits"), []
    for row in range(20):
        files.append(tmp_path / f"{row}.png")
        Image.fromarray(np.rint(digits.test.images[row, ..., 0] / 16 * 255).astype(np.uint8)).save(files[-1])
    status, output = run_main(predict, workdir, *files, "--best")
    found = [int(re.search(r"class (\d+)", line).group(1)) for line in output.out.splitlines()]
    assert np.mean(np.array(found) == digits.test.labels[:20]) > 0.85
    status, output = run_main(predict, workdir, files[0])
    assert output.out.splitlines()[0].startswith(f"{files[0]}: class {found[0]}, probability 0.")
