import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image
from test_train_resnet import DATASET, config, small_model

from anact_jax import DEFAULT
from anact_jax.closed import BEHIND_BATCH_NORM
from experiments import predict, train_resnet
from experiments.config import SETTINGS, Experiment, read_experiment
from experiments.data import load
from experiments.predict import make_classifier, read_image
from experiments.training.steps import make_steps

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def classify():
    with jax.numpy_dtype_promotion("standard"):
        state = make_steps(small_model(), config(), DATASET).create(0, 0.1)
        yield make_classifier(small_model(), state.variables, DATASET, batch_size=16)


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


def test_settings_come_back_as_they_were_written(tmp_path):
    form = "forward+center+unit"
    config = Experiment(model="mlp5", form=form, data_dir=tmp_path, workdir=tmp_path, train_images=100)
    train_resnet.prepare_workdir(tmp_path, config)
    assert read_experiment(tmp_path) == config
    train_resnet.prepare_workdir(tmp_path, dataclasses.replace(config, form="default"))
    assert read_experiment(tmp_path).form == str(BEHIND_BATCH_NORM)  # spelled out: the default may change
    train_resnet.prepare_workdir(tmp_path, dataclasses.replace(config, form="default", norm="none"))
    assert read_experiment(tmp_path).form == str(DEFAULT)


def test_settings_from_before_there_was_a_closed_form_mean_the_measured_one(tmp_path):
    config = Experiment(behind="measured")
    saved = json.loads(config.to_json())
    del saved["behind"], saved["mixup"]
    (tmp_path / SETTINGS).write_text(json.dumps(saved))
    assert read_experiment(tmp_path).recipe == config.recipe


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path, run_main):
    for make, message in ((lambda: None, "No such file"), (lambda: write(tmp_path), "has no checkpoint yet")):
        make()
        status, output = run_main(predict, tmp_path)
        assert status == 2
        assert message in output.err
        assert output.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def write(workdir):
    train_resnet.prepare_workdir(workdir, Experiment(model="mlp5", epochs=2))


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
