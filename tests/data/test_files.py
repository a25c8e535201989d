"""Every file below a folder is read, or named with the reason why not."""

import os
import pathlib

import pytest

from fedjax_med.core.errors import UserError
from fedjax_med.data.files import SYSTEM, walk
from tests.data.folders import fill, load, pattern, save


@pytest.fixture
def two(tmp_path: pathlib.Path) -> pathlib.Path:
  """Folder of two classes with three different pictures each."""
  root = tmp_path / "data"
  fill(root, *(f"{name}/{number}.png" for name in ("no", "yes") for number in range(3)))
  return root


def left_out(root: pathlib.Path, **changes) -> dict[str, tuple[str, str]]:
  """{name: (reason, class)} of what a load leaves out."""
  return {name: (why, of) for name, why, of in load(root, **changes).skipped}


@pytest.mark.parametrize(
  ("name", "content", "reason"),
  [
    ("yes/notes.txt", b"text", "a .txt file is no picture"),
    ("yes/scan.Mueller_Hans", b"x", "its ending is not that of a picture"),
    ("yes/scan.dcm", b"x", "DICOM (.dcm) is not read"),
    ("yes/scan.nii.gz", b"x", "NIfTI (.nii.gz) is not read"),
    ("yes/IM0001", b"\0" * 128 + b"DICM", "DICOM is not read"),
    ("yes/IM0002", b"x", "no file ending"),
    ("yes/.hidden.png", b"x", "hidden: its name, or that of its folder, begins with a dot"),
    ("yes/.cache/a.png", b"x", "hidden: its name, or that of its folder, begins with a dot"),
  ],
)
def test_what_is_no_picture_is_named_counted_and_stops_a_strict_run(two, name, content, reason):
  (two / name).parent.mkdir(exist_ok=True)
  (two / name).write_bytes(content)
  assert left_out(two) == {name: (reason, "yes")}
  with pytest.raises(UserError, match=r"data\.strict: 1 files .* are left out, such as"):
    load(two, strict=True)


def test_a_file_beside_the_class_folders_is_named(two):
  (two / "README.md").write_text("about")
  save(two / "stray.png", pattern(9))
  assert {name: of for name, (_, of) in left_out(two).items()} == {"README.md": "", "stray.png": ""}


def test_what_systems_write_is_counted_and_stops_nothing(two):
  names = ["yes/.DS_Store", "no/Thumbs.db", "yes/._0.png", "__MACOSX/yes/a.png"]
  for name in names:
    (two / name).parent.mkdir(parents=True, exist_ok=True)
    (two / name).write_bytes(b"x")
  before = load(two)
  assert {name: reason for name, reason, _ in before.skipped} == dict.fromkeys(names, SYSTEM)
  assert load(two, strict=True).class_names == ("no", "yes")


def test_links_are_followed_and_read_under_the_name_of_the_link(two, tmp_path):
  fill(tmp_path / "store", "a.png", "deep/b.png")
  (two / "yes" / "folder").symlink_to(tmp_path / "store")
  (two / "no" / "one.png").symlink_to(tmp_path / "store" / "a.png")  # in another class
  dataset = load(two, strict=True)
  assert {"yes/folder/a.png", "yes/folder/deep/b.png", "no/one.png"} < set(dataset.names)
  assert len(dataset.names) == 9


def test_class_folders_may_be_links(two, tmp_path):
  linked = tmp_path / "linked"
  linked.mkdir()
  for name in ("no", "yes"):
    (linked / name).symlink_to(two / name)
  assert load(linked, strict=True).names == load(two).names


def test_a_link_to_nothing_is_named(two):
  (two / "yes" / "gone.png").symlink_to(two / "nowhere.png")
  assert left_out(two) == {"yes/gone.png": ("a link to nothing", "yes")}


def test_a_link_back_to_a_folder_above_ends_and_is_named(two):
  (two / "yes" / "again").symlink_to(two)
  assert left_out(two) == {"yes/again": ("a link back to a folder above it", "yes")}
  assert len(load(two).names) == 6


def test_a_pipe_is_not_opened(two):
  os.mkfifo(two / "yes" / "pipe.png")
  assert left_out(two) == {"yes/pipe.png": ("not a regular file", "yes")}


def test_names_in_another_encoding_are_shown_and_told_apart(two):
  for number in range(2):
    save(two / "yes" / "new.png", pattern(20 + number))
    other = os.fsencode(two / "yes") + b"/" + "頭".encode("shift_jis") + b"%d.png" % number
    os.rename(two / "yes" / "new.png", other)
  names = [name for name in load(two).names if "\\" in name]
  assert len(set(names)) == 2
  for name in names:
    assert name.encode("utf-8").isascii()  # text without surrogates, printable anywhere


def test_a_folder_of_dicom_alone_says_what_to_do(tmp_path):
  for name in ("healthy", "sick"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "1.dcm").write_bytes(b"x")
  with pytest.raises(UserError, match=r"no pictures but 1 other files: DICOM .*; convert them"):
    load(tmp_path)


def test_files_come_in_the_order_of_their_parts(two):
  fill(two, "yes/b/1.png", "yes/a-1.png", "yes/a/1.png")
  parts = [file.parts for file in walk(two).files]
  assert parts == sorted(parts)
  assert len(parts) == 9


def test_two_names_of_one_file_are_one_image_of_a_class(two):
  (two / "yes" / "again.png").symlink_to(two / "yes" / "0.png")
  os.link(two / "yes" / "1.png", two / "yes" / "z.png")
  twice = "another name of a file that is read already"
  assert left_out(two) == {"yes/again.png": (twice, "yes"), "yes/z.png": (twice, "yes")} or (
    left_out(two) == {"yes/0.png": (twice, "yes"), "yes/z.png": (twice, "yes")}
  )
  assert len(load(two).names) == 6


def test_one_name_in_two_spellings_of_its_accents_is_one_class(tmp_path):
  composed = "b\u00e9nin"
  fill(tmp_path, f"a/{composed}/0.png", "a/x/0.png", "b/be\u0301nin/0.png", "b/x/0.png")
  dataset = load(tmp_path, layout="{site}/{class}/*", positive="x")
  assert dataset.class_names == (composed, "x")


def test_sites_that_differ_in_spelling_only_are_refused(tmp_path):
  fill(
    tmp_path, *(f"{site}/{name}/0.png" for site in ("North", "north ") for name in ("no", "yes"))
  )
  with pytest.raises(UserError, match="the sites 'North' and 'north ' differ in case"):
    load(tmp_path, layout="{site}/{class}/*")
