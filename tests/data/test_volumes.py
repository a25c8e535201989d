"""DICOM and NIfTI files of a manifest: values, orientation, patients, and what is not read."""

import json
import pathlib
import sys
import types

import numpy as np
import pandas as pd
import pytest

from fedjax_med.core.config import DataConfig, PartitionConfig
from fedjax_med.core.errors import UserError
from fedjax_med.data.dataset import Dataset
from fedjax_med.data.dicom import read_dicom
from fedjax_med.data.hospitals import build_hospitals
from fedjax_med.data.nifti import read_nifti
from fedjax_med.data.slices import Content, chosen, parse_slices
from fedjax_med.data.sources import load_dataset
from fedjax_med.run.summaries import hospital_record
from tests.data.folders import SIDE, pattern, save

WHY = "needs the extras dicom and nifti"
pydicom = pytest.importorskip("pydicom", reason=WHY)
nibabel = pytest.importorskip("nibabel", reason=WHY)
SCANS = pathlib.Path(pydicom.__file__).parent / "data" / "test_files"
VOLUMES = pathlib.Path(nibabel.__file__).parent / "tests" / "data"
SECRET = "Doe^Jane"


def content(found: Content | str) -> Content:
  assert isinstance(found, Content), found
  return found


def listed(folder: pathlib.Path, names: list[str], **columns) -> pathlib.Path:
  """A manifest of files that lie in a folder."""
  frame = pd.DataFrame({"path": names, "label": ["no", "yes"] * (len(names) // 2)})
  frame.assign(**columns).to_csv(folder / "list.csv", index=False)
  return folder / "list.csv"


def data_of(path: pathlib.Path, **changes) -> DataConfig:
  options = {"image_size": SIDE, "min_size": 8, "source": "manifest", "path": str(path)}
  return DataConfig(**(options | changes))


def read(path: pathlib.Path, **changes) -> Dataset:
  return load_dataset(data_of(path, **changes))


def scan(folder: pathlib.Path, number: int, **tags) -> str:
  """A CT of noise in Hounsfield units; keyword arguments are tags."""
  file = pydicom.dcmread(SCANS / "CT_small.dcm")
  noise = np.random.default_rng(number).integers(0, 2000, (SIDE, SIDE)).astype("<i2")
  file.Rows = file.Columns = SIDE
  file.PixelData = noise.tobytes()
  file.PatientName = SECRET
  for name, value in tags.items():
    setattr(file, name, value)
  file.save_as(folder / f"{number}.dcm")
  return f"{number}.dcm"


def test_stored_values_of_a_ct_become_hounsfield_units():
  found = content(read_dicom(SCANS / "CT_small.dcm", "CT", "middle"))
  file = pydicom.dcmread(SCANS / "CT_small.dcm")
  stored = np.frombuffer(file.PixelData[: 128 * 128 * 2], "<i2").reshape(128, 128)
  np.testing.assert_array_equal(found.slices[0].pixels, stored * 1.0 - 1024)
  assert not found.slices[0].inverted


@pytest.mark.parametrize("kind", ["RLE", "jp2klossless", "bigendian", "implicit", "expb", "padded"])
def test_a_scan_is_the_same_however_it_is_encoded(kind):
  plain = content(read_dicom(SCANS / "MR_small.dcm", "MR", "middle"))
  other = content(read_dicom(SCANS / f"MR_small_{kind}.dcm", "MR", "middle"))
  np.testing.assert_array_equal(other.slices[0].pixels, plain.slices[0].pixels)


def test_every_file_of_pydicom_is_read_or_says_why_and_names_nobody():
  reasons = {}
  for path in sorted(SCANS.glob("*.dcm")):
    found = read_dicom(path, path.name, "middle")
    if isinstance(found, Content):
      assert found.slices[0].pixels.dtype in (np.uint8, np.float32), path.name
      assert found.slices[0].pixels.ndim == 2 or found.slices[0].pixels.dtype == np.uint8
      assert found.patient is None or len(found.patient) == 64
      continue
    reasons[path.name] = found
    patient = pydicom.dcmread(path, force=True).get("PatientID")
    assert not patient or patient not in found
  assert reasons["rtplan.dcm"] == "DICOM without pixels"
  assert reasons["rtdose.dcm"] == "DICOM of a dose, no picture"
  assert reasons["liver_1frame.dcm"] == "DICOM of a segmentation, no picture"
  assert reasons["no_meta.dcm"] == "cannot be read as DICOM (InvalidDicomError)"
  assert reasons["MR_truncated.dcm"].startswith("its pixels cannot be decoded (Explicit VR Little")
  assert reasons["SC_rgb_rle_16bit.dcm"].startswith("more than 8 bits a colour channel")
  assert len(reasons) < 45


def test_compressed_pixels_without_a_codec_name_the_transfer_syntax(monkeypatch, tmp_path):
  missing = types.SimpleNamespace(is_available=False)
  monkeypatch.setattr(pydicom.pixels, "get_decoder", lambda syntax: missing)
  found = read_dicom(SCANS / "MR_small_jpeg_ls_lossless.dcm", "MR", "middle")
  assert isinstance(found, str)
  assert found.startswith(
    "compressed as JPEG-LS Lossless Image Compression (1.2.840.10008.1.2.4.80), for which no codec"
  )


def test_frames_are_read_as_asked_and_colours_become_one_grey():
  path = SCANS / "SC_rgb_rle_2frame.dcm"
  both = content(read_dicom(path, "SC", "all"))
  assert [one.number for one in both.slices] == [0, 1]
  assert both.total == 2
  middle = content(read_dicom(path, "SC", "middle"))
  np.testing.assert_array_equal(middle.slices[0].pixels, both.slices[1].pixels)
  with pytest.raises(UserError, match=r"slices='0,2' names slice 2, and SC has those from 0 to 1"):
    read_dicom(path, "SC", "0,2")
  # One scene stored as RGB and as YBR; the difference is JPEG's.
  rgb = content(read_dicom(SCANS / "SC_rgb_dcmtk_+eb+cr.dcm", "SC", "middle")).slices[0].pixels
  ybr = content(read_dicom(SCANS / "SC_rgb_dcmtk_+eb+cy+n1.dcm", "SC", "middle")).slices[0].pixels
  assert np.abs(rgb.astype(int) - ybr).mean() < 3


def test_a_frame_is_rescaled_by_its_functional_groups(tmp_path):
  scaling = pydicom.Dataset()
  scaling.RescaleSlope, scaling.RescaleIntercept = 2, -10
  group = pydicom.Dataset()
  group.PixelValueTransformationSequence = [scaling]
  name = scan(tmp_path, 0, SharedFunctionalGroupsSequence=[group])
  found = content(read_dicom(tmp_path / name, name, "middle"))
  stored = np.frombuffer(pydicom.dcmread(tmp_path / name).PixelData, "<i2").reshape(SIDE, SIDE)
  np.testing.assert_array_equal(found.slices[0].pixels, stored * 2.0 - 10)


def test_one_window_holds_for_all_files_and_white_is_black_where_the_file_says_so(tmp_path):
  names = [scan(tmp_path, number) for number in range(6)]
  plain = read(listed(tmp_path, names), window="-500,500").inputs
  for number, tags in enumerate(
    [{"WindowCenter": 40, "WindowWidth": 5}, {"PhotometricInterpretation": "MONOCHROME1"}]
  ):
    scan(tmp_path, number, **tags)
  changed = read(tmp_path / "list.csv", window="-500,500").inputs
  np.testing.assert_array_equal(changed[0], plain[0])
  assert np.abs(changed[1] - (65535.0 - plain[1])).max() <= 1
  np.testing.assert_array_equal(changed[2:], plain[2:])
  file = pydicom.dcmread(tmp_path / "2.dcm")
  stored = np.frombuffer(file.PixelData, "<i2").reshape(SIDE, SIDE) - 1024.0
  expected = np.clip((stored + 500) / 1000, 0, 1)
  np.testing.assert_allclose(plain[2, ..., 0] / 65535, expected, atol=1 / 65535)


def test_patients_are_told_apart_by_patientid_and_named_nowhere(tmp_path):
  names = [scan(tmp_path, number, PatientID=f"MRN-{number // 2}77") for number in range(12)]
  data = data_of(listed(tmp_path, names, label=np.repeat(["no", "yes"], 6)))
  dataset = load_dataset(data)
  assert dataset.patient_counts == (12, 6, "PatientID of DICOM", 0)
  assert dataset.patients is not None
  assert (dataset.patients[::2] == dataset.patients[1::2]).all()
  assert len(set(dataset.patients.tolist())) == 6
  partition = PartitionConfig(scheme="iid", num_clients=1, min_client_size=1)
  hospitals = build_hospitals(dataset, data, partition)
  assert hospitals.split.num_test_of_train_patients == 0
  written = json.dumps(hospital_record(hospitals)) + repr(hospitals)
  assert "MRN-" not in written
  assert SECRET not in written
  sides = np.where(np.arange(12) % 2, "train", "test")
  with pytest.raises(UserError, match=r"one name of PatientID of DICOM in train and in t") as error:
    read(listed(tmp_path, names, label=np.repeat(["no", "yes"], 6), split=sides))
  assert "MRN-" not in str(error.value)


def test_a_manifest_names_patients_before_patientid_and_one_id_for_all_says_nothing(tmp_path):
  names = [scan(tmp_path, number, PatientID="ANONYMOUS") for number in range(6)]
  dataset = read(listed(tmp_path, names))
  assert dataset.patients is None
  assert dataset.notes == (
    "All DICOM files name one PatientID, which then says nothing of patients.",
  )
  named = read(listed(tmp_path, names, patient=["a", "b", "c"] * 2))
  assert named.patient_counts == (6, 3, "the manifest", 0)
  assert named.notes == ()


def test_a_missing_package_names_its_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "pydicom", None)
  path = listed(tmp_path, ["a.dcm", "b.dcm"])
  for name in ("a.dcm", "b.dcm"):
    (tmp_path / name).write_bytes(b"DICOM")
  with pytest.raises(UserError, match=r"a.dcm needs the package pydicom.*'fedjax_med\[dicom\]'"):
    read(path)


def volume(folder: pathlib.Path, number: int, shape=(12, 10, 6), codes="RAS") -> str:
  """A volume of noise, stored in another orientation; its middle slice differs from others'."""
  noise = np.random.default_rng(number).integers(1, 900, shape).astype(np.int16)
  image = nibabel.Nifti1Image(noise, np.diag([2.0, 2.0, 3.0, 1.0]))
  turn = nibabel.orientations.ornt_transform(
    nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(codes)
  )
  nibabel.save(image.as_reoriented(turn), folder / f"{number}{codes}.nii.gz")
  return f"{number}{codes}.nii.gz"


def test_a_slice_of_a_real_volume_is_seen_as_radiologists_do():
  found = content(read_nifti(VOLUMES / "anatomical.nii", "anatomical", "middle", -1))
  image = nibabel.load(VOLUMES / "anatomical.nii")
  assert nibabel.aff2axcodes(image.affine) == ("L", "A", "S")
  # Stored from right to left, from back to front: rows are to go from front to back.
  expected = image.get_fdata()[:, ::-1, 12].T
  np.testing.assert_allclose(found.slices[0].pixels, expected, rtol=1e-6)
  assert (found.slices[0].number, found.total) == (12, 25)


@pytest.mark.parametrize("codes", ["LAS", "PIR", "SLA", "IPL"])
def test_slices_do_not_depend_on_how_a_volume_is_stored(tmp_path, codes):
  plain, other = (
    content(read_nifti(tmp_path / volume(tmp_path, 3, codes=c), "v", "all", -1))
    for c in ("RAS", codes)
  )
  assert len(plain.slices) == 6
  for one, two in zip(plain.slices, other.slices, strict=True):
    np.testing.assert_array_equal(one.pixels, two.pixels)


def test_a_volume_in_time_needs_a_rule(tmp_path):
  path = VOLUMES / "example4d.nii.gz"
  with pytest.raises(UserError, match=r"^e holds 2 volumes \(4-D\), and data.volume=-1 names none"):
    read_nifti(path, "e", "middle", -1)
  found = content(read_nifti(path, "e", "0,5", 1))
  image = nibabel.load(path)
  assert nibabel.aff2axcodes(image.affine) == ("L", "A", "S")
  for one, number in zip(found.slices, (0, 5), strict=True):
    np.testing.assert_allclose(one.pixels, image.get_fdata()[:, ::-1, number, 1].T, rtol=1e-6)
  assert found.volumes


def test_what_is_no_volume_says_so(tmp_path):
  (tmp_path / "x.nii").write_bytes(b"none")
  assert (
    read_nifti(tmp_path / "x.nii", "x", "all", -1) == "cannot be read as NIfTI (ImageFileError)"
  )
  found = read_nifti(VOLUMES / "row_major.dconn.nii", "d", "all", -1)
  assert found == "no volume of NIfTI but Cifti2Image"


def test_slices_of_a_volume_stay_together_and_their_number_is_told(tmp_path):
  names = [volume(tmp_path, number) for number in range(8)]
  path = listed(tmp_path, names)
  one = read(path)
  assert one.names == tuple(f"{name}, slice 3" for name in names)
  assert one.kept_together is None
  data = data_of(path, slices="all")
  dataset = load_dataset(data)
  assert dataset.notes == (
    "8 files of 8 with several slices: 48 of 48 slices are examples (data.slices=all).",
  )
  assert dataset.names[:2] == ("0RAS.nii.gz, slice 0", "0RAS.nii.gz, slice 1")
  assert dataset.patients is None
  assert dataset.kept_together is not None
  assert (dataset.kept_together.reshape(8, 6) == np.arange(8)[:, None]).all()
  partition = PartitionConfig(scheme="iid", num_clients=2, min_client_size=1)
  split = build_hospitals(dataset, data, partition).split
  assert len(np.unique(split.units)) == 8
  assert not set(split.units[split.test]) & set(split.units[split.train])


def test_files_without_a_slice_or_volume_to_choose_refuse_the_choice(tmp_path):
  names = [f"{number}.png" for number in range(4)]
  for number, name in enumerate(names):
    save(tmp_path / name, pattern(number))
  path = listed(tmp_path, names)
  with pytest.raises(UserError, match=r"slices='all' is not read: no file that .* several slices"):
    read(path, slices="all")
  with pytest.raises(UserError, match=r"volume=0 is not read: no file that .* several volumes"):
    read(path, volume=0)
  with pytest.raises(UserError, match=r"slices='first' is neither middle nor all nor different"):
    read(path, slices="first")


def test_the_rule_of_slices():
  assert [list(chosen(rule, 5, "f")) for rule in ("middle", "all", "4,0")] == [
    [2], [0, 1, 2, 3, 4], [4, 0],
  ]  # fmt: skip
  assert list(chosen("7", 1, "f")) == [0]
  with pytest.raises(UserError, match="is neither middle"):
    parse_slices("3,3")
