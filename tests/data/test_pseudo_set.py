"""The choice among labels and the data set made of it, against plain loops over all rows."""

import io
import itertools
import json
import pathlib

import numpy as np
import pytest
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from modeling_fer.data import pseudo_set, schema, selection
from modeling_fer.data.images import Face, content_hash, find_source, read
from modeling_fer.data.pixels import open_image
from modeling_fer.data.prepare import prepare
from modeling_fer.data.pseudo import open_job
from modeling_fer.data.pseudo_set import held_out_hashes, select
from modeling_fer.data.report import show
from modeling_fer.data.selection import Selection, SelectOptions, debiased
from modeling_fer.data.similar import BYTES, thumbnail
from modeling_fer.data.sources.synthetic import SyntheticOptions
from modeling_fer.labels import CLASSES
from tests.conftest import picture

NOTHING = np.empty((0, BYTES), np.uint8)


def labelled(root, probabilities, mirrored=None, unit_rows=4):
    """Return a finished job on the images of a folder, as a model with these probabilities would leave it."""
    source = find_source(str(root), "unlabeled", "image", unit_rows)
    job = open_job(root.parent / "out", source, {"model_revision": "abc"}, {"model": "runs/x/model"})
    views = np.stack([probabilities, probabilities if mirrored is None else mirrored]).astype(np.float32)
    place = 0
    for unit, told in enumerate(job.units):
        with job.writer(unit) as writer:
            for encoded in read(source, told, job.folder):
                rgb = open_image(encoded.read())
                writer.add(
                    [
                        Face(
                            row=encoded.row,
                            name=encoded.name,
                            content_hash=content_hash(encoded.read()),
                            pixels=np.zeros((3, 8, 8), np.uint8),
                            small=thumbnail(rgb),
                            width=rgb.width,
                            height=rgb.height,
                            is_blank=False,
                        )
                    ],
                    views[:, place : place + 1],
                )
                place += 1
    assert place == len(probabilities)
    return job


def tree(folder, count, size=20):
    (folder / "images").mkdir(parents=True)
    for i in range(count):
        picture(i % 8, i, size).save(folder / f"images/{i:03d}.png")
    return folder / "images"


def rows(out):
    return load_dataset("parquet", data_files=str(out / "data/*.parquet"), split="train")


def test_debiased_against_the_softmax_of_adjusted_logits():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, 8)) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    marginal = p.mean(axis=0)
    for tau in (0.0, 0.5, 1.0, 2.0):
        adjusted = np.exp(logits - tau * np.log(marginal))
        assert np.allclose(debiased(p, marginal, tau), adjusted / adjusted.sum(1, keepdims=True))
    assert np.array_equal(debiased(p, marginal, 0.0).argmax(1), p.argmax(1))
    p[:, 7], marginal[7] = 0, 0
    assert (debiased(p, marginal, 1.0)[:, 7] == 0).all(), "a class that the model does not know stays out"
    skewed = np.array([[0.6, 0.4, 0, 0, 0, 0, 0, 0]])
    assert debiased(skewed, np.array([0.9, 0.1, 0, 0, 0, 0, 0, 0]), 1.0).argmax() == 1


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.sampled_from([0.0, 0.7, 1.0]), st.integers(1, 8))
def test_quota_takes_the_most_confident_of_each_class(tmp_path_factory, seed, count, tau, quota):
    rng = np.random.default_rng(seed)
    root = tree(tmp_path_factory.mktemp("quota"), count)
    # Few different values, so that confidences are often equal.
    p = rng.integers(1, 4, (count, 8)) ** 3.0
    p /= p.sum(1, keepdims=True)
    job = labelled(root, p)
    folder = root.parent / "work"
    folder.mkdir()
    options = SelectOptions(rule="quota", quota=quota, tau=tau)
    chosen = Selection(job, options, NOTHING, folder)
    p = p.astype(np.float32).astype(np.float64)
    assert np.allclose(chosen.marginal, p.mean(axis=0))
    scores = debiased(p, chosen.marginal, tau)
    hashes = [content_hash(path.read_bytes()) for path in sorted(root.iterdir())]
    keys = [
        (np.float32(s.max()), int.from_bytes(h[:8], "little")) for s, h in zip(scores, hashes, strict=True)
    ]
    expected = set()
    for label in range(8):
        members = sorted((i for i in range(count) if scores[i].argmax() == label), key=lambda i: keys[i])
        expected |= set(members[-quota:])
    kept = np.concatenate([found.keep for found in chosen.units()])
    assert set(np.flatnonzero(kept)) == expected


def test_threshold_and_agreement(tmp_path):
    root = tree(tmp_path, 6)
    p = np.full((6, 8), 0.01)
    p[range(6), [0, 1, 2, 3, 4, 5]] = [0.95, 0.9, 0.89, 0.93, 0.99, 0.91]
    mirrored = p.copy()
    mirrored[5] = mirrored[5][::-1]
    p[:, 6] += 1 - p.sum(1)
    mirrored[:, 6] += 1 - mirrored.sum(1)
    job = labelled(root, p, mirrored)
    report = select(job.out, SelectOptions(threshold=0.9, tau=0, agreement=0.5))
    found = rows(job.out)
    assert found["file"][:] == ["000.png", "001.png", "003.png", "004.png"], "0.9 is enough for 0.9"
    assert report.rejected == {"the views do not agree": 1, "not confident enough": 1}
    assert set(found["threshold"]) == {np.float32(0.9)}
    assert set(found["rule"]) == {"threshold"}
    with pytest.raises(ValueError, match="no row is left"):
        select(job.out, SelectOptions(threshold=1.0, tau=0))
    assert len(rows(job.out)) == 4, "what was selected before stays"


def test_data_set_loads_like_any_other(tmp_path):
    root = tree(tmp_path, 9)
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(8, 0.2), 9)
    job = labelled(root, p, p[:, ::-1])
    report = select(job.out, SelectOptions(threshold=0, tau=1.0))
    data = schema.load(job.out)["pseudo"]
    assert data.features == schema.FEATURES
    mean = (p + p[:, ::-1]).astype(np.float32) / 2
    scores = debiased(mean.astype(float), mean.astype(float).mean(axis=0), 1.0)
    assert data["expression"][:] == scores.argmax(axis=1).tolist()
    assert np.allclose(data["soft_label"][:], scores, atol=1e-6)
    assert data["source"][0] == "images"
    for row, path in zip(data, sorted(root.iterdir()), strict=True):
        assert (np.asarray(row["image"]) == np.asarray(Image.open(path))).all()
    full = rows(job.out)
    assert np.allclose(full["probabilities"][:], mean, atol=1e-6)
    assert full["raw_label"][:] == mean.argmax(axis=1).tolist()
    ordered = np.sort(scores, axis=1)
    assert np.allclose(full["confidence"][:], ordered[:, -1], atol=1e-6)
    assert np.allclose(full["margin"][:], ordered[:, -1] - ordered[:, -2], atol=1e-6)
    assert full["content_hash"][0] == content_hash((root / "000.png").read_bytes()).hex()
    assert set(full["model_revision"]) == {"abc"}

    assert load_dataset(str(job.out))["pseudo"].num_rows == 9, "the card says where the data is"
    assert json.loads((job.out / "report.json").read_text())["counts"]["pseudo"] == report.counts["pseudo"]
    text = show(job.out)
    for part in ("9 images labelled by model abc, 9 kept", "mean probabilities: Neutral 0.", "images images"):
        assert part in text
        assert part in (job.out / "README.md").read_text()
    assert not [path.name for path in job.out.iterdir() if path.name.startswith(".select")]


def test_copies_and_look_alikes_of_held_out_faces_are_left_out(tmp_path):
    options = SyntheticOptions(image_size=64, subjects=40, train=8, validation=16, test=16, unlabeled=40)
    prepare("synthetic", options, tmp_path / "drawn", show_progress=False)
    drawn = schema.load(tmp_path / "drawn")
    root = tmp_path / "images"
    root.mkdir()
    for i, face in enumerate(drawn["unlabeled"]["image"]):
        face.save(root / f"{i:03d}.png")

    def changed(face):
        small = ImageEnhance.Brightness(face.resize((57, 57), Image.Resampling.BICUBIC)).enhance(1.05)
        file = io.BytesIO()
        small.save(file, "JPEG", quality=70)
        return file.getvalue()

    held_out = [*drawn["validation"]["image"][:5], *drawn["test"]["image"][:5]]
    for i, face in enumerate(held_out):
        (root / f"leak-{i}.jpg").write_bytes(changed(ImageOps.mirror(face) if i % 2 else face))
    for i in (3, 4):  # bytes as before, under other names
        (root / f"z-copy-{i}.png").write_bytes((root / f"00{i}.png").read_bytes())
        (root / f"z-again-{i}.png").write_bytes((root / f"00{i}.png").read_bytes())
    count = len([*root.iterdir()])
    job = labelled(root, np.full((count, 8), 0.125), unit_rows=7)
    report = select(job.out, SelectOptions(threshold=0, against=[str(tmp_path / "drawn")]))
    names = rows(job.out)["file"][:]
    assert report.dropped == {
        "pseudo: a copy of an image before it": 4,
        "pseudo: looks like a validation or test image": 10,
    }
    assert names == [f"{i:03d}.png" for i in range(40)]
    assert "compared with 32 held-out faces" in show(job.out)
    assert len(held_out_hashes([str(tmp_path / "drawn")])) == 32
    with pytest.raises(FileNotFoundError, match="no prepared folder with faces of validation or test"):
        select(job.out, SelectOptions(against=[str(tmp_path)]))


def test_copies_are_found_part_by_part_as_well(tmp_path, monkeypatch):
    root = tree(tmp_path, 12)
    for i in range(12):
        (root / f"{i % 5}-copy-{i}.png").write_bytes((root / f"{i:03d}.png").read_bytes())
    job = labelled(root, np.full((24, 8), 0.125))
    select(job.out, SelectOptions(threshold=0))
    whole = rows(job.out)["file"][:]
    assert len(whole) == 12
    monkeypatch.setattr(selection, "PARTITION_ROWS", 5)
    select(job.out, SelectOptions(threshold=0))
    assert rows(job.out)["file"][:] == whole


def test_killed_between_the_renames_the_old_data_set_comes_back(tmp_path, monkeypatch):
    job = labelled(tree(tmp_path, 6), np.full((6, 8), 0.125))
    select(job.out, SelectOptions(threshold=0))
    before = rows(job.out)["file"][:]
    report = (job.out / "report.json").read_bytes()
    replace = pathlib.Path.replace

    def killed(path, target):
        if path.name == "data":
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            select(job.out, SelectOptions(rule="quota", quota=2))
    assert not (job.out / "data").exists()
    (job.out / ".select-killed").mkdir()
    with pytest.raises(ValueError, match="no row is left"):
        select(job.out, SelectOptions(threshold=1))
    assert rows(job.out)["file"][:] == before
    assert (job.out / "report.json").read_bytes() == report
    select(job.out, SelectOptions(rule="quota", quota=2))
    assert len(rows(job.out)) == 2
    assert json.loads((job.out / "report.json").read_text())["options"]["quota"] == 2
    assert not [*job.out.glob(".*")]


def test_that_look_alikes_were_not_looked_for_is_told(tmp_path):
    job = labelled(tree(tmp_path, 2), np.full((2, 8), 0.125))
    report = select(job.out, SelectOptions(threshold=0))
    assert "look-alikes of held-out faces were not looked for: name prepared folders" in report.text()


def test_shards_are_cut(tmp_path, monkeypatch):
    job = labelled(tree(tmp_path, 11), np.full((11, 8), 0.125))
    monkeypatch.setattr(pseudo_set, "BATCH_ROWS", 2)
    monkeypatch.setattr(pseudo_set, "SHARD_ROWS", 4)
    select(job.out, SelectOptions(threshold=0))
    names = [path.name for path in sorted((job.out / "data").iterdir())]
    assert names == [f"pseudo-{i:05d}-of-00003.parquet" for i in range(3)]
    assert rows(job.out)["file"][:] == [f"{i:03d}.png" for i in range(11)]


def test_what_no_longer_fits_is_told(tmp_path):
    root = tree(tmp_path, 6)
    job = labelled(root, np.full((6, 8), 0.125))
    (root / "002.png").write_bytes((root / "003.png").read_bytes())
    with pytest.raises(ValueError, match=r"002\.png is not what was labelled"):
        select(job.out, SelectOptions(threshold=0))
    job.labels_path(1).rename(tmp_path / "away")
    with pytest.raises(ValueError, match=r"1 of 2 units of .* are not labelled"):
        select(job.out, SelectOptions(threshold=0))


def test_blank_and_sizes_and_skipped_are_reported(tmp_path):
    root = tree(tmp_path, 4)
    picture(1, 77, size=31).save(root / "z.png")
    job = labelled(root, np.full((5, 8), 0.125))
    job.labels_path(1).with_suffix(".skipped.jsonl").write_text('{"file": "bad.png", "reason": "empty"}\n')
    report = select(job.out, SelectOptions(threshold=0))
    assert report.sizes == {"width": [20, 31], "height": [20, 31]}
    assert (report.unreadable, report.unreadable_origins) == (1, ["bad.png"])
    assert sum(report.counts["pseudo"].values()) == 5
    assert report.counts["pseudo"].keys() == {*CLASSES, "no label"}
    assert any("could not be read" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rule", "best"),
        ("threshold", 1.5),
        ("quota", 0),
        ("tau", -1.0),
        ("agreement", -0.1),
        ("distance", 128),
    ],
)
def test_wrong_options_are_told(name, value):
    with pytest.raises(ValueError, match=f"--{name} must"):
        SelectOptions(**{name: value})


def test_keys_order_by_confidence_first(tmp_path):
    values = np.sort(np.random.default_rng(0).random(1000))
    keys = selection._as_key(values)
    assert all(a <= b for a, b in itertools.pairwise(keys.tolist()))
    assert (keys & np.uint64(2**32 - 1) == 0).all()
