"""Class, site, patient and side are read off the places that files have, and never guessed."""

import dataclasses
import itertools
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_med.core.config import Config
from fedjax_med.core.errors import UserError
from fedjax_med.data.dataset import client_rows
from fedjax_med.data.folder_patterns import matcher
from fedjax_med.data.hospitals import build_hospitals
from tests.data.folders import fill, load, pattern, save


@pytest.mark.parametrize(
  ("layout", "place", "expected"),
  [
    ("{class}", "yes/a.png", {"class": "yes"}),
    ("{class}", "yes/deep/er/a.png", {"class": "yes"}),
    ("{site}/{class}/*", "n/yes/a.png", {"site": "n", "class": "yes"}),
    ("{site}/{class}/{patient}_*", "n/yes/P1_2_3.png",
     {"site": "n", "class": "yes", "patient": "P1"}),
    ("{site}/{class}/{patient}_*", "n/yes/P1.png", {}),
    ("{patient}/{class}/*", "P 7/0/a.b.png", {"patient": "P 7", "class": "0"}),
    ("{class}/{patient}", "a/P1.2.png", {"class": "a", "patient": "P1.2"}),
    ("{class}/{patient}", "a/P1/x.png", {"class": "a", "patient": "P1"}),
    ("{class}_{patient}", "cat_12.jpeg", {"class": "cat", "patient": "12"}),
    ("images/{class}/*", "images/a/1.png", {"class": "a"}),
    ("images/{class}/*", "masks/a/1.png", {}),
    ("{class}/*.png", "a/1.png", {"class": "a"}),
    ("{class}/*.png", "a/1.jpg", {}),
    ("{class}/**/{patient}-*", "a/x/y/P-1.png", {"class": "a", "patient": "P"}),
    ("{class}/**/{patient}-*", "a/P-1.png", {"class": "a", "patient": "P"}),
    ("{patient}/{class}/{patient}_*", "7/a/7_1.png", {"patient": "7", "class": "a"}),
    ("{patient}/{class}/{patient}_*", "7/a/8_1.png", {}),
    ("{split}/{class}", "train/a/1.png", {"split": "train", "class": "a"}),
    ("{class}[1]/*", "a[1]/1.png", {"class": "a"}),
  ],
)  # fmt: skip
def test_a_layout_reads_these_parts(layout, place, expected):
  assert matcher(layout)(tuple(place.split("/"))) == expected


NAME = st.text(string.ascii_letters + string.digits + " -.äß", min_size=1, max_size=8)


@given(NAME, NAME, NAME, NAME)
def test_what_is_written_by_a_layout_is_read_back(site, class_name, patient, rest):
  place = (site, class_name, f"{patient}_{rest}.png")
  found = matcher("{site}/{class}/{patient}_*")(place)
  assert found == {"site": site, "class": class_name, "patient": patient}


@pytest.mark.parametrize(
  ("layout", "sentence"),
  [
    ("{klass}/*", r"\{klass\} is unknown; did you mean 'class'"),
    ("{site}/*", r"does not say where the class is; put \{class\}"),
    ("/{class}", "is not a pattern"),
    ("{class}/", "is not a pattern"),
    ("{class", "is not a pattern"),
    ("../{class}", "is not a pattern"),
    ("{class}//*", "is not a pattern"),
    ("{class}{patient}_*", "is not a pattern"),
    ("", "is not a pattern"),
  ],
)
def test_a_wrong_layout_is_refused_before_anything_is_read(tmp_path, layout, sentence):
  with pytest.raises(UserError, match=rf"^data\.layout='.*{sentence}"):
    load(tmp_path / "nowhere", layout=layout)


def product(*levels: str) -> list[str]:
  """Places of pictures: every combination of the names of each level."""
  return ["/".join(names) for names in itertools.product(*(level.split() for level in levels))]


PARTS = product("train val test", "NORMAL PNEUMONIA", "0.png 1.png 2.png")
SITES = product("north south east", "benign malignant", "0.png 1.png 2.png 3.png")
PATIENTS = product(" ".join(f"{n}" for n in range(100, 114)), "0 1", "a.png b.png")
# A patient with one class: no class stands under most of them.
ONE_CLASS = [f"{n}/{('no', 'yes')[n % 2]}/{k}.png" for n in range(8) for k in range(2)]


@pytest.mark.parametrize(
  ("places", "layout"),
  [
    (PARTS, "{split}/{class}/*"),
    (product("Training Testing", "glioma pituitary none", "0.png 1.png"), "{split}/{class}/*"),
    (SITES, "{site}/{class}/*"),
    (PATIENTS, "{patient}/{class}/*"),
    (ONE_CLASS, "{site}/{class}/*"),
    (product("no yes", "north south", "0.png"), "{class}/{site}/*"),
    (product("no yes", "train test", "0.png"), "{class}/{split}/*"),
    (product("images masks", "no yes", "0.png"), "images/{class}/*"),
    (
      product("north west south", "P1 P2", "benign malignant", "0.png"),
      "{site}/{patient}/{class}/*",
    ),
    (["north/benign/0.png", "west/malignant/0.png", "south/benign/0.png"], "{site}/{class}/*"),
    (["a/benign/0.png", "a/malignant/0.png", "b/benign/0.png"], "{site}/{class}/*"),
    (product("trainset testset valset", "no_1.png yes_1.png"), "{split}/{class}_*"),
    (product("hospital_A hospital_B hospital_C", "no_1.png yes_1.png"), "{site}/{class}_*"),
    (product(" ".join(f"P{n}" for n in range(30)), "no_1.png yes_1.png"), "{patient}/{class}_*"),
    (product("north south", "train test", "no yes", "0.png"), "{site}/{split}/{class}/*"),
  ],
)
def test_folders_that_do_not_begin_with_classes_are_refused_with_their_layout(
  tmp_path, places, layout
):
  fill(tmp_path, *places)
  with pytest.raises(UserError, match=r"is not read by guess: .*; say how its folders") as error:
    load(tmp_path)
  assert f"--config.data.layout='{layout}'" in str(error.value)
  left = [name for name, _, _ in load(tmp_path, layout=layout).skipped]
  assert left == [place for place in sorted(places) if "masks" in place]


def test_spellings_of_a_class_at_several_sites_are_not_taken_for_many_classes(tmp_path):
  fill(tmp_path, "north/Benign/0.png", "west/benign/0.png", "south/BENIGN/0.png",
       "north/malignant/0.png", "west/malignant/0.png")  # fmt: skip
  with pytest.raises(UserError, match="repeat below its first level"):
    load(tmp_path)
  with pytest.raises(UserError, match="differ in case, spaces or punctuation only"):
    load(tmp_path, layout="{site}/{class}/*")


@pytest.mark.parametrize("names", ["images labels contours", "imagesTr labelsTr imagesTs"])
def test_kinds_of_files_are_no_classes(tmp_path, names):
  fill(tmp_path, *product(names, "0.png 1.png"))
  with pytest.raises(UserError, match="names kinds of files, not classes"):
    load(tmp_path)


def test_a_stray_text_file_makes_no_class_under_a_layout(tmp_path):
  fill(tmp_path, "no_1.png", "yes_1.png", "a/no_2.png")
  (tmp_path / "train_labels.csv").write_text("1")
  dataset = load(tmp_path, layout="{class}_*")
  assert dataset.class_names == ("no", "yes")
  assert [name for name, _, _ in dataset.skipped] == ["a/no_2.png", "train_labels.csv"]


def test_a_layout_that_makes_parts_classes_is_refused(tmp_path):
  fill(
    tmp_path, *product("train test", "no yes", "0.png"), *product("x", "train test", "no", "0.png")
  )
  with pytest.raises(
    UserError, match="makes test, train a class beside no, yes: folders of another"
  ):
    load(tmp_path, layout="*/{class}/*")


def test_folders_of_leftovers_are_no_classes(tmp_path):
  fill(tmp_path, *product("normal sick unlabeled", "0.png"))
  with pytest.raises(UserError, match=r"unlabeled beside the classes of .* is no class; move it"):
    load(tmp_path)


def test_a_part_beside_classes_is_no_class(tmp_path):
  fill(tmp_path, *product("no yes test", "0.png 1.png"))
  with pytest.raises(UserError, match="test beside no, test, yes is a part, not a class"):
    load(tmp_path)


@pytest.mark.parametrize(
  "places",
  [
    product("no yes", "0.png 1.png"),
    product("no yes", "images", "0.png"),
    [*product("no yes", "scanner", "0.png"), *product("no yes", "0.png")],
    ["no/P1/0.png", "no/P2/0.png", "yes/P3/0.png", "yes/P4/0.png"],
    product("a b c", "part", "0.png"),
  ],
)
def test_folders_that_begin_with_classes_are_read(tmp_path, places):
  fill(tmp_path, *places)
  dataset = load(tmp_path, strict=True)
  assert sorted(dataset.names) == sorted(places)
  assert set(dataset.class_names) == {place.split("/")[0] for place in places}


def test_a_layout_that_fits_nothing_names_one_that_would(tmp_path):
  fill(tmp_path, *SITES)
  expected = r"fits none of the 24 pictures of .*, such as 'east/benign/0\.png'; .*'{site}/{class}/"
  with pytest.raises(UserError, match=expected):
    load(tmp_path, layout="x/{class}/*")


def test_files_that_a_layout_does_not_fit_are_named(tmp_path):
  fill(tmp_path, *SITES, "north/notes.png")
  dataset = load(tmp_path, layout="{site}/{class}/*")
  assert dataset.skipped == (("north/notes.png", "its place does not fit data.layout", ""),)


def test_sites_of_a_layout_are_the_hospitals(tmp_path):
  fill(tmp_path, *SITES)
  config = Config()
  config.partition = dataclasses.replace(
    config.partition, scheme="site", num_clients=0, min_client_size=1
  )
  dataset = load(tmp_path, layout="{site}/{class}/*")
  hospitals = build_hospitals(dataset, config.data, config.partition)
  assert hospitals.names == ("east", "north", "south")
  for name, train, test in zip(
    hospitals.names, client_rows(hospitals.train), client_rows(hospitals.test), strict=True
  ):
    places = [dataset.names[row].split("/")[0] for row in (*train, *test)]
    assert places == [name] * 8


def test_the_given_test_part_is_the_test_side(tmp_path):
  fill(tmp_path, *PARTS)
  dataset = load(tmp_path, layout="{split}/{class}/*")
  config = Config()
  partition = dataclasses.replace(config.partition, num_clients=2, min_client_size=1)
  split = build_hospitals(dataset, config.data, partition).split
  assert split.scheme == "given"
  assert {dataset.names[row].split("/")[0] for row in split.test} == {"test"}
  assert {dataset.names[row].split("/")[0] for row in split.train} == {"train", "val"}
  assert len(split.train) + len(split.test) == len(dataset.names)


def test_patients_on_both_given_sides_are_counted(tmp_path):
  fill(tmp_path, *product("train test", "no yes", "P1_a.png P2_a.png P1_b.png"))
  (tmp_path / "test" / "no" / "P2_a.png").rename(tmp_path / "test" / "no" / "P3_a.png")
  dataset = load(tmp_path, layout="{split}/{class}/{patient}_*")
  config = Config()
  partition = dataclasses.replace(config.partition, num_clients=1, min_client_size=1)
  split = build_hospitals(dataset, config.data, partition).split
  assert split.num_test_of_train_patients == 5


@pytest.mark.parametrize(
  ("places", "sentence"),
  [
    (product("train val", "no yes", "0.png"), "finds no test part in"),
    (product("test", "no yes", "0.png"), "finds no train part in"),
    (product("fold1 test", "no yes", "0.png"), "is 'fold1' in .* no part that is known"),
  ],
)
def test_given_parts_that_cannot_be_used_are_refused(tmp_path, places, sentence):
  fill(tmp_path, *places)
  with pytest.raises(UserError, match=sentence):
    load(tmp_path, layout="{split}/{class}/*")


def test_a_class_that_stands_on_one_given_side_only_is_refused(tmp_path):
  fill(tmp_path, *product("train test", "no yes", "0.png"), "train/maybe/0.png")
  dataset, config = load(tmp_path, layout="{split}/{class}/*"), Config()
  with pytest.raises(UserError, match=r"given test part has no example of class 0 \(1 examples"):
    build_hospitals(dataset, config.data, config.partition)


MASKED = ["no/1.png", "no/2.png", "yes/1.png", "yes/2.png"]


@pytest.mark.parametrize(
  "masks",
  [
    ["no/1_mask.png", "yes/1_mask.png", "yes/1_mask_2.png"],
    ["no/1 mask (2).png", "yes/mask_1.png", "yes/1-Segmentation.png"],
    ["no/masks/1.png", "yes/Masks/1.png"],
    ["masks/no_1.png"],
    ["no/lung masks/1.png", "yes/infection masks/1.png"],
    ["no/mask_1_left.png", "no/1_seg.png", "yes/seg_2.png"],
  ],
)
def test_masks_are_known_by_their_names(tmp_path, masks):
  fill(tmp_path, *MASKED, *masks)
  dataset = load(tmp_path)
  assert dataset.names == tuple(MASKED)
  assert {name: reason for name, reason, _ in dataset.skipped} == dict.fromkeys(
    masks, "a mask by its name, not a picture"
  )


def test_masks_are_known_by_their_two_values(tmp_path):
  fill(tmp_path, *MASKED)
  blob = np.zeros((40, 40), np.uint8)
  blob[10:25, 12:30] = 255
  save(tmp_path / "yes" / "1b.png", blob)
  save(tmp_path / "yes" / "1c.png", np.where(blob > 0, 3, 1).astype(np.uint8))
  save(tmp_path / "yes" / "1d.tif", blob.astype(np.uint16))
  dataset = load(tmp_path)
  assert dataset.names == tuple(MASKED)
  assert {reason for _, reason, _ in dataset.skipped} == {
    "one or two grey values, as a mask has, and no picture"
  }
  assert len(dataset.skipped) == 3


def test_pictures_of_two_values_are_kept_where_most_are(tmp_path):
  for number, place in enumerate(product("no yes", "0.png 1.png 2.png")):
    save(tmp_path / place, (pattern(number) > 127).astype(np.uint8) * 255)
  assert len(load(tmp_path, strict=True).names) == 6


def test_blank_masks_do_not_stay_behind(tmp_path):
  fill(tmp_path, *MASKED)
  blob = np.zeros((40, 40), np.uint8)
  save(tmp_path / "no" / "1b.png", blob)
  blob[10:25, 12:30] = 255
  save(tmp_path / "yes" / "1b.png", blob)
  assert load(tmp_path).names == tuple(MASKED)


def test_a_blank_picture_among_pictures_is_no_mask(tmp_path):
  fill(tmp_path, *MASKED)
  save(tmp_path / "no" / "3.png", np.zeros((40, 40), np.uint8))
  assert len(load(tmp_path).names) == 5


def test_more_masks_than_pictures_by_their_values_are_asked_for(tmp_path):
  fill(tmp_path, "no/0.png", "yes/0.png")
  for number, place in enumerate(product("no yes", "1.png 2.png")):
    save(tmp_path / place, (pattern(number) > 127).astype(np.uint8) * 255)
  with pytest.raises(UserError, match=r"4 of 6 pictures of .* have one or two grey values"):
    load(tmp_path)


def test_names_are_masks_only_beside_pictures(tmp_path):
  fill(tmp_path, *product("no yes", "1_mask.png 2_mask.png"))
  assert len(load(tmp_path, strict=True).names) == 4


def test_a_class_may_be_called_mask(tmp_path):
  fill(tmp_path, *product("site", "mask unmasked", "0.png 1.png"))
  dataset = load(tmp_path, layout="site/{class}/*", positive="mask", strict=True)
  assert len(dataset.names) == 4
