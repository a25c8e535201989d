"""Synthetic images in a run: whose they are, how many, made once, counted as what they are."""

import json

import numpy as np
import pytest

from fedjax_med.core.errors import UserError
from fedjax_med.core.validation import validate
from fedjax_med.data.dataset import Dataset, Hospitals, Split, client_rows, client_table
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.prepare import case, synthetic_images
from fedjax_med.prepare.experiment import build
from fedjax_med.run import summaries, training
from fedjax_med.trained import heat_page, loading
from tests.running import run, smoke_config

GAN = {
  "client__synthetic": "gan",
  "client__gan_steps": 2,
  "privacy__mechanism": "none",
  "privacy__noise_multiplier": 0.0,
}


def gan_config(**changes):
  return smoke_config(**{**GAN, **changes})


@pytest.fixture(scope="module")
def dealt():
  return load_hospitals(gan_config())


@pytest.fixture
def drawn(monkeypatch):
  """Random images in the place of those of GANs; holds how often they were made."""
  calls = []

  def make_images(config, hospitals):
    calls.append(config.seed)
    shape = (hospitals.dataset.num_synthetic, *hospitals.dataset.inputs.shape[1:])
    return np.random.default_rng(config.seed).integers(0, 256, shape).astype(np.uint8)

  monkeypatch.setattr(synthetic_images, "make_images", make_images)
  return calls


def by_hand(*held: tuple[int, int]) -> Hospitals:
  """Hospitals with so many training images of two classes, and a test image of each class."""
  labels = np.concatenate([np.repeat([0, 1], each) for each in held] + [[0, 1]]).astype(np.int32)
  inputs = np.zeros((len(labels), 8, 8, 1), np.uint8)
  rows = np.split(np.arange(len(labels), dtype=np.int32), np.cumsum([sum(each) for each in held]))
  units = np.arange(len(labels), dtype=np.int32)
  split = Split(units[:-2], units[-2:], units, "grouped", 0, 0, 0)
  dataset = Dataset(inputs, labels, tuple(map(str, units)), ("healthy", "tumour"))
  names = tuple(f"hospital {k + 1}" for k in range(len(held)))
  test = client_table([rows[-1], *[rows[-1][:0]] * (len(held) - 1)])
  return Hospitals(dataset, split, names, client_table(rows[:-1]), test)


@pytest.mark.parametrize(("share", "counts"), [(0.5, [10, 5]), (1.0, [20, 10]), (0.33, [7, 3])])
def test_a_hospital_gets_its_share_in_its_own_proportions(share, counts):
  hospitals = by_hand((20, 10), (4, 40))
  found = synthetic_images.reserve_synthetic(gan_config(client__synthetic_share=share), hospitals)
  first, second = client_rows(found.train)
  made = first[found.real_counts[0] :]
  assert np.bincount(found.dataset.labels[made]).tolist() == counts
  np.testing.assert_array_equal(first[:30], client_rows(hospitals.train)[0])
  np.testing.assert_array_equal(found.real_counts, [30, 44])
  assert len(second) == 44 + round(44 * share)
  everybody = np.sort(np.concatenate([first, second, *client_rows(found.test)]))
  np.testing.assert_array_equal(everybody, np.arange(len(found.dataset.labels)))
  assert len(found.dataset.names) == len(found.dataset.inputs) == len(found.dataset.labels)
  assert found.test is hospitals.test
  assert found.split is hospitals.split


def test_a_class_with_too_few_images_is_not_made_and_that_is_told():
  found = synthetic_images.reserve_synthetic(gan_config(), by_hand((20, 1), (0, 8), (1, 1)))
  record = summaries.hospital_record(found)
  assert [each["synthetic"] for each in record["hospitals"]] == [[10, 0], [0, 4], [0, 0]]
  assert [each["train"] for each in record["hospitals"]] == [[20, 1], [0, 8], [1, 1]]
  told = [["hospital 1", "tumour"], ["hospital 3", "healthy"], ["hospital 3", "tumour"]]
  assert record["synthetic"]["left_out"] == told
  with pytest.raises(UserError, match=r"synthetic_share=0.5 makes not one .*; raise it"):
    synthetic_images.reserve_synthetic(gan_config(), by_hand((1, 1), (1, 0)))


@pytest.mark.slow
def test_images_are_those_of_their_hospital_and_class(dealt):
  config = gan_config(client__gan_steps=40)
  hospitals = synthetic_images.reserve_synthetic(config, dealt)
  images = synthetic_images.make_images(config, hospitals)
  assert images.shape == (hospitals.dataset.num_synthetic, 16, 16, 1)
  np.testing.assert_array_equal(synthetic_images.make_images(config, hospitals), images)
  real = hospitals.dataset.inputs[: hospitals.dataset.num_real].copy()
  real[client_rows(hospitals.test)[0]] = 255  # neither test images nor those of other hospitals
  real[client_rows(dealt.train)[1]] = 0
  poisoned = synthetic_images._with_images(hospitals, images)
  poisoned.dataset.inputs[: len(real)] = real
  found = synthetic_images.make_images(config, poisoned)
  owner = np.repeat(np.arange(3), hospitals.train.counts - hospitals.real_counts)
  np.testing.assert_array_equal(found[owner != 1], images[owner != 1])
  assert (found[owner == 1] != images[owner == 1]).any()
  for k in (0, 2):
    own = client_rows(dealt.train)[k]
    mean = dealt.dataset.inputs[own].mean(0)
    made = images[owner == k]
    noise = np.random.default_rng(0).integers(0, 256, made.shape)
    assert np.abs(made.mean(0) - mean).mean() < 0.5 * np.abs(noise.mean(0) - mean).mean()


def test_only_real_images_give_a_hospital_weight_and_both_are_trained_on(dealt):
  hospitals = synthetic_images.reserve_synthetic(gan_config(), dealt)
  experiment = build(gan_config(), hospitals)
  real = dealt.train.counts
  np.testing.assert_allclose(experiment.clients.weight, real / real.sum(), rtol=1e-6)
  np.testing.assert_array_equal(experiment.clients.num_examples, hospitals.train.counts)
  assert (hospitals.train.counts > real).all()
  # A pass over the data is one over both, also at the baselines, which have the same images.
  epochs = gan_config(client__num_local_steps=0)
  whole = case.federation(epochs, hospitals)
  np.testing.assert_array_equal(whole.protection.steps, -(-hospitals.train.counts // 16))
  cases = case.baselines(whole)
  assert cases["pooled"].rows.counts.tolist() == [hospitals.train.counts.sum()]
  np.testing.assert_array_equal(
    cases["alone-2"].rows.indices[0, : hospitals.train.counts[1]],
    client_rows(hospitals.train)[1],
  )


def test_the_id_of_a_run_follows_from_what_is_asked_and_not_from_the_images(dealt):
  def run_id(hospitals, config):
    return case.federation(config, hospitals).run_id

  plain = gan_config(client__synthetic="none")
  other = gan_config(client__synthetic="none", client__gan_steps=7, client__synthetic_share=0.1)
  assert synthetic_images.reserve_synthetic(plain, dealt) is dealt
  assert run_id(dealt, plain) == run_id(dealt, other)
  ids = [run_id(dealt, plain)]
  for changes in ({}, {"client__gan_steps": 3}, {"client__synthetic_share": 0.25}):
    config = gan_config(**changes)
    ids.append(run_id(synthetic_images.reserve_synthetic(config, dealt), config))
  assert len(set(ids)) == 4
  hospitals = synthetic_images.reserve_synthetic(gan_config(), dealt)
  shown = np.full((hospitals.dataset.num_synthetic, 16, 16, 1), 9, np.uint8)
  assert run_id(synthetic_images._with_images(hospitals, shown), gan_config()) == ids[1]


@pytest.mark.parametrize(
  "changes",
  [
    {"privacy__mechanism": "dp_sgd", "privacy__noise_multiplier": 1.0},
    {"privacy__mechanism": "dp_sgd", "privacy__noise_multiplier": 1.0, "privacy__unit": "patient"},
    {
      "client_privacy__mechanism": "dp_fedavg",
      "client_privacy__noise_multiplier": 1.0,
      "server__weighting": "uniform",
    },
  ],
)
def test_gans_are_refused_with_privacy_of_any_unit(changes):
  validate(gan_config())
  validate(gan_config(**changes, client__synthetic="none", client__gan_steps=500))
  (path,) = [name.replace("__", ".") for name in changes if name.endswith("mechanism")]
  with pytest.raises(UserError) as caught:
    validate(gan_config(**changes))
  mechanism = next(value for value in changes.values() if value in ("dp_sgd", "dp_fedavg"))
  assert str(caught.value).startswith(
    f"client.synthetic='gan' with {path}='{mechanism}': GANs read"
  )
  assert str(caught.value).endswith(f"; use client.synthetic=none, or {path}=none")


def completed(folder, config, hospitals):
  return synthetic_images.completed(
    config, synthetic_images.reserve_synthetic(config, hospitals), folder, print
  )


def test_images_are_made_once_and_again_where_the_file_is_of_no_use(dealt, drawn, tmp_path):
  first = completed(tmp_path, gan_config(), dealt)
  file = tmp_path / synthetic_images.FILE
  images = first.dataset.inputs[first.dataset.num_real :]
  assert images.any()
  again = completed(tmp_path, gan_config(), dealt)
  np.testing.assert_array_equal(again.dataset.inputs, first.dataset.inputs)
  assert len(drawn) == 1
  whole = file.read_bytes()
  for broken in (b"", whole[: len(whole) // 2], b"\0" + whole[1:], whole[:3000] + whole[3010:]):
    file.write_bytes(broken)
    assert synthetic_images.digest(
      completed(tmp_path, gan_config(), dealt)
    ) == synthetic_images.digest(first)
    assert file.stat().st_size > len(whole) // 2
  assert len(drawn) == 5
  completed(tmp_path, gan_config(seed=4), dealt)
  assert len(drawn) == 6
  completed(tmp_path, gan_config(seed=4, client__gan_steps=5), dealt)
  assert drawn == [0] * 5 + [4, 4]


def test_lost_images_that_come_out_otherwise_end_a_run(dealt, drawn, tmp_path, monkeypatch):
  first = completed(tmp_path, gan_config(), dealt)
  (tmp_path / "hospitals.json").write_text(json.dumps(summaries.hospital_record(first)))
  file = tmp_path / synthetic_images.FILE
  with np.load(file) as found:
    edited = {**found, "images": 255 - found["images"]}
  np.savez(file, **edited)  # edited images of the right source are none of this run
  assert synthetic_images.digest(
    completed(tmp_path, gan_config(), dealt)
  ) == synthetic_images.digest(first)
  file.unlink()
  monkeypatch.setattr(synthetic_images, "make_images", lambda *_: 255 - edited["images"][::-1])
  with pytest.raises(UserError, match=r"lost or damaged.*differ.*; restore synthetic.npz, or use"):
    completed(tmp_path, gan_config(), dealt)


@pytest.mark.slow
def test_a_run_with_gans_resumes_without_training_them_again(tmp_path, monkeypatch):
  whole = run(tmp_path / "whole", **GAN, eval__every=3)
  run(tmp_path / "broken", **GAN, eval__every=3, server__num_rounds=3)
  monkeypatch.setattr(synthetic_images, "make_images", None)
  assert run(tmp_path / "broken", **GAN, eval__every=3) == whole
  folder = tmp_path / "whole"
  for name in (synthetic_images.FILE, "figures/synthetic.png"):
    assert (folder / name).stat().st_size > 0, name
  held = json.loads((folder / "hospitals.json").read_text())
  assert whole["train_images"] == {
    "real": [sum(each["train"]) for each in held["hospitals"]],
    "synthetic": [sum(each["synthetic"]) for each in held["hospitals"]],
  }
  page = (folder / "report.html").read_text()
  assert 'id="synthetic"' in page
  assert "Synthetic: tumour" in page
  for text in (page, (folder / "privacy_statement.md").read_text()):
    assert "no safer to show" in text
  assert heat_page._load_data(loading.load(folder), "").dataset.num_synthetic  # its own data
  with pytest.raises(UserError, match="use another --workdir"):
    run(folder, **{**GAN, "client__gan_steps": 3})


def test_a_dry_run_trains_no_gan(monkeypatch, capsys):
  monkeypatch.setattr(synthetic_images, "make_images", None)
  training.dry_run(gan_config())
  out = " ".join(capsys.readouterr().out.split())
  assert "GANs of the hospitals add" in out
