"""Forms in results are labels; one table says which objects they mean."""

import dataclasses

import pytest

from anact_jax import Published, Standardized
from experiments.config import FormSettings
from experiments.forms import LABELS, form_named, label_named, label_of


@pytest.mark.parametrize("label", LABELS)
def test_labels_settings_and_forms_agree(label):
    form = LABELS[label]
    assert form_named(label) == form
    assert label_of(form) == label
    settings = FormSettings.of(form)
    settings.check()
    assert settings.chosen == form


def test_words_mean_the_two_forms():
    assert (form_named("default"), form_named("published")) == (Standardized(), Published())
    assert label_named("default") == "forward+center+unit+diff+feature+level0.5"
    assert label_named("published") == "mean"
    assert label_named("mean+unit") == "mean+unit"


def test_form_without_label_is_labelled_by_its_call():
    form = Standardized(std=0.3)
    assert eval(label_of(form)) == form


@pytest.mark.parametrize("gone", ["mean+center+unit+diff+feature+nu0.1", "exact", "default+nu0.1", ""])
def test_gone_forms_name_their_last_commit(gone):
    with pytest.raises(ValueError, match=rf"unknown form '{gone.replace('+', '[+]')}'; .* commit 517581d is the last"):
        form_named(gone)


def test_center_is_what_the_form_has():
    assert FormSettings(form="published").chosen == Published()
    assert FormSettings(form="published", center=True).chosen == Published(center=True)
    assert FormSettings().chosen == Standardized()
    assert FormSettings(center=False, axis=None).chosen == Standardized(center=False, axis=None)


def test_every_option_of_a_form_is_a_setting():
    options = {field.name for form in (Standardized, Published) for field in dataclasses.fields(form)}
    assert options - {field.name for field in dataclasses.fields(FormSettings)} == {"epsilon"}
