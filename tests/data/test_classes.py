"""Which of two classes is positive: what the names say, what the user says, or a question."""

import re

import pytest

from fedjax_med.core.errors import UserError
from fedjax_med.data.classes import order_classes
from tests.data.folders import fill, load


@pytest.mark.parametrize(
  ("negative", "positive"),
  [
    ("no", "yes"),
    ("non-COVID", "COVID"),
    ("nonCOVID", "COVID"),
    ("notumor", "tumor"),
    ("CT_NonCOVID", "CT_COVID"),
    ("No_DR", "DR"),
    ("No Finding", "Effusion"),
    ("Normal", "Glaucoma"),
    ("NORMAL", "COVID19"),
    ("Healthy", "Brain Tumor"),
    ("Uninfected", "Parasitized"),
    ("not fractured", "fractured"),
    ("NotMelanoma", "Melanoma"),
    ("negative", "Mpox"),
    ("0_normal", "1_abnormal"),
    ("1_normal", "0_tumour"),
    ("control", "AD"),
    ("WT", "mutant"),
    ("benign", "malignant"),
    ("healthy", "unhealthy"),
    ("normal", "not normal"),
    ("tumor_negative", "tumor_positive"),
    ("0", "1"),
    ("class0", "class1"),
    ("正常", "腫瘍"),
    ("disease_free", "relapse"),
    ("tumour-free", "tumour"),
    ("False", "True"),
  ],
)
def test_the_class_that_sounds_negative_comes_first(negative, positive):
  assert order_classes([negative, positive]) == (negative, positive)
  assert order_classes([positive, negative]) == (negative, positive)


@pytest.mark.parametrize(
  "names",
  [
    ("cats", "dogs"),
    ("HGG", "LGG"),
    ("1", "2"),
    ("benign", "normal"),
    ("CAP", "COVID"),
    ("clear_cell", "papillary"),
    ("nonunion", "union"),
    ("stable", "unstable"),
    ("COVID+", "COVID-"),
    ("NB", "WT"),
    ("infected_treated", "relapse"),
    ("false_positive", "true_positive"),
  ],
)
def test_two_names_that_do_not_say_it_are_asked_for(names):
  with pytest.raises(UserError, match=re.escape(f"'{names[0]}' and '{names[1]}' do not say")):
    order_classes(names)
  assert order_classes(names, names[0]) == (names[1], names[0])
  assert order_classes(names, names[1]) == names


def test_the_user_is_believed_against_the_names():
  assert order_classes(["normal", "tumour"], "normal") == ("tumour", "normal")


def test_more_than_two_classes_have_no_positive_one():
  assert order_classes(["yes", "no", "maybe"]) == ("maybe", "no", "yes")
  with pytest.raises(UserError, match=r"with 3 classes .* averages over all classes; leave"):
    order_classes(["yes", "no", "maybe"], "yes")


def test_a_positive_class_that_is_not_there_is_refused():
  with pytest.raises(UserError, match=r"data\.positive='DRs' is none of the classes DR and No_DR"):
    order_classes(["DR", "No_DR"], "DRs")


@pytest.mark.parametrize("names", [("Benign", "benign"), ("No_DR", "no dr", "DR")])
def test_classes_that_differ_in_spelling_only_are_refused(names):
  with pytest.raises(UserError, match="differ in case, spaces or punctuation only; give them one"):
    order_classes(names)


def test_labels_follow_the_chosen_class(tmp_path):
  fill(tmp_path, "cats/0.png", "dogs/0.png", "dogs/1.png")
  dataset = load(tmp_path, positive="cats")
  assert dataset.class_names == ("dogs", "cats")
  assert [dataset.class_names[label] for label in dataset.labels] == [
    name.split("/")[0] for name in dataset.names
  ]
