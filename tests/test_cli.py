import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from datasets import Dataset
from PIL import Image, ImageOps
from transformers import AutoModelForImageClassification
from transformers.utils import logging

from modeling_fer import CLASSES
from modeling_fer.cli import COMMANDS, main
from modeling_fer.data import schema
from modeling_fer.data.augment import Normalize
from modeling_fer.data.pixels import decode
from modeling_fer.evaluation.metrics import compute_metrics
from modeling_fer.evaluation.submission import FILE_HEADER
from modeling_fer.learning.inference import load_classifier, predict_probabilities


@pytest.fixture(autouse=True)
def _verbosity():
    """Put back what the command switches off for its own process."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


def direct(checkpoint, images):
    """Probabilities of images without any of the command's code."""
    model, processor = load_classifier(checkpoint)
    pixels = np.stack([decode(image, 16) for image in images])
    return predict_probabilities(model, pixels, Normalize(processor.image_mean, processor.image_std))


# -- data -------------------------------------------------------------------------------------------


def test_eval_can_leave_out_copies_of_training_images(checkpoint, image_folder, tmp_path, capsys):
    root = tmp_path / "faces"
    shutil.copytree(image_folder, root)
    for name in ("Anger", "Fear"):
        shutil.copy(root / "train" / name / "0.png", root / "validation" / name / "copy.png")
    data = str(tmp_path / "data")
    assert main(["data", "prepare", "folder", "--root", str(root), "--out", data]) == 0
    flags = ["eval", "--model", str(checkpoint), "--data", data, "--drop-train-copies"]
    assert main([*flags, "--out", str(tmp_path / "out")]) == 0
    assert "2 images whose pixels are also in train" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert {name: row["support"] for name, row in metrics["per_class"].items()} == dict.fromkeys(CLASSES, 2)


def test_prepare_a_folder_and_show_it(image_folder, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["data", "prepare", "folder", "--root", str(image_folder), "--out", str(out)]
    assert main(command) == 0
    report = capsys.readouterr().out
    assert all(name in report for name in CLASSES)
    data = schema.load(out)
    assert {split: len(rows) for split, rows in data.items()} == {
        "train": 24,
        "validation": 16,
        "unlabeled": 2,
    }
    assert main(["data", "show", str(out)]) == 0
    assert capsys.readouterr().out == report

    assert main(command) == 2  # it is there already
    assert str(out) in capsys.readouterr().err
    assert main([*command, "--overwrite", "--drop-duplicates"]) == 0


@pytest.mark.parametrize("hyphens", [True, False])
def test_prepare_synthetic_faces_with_either_spelling_of_flags(hyphens, tmp_path):
    flags = {
        "image_size": 16,
        "subjects": 8,
        "train": 16,
        "validation": 8,
        "test": 8,
        "unlabeled": 8,
        "seed": 5,
    }
    command = ["data", "prepare", "synthetic", "--out", str(tmp_path / "out")]
    for name, value in flags.items():
        command += [f"--{name.replace('_', '-') if hyphens else name}", str(value)]
    assert main(command) == 0
    data = schema.load(tmp_path / "out")
    assert {split: len(rows) for split, rows in data.items()} == {
        split: flags[split] for split in ("train", "validation", "test", "unlabeled")
    }
    assert data["train"][0]["image"].size == (16, 16)


def test_a_folder_without_data(tmp_path, capsys):
    assert main(["data", "show", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("fer: ")
    assert message.count("\n") == 1

    (tmp_path / "report.json").write_text('{"written by": "another program"}')
    assert main(["data", "show", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"fer: {tmp_path / 'report.json'} is damaged, ")
    assert message.count("\n") == 1


# -- eval -------------------------------------------------------------------------------------------


def test_eval_writes_the_figures_of_direct_predictions(checkpoint, prepared, tmp_path, capsys):
    out = tmp_path / "report"
    command = [
        "eval",
        "--model",
        str(checkpoint),
        "--data",
        str(prepared),
        "--out",
        str(out),
        "--batch-size",
        "5",
    ]
    assert main(command) == 0
    rows = schema.load(prepared, "validation")["validation"]
    probabilities = direct(checkpoint, rows["image"][:])
    expected = compute_metrics(rows["expression"][:], probabilities.argmax(1), probabilities)
    written = json.loads((out / "metrics.json").read_text())
    assert (written["model"], written["data"], written["split"]) == (
        str(checkpoint),
        str(prepared),
        "validation",
    )
    assert written["samples"] == 16
    for name in ("confusion_matrix", "per_class", "macro_f1", "accuracy", "interval"):
        assert written[name] == expected[name], name
    assert written["ece"] == pytest.approx(expected["ece"], abs=1e-6)
    assert written["nll"] == pytest.approx(expected["nll"], abs=1e-5)
    assert 0 < written["accuracy"] < 1  # else little would be compared
    for name in ("confusion_matrix.png", "reliability.png"):
        with Image.open(out / name) as image:
            assert min(image.size) > 100
    shown = capsys.readouterr().out
    assert f"macro F1 {expected['macro_f1']:.3f} over 8 classes (95 % interval over images " in shown
    assert "no rows of" not in shown
    assert f"written: {out}" in shown


def test_eval_and_predict_with_mirror_images(checkpoint, prepared, photos, tmp_path, capsys):
    assert main(["eval", f"--model={checkpoint}", f"--data={prepared}", f"--out={tmp_path}", "--mirror"]) == 0
    rows = schema.load(prepared, "validation")["validation"]
    straight, flipped = (
        direct(checkpoint, [change(image) for image in rows["image"][:]])
        for change in (lambda image: image, ImageOps.mirror)
    )
    both = np.sqrt(straight * flipped)
    both /= both.sum(1, keepdims=True)
    expected = compute_metrics(rows["expression"][:], both.argmax(1), both)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["mirror"]
    assert written["nll"] == pytest.approx(expected["nll"], abs=1e-5)
    assert written["confusion_matrix"] == expected["confusion_matrix"]
    capsys.readouterr()

    both = tmp_path / "both"
    AutoModelForImageClassification.from_pretrained(checkpoint, mirror=True).save_pretrained(both)
    shutil.copy(checkpoint / "preprocessor_config.json", both)
    for flags, told in (([], True), (["--no-mirror"], None)):
        assert main(["eval", f"--model={both}", f"--data={prepared}", f"--out={tmp_path}", *flags]) == 0
        metrics = json.loads((tmp_path / "metrics.json").read_text())
        assert metrics.get("mirror") == told
        assert (metrics["nll"] == pytest.approx(written["nll"], abs=1e-5)) == bool(told)
    capsys.readouterr()

    turned = tmp_path / "turned.png"
    ImageOps.mirror(Image.open(photos / "a.png")).save(turned)
    command = ["predict", str(photos / "a.png"), str(turned), f"--model={checkpoint}", "--json"]
    said = {}
    for flag in ("--mirror", ""):
        assert main([*command, *filter(None, [flag])]) == 0
        said[flag] = [json.loads(line)["probabilities"] for line in capsys.readouterr().out.splitlines()]
    assert said["--mirror"][0] == pytest.approx(said["--mirror"][1], abs=2e-4)
    assert said[""][0] != pytest.approx(said[""][1], abs=2e-4)


def test_eval_with_a_model_of_fewer_classes(prepared, make_model, checkpoint, tmp_path):
    folder = tmp_path / "model"
    make_model(id2label={0: "Surprise", 1: "Neutral", 2: "Anger"}).save_pretrained(folder)
    shutil.copy(checkpoint / "preprocessor_config.json", folder)
    command = ["eval", "--model", str(folder), "--data", str(prepared), "--out", str(tmp_path / "out")]
    assert main([*command, "--split", "train"]) == 0
    matrix = np.array(json.loads((tmp_path / "out/metrics.json").read_text())["confusion_matrix"])
    assert matrix.sum(1).tolist() == [3] * 8
    guessed = {name for name, column in zip(CLASSES, matrix.sum(0), strict=True) if column}
    assert guessed <= {"Surprise", "Neutral", "Anger"}


GROUPED = {  # ids of 16 rows, two of each class: videos, subjects, and what is resampled
    "videos": ([f"v{n // 4}" for n in range(16)], [f"p{n // 8}" for n in range(16)], "videos"),
    "a row without a video": ([None, *["v1", "v2", "v3"] * 5], ["p1", "p2"] * 8, "subjects"),
    "one video": (["v1"] * 16, ["p1", "p2"] * 8, "subjects"),
    "one subject": ([None] * 16, ["p1"] * 16, "images"),
    "a row without a subject": ([None] * 16, ["p1"] * 15 + [None], "images"),
}


@pytest.mark.parametrize("case", GROUPED)
def test_eval_resamples_videos_or_subjects(case, checkpoint, prepared, tmp_path, capsys):
    videos, subjects, unit = GROUPED[case]
    rows = schema.load(prepared, "validation")["validation"].to_list()
    for row, video, subject in zip(rows, videos, subjects, strict=True):
        row |= {"video": video, "subject": subject}
    if case == "videos":  # a row without a label needs no group, and its class is told to be absent
        rows = [{**row, "expression": -1, "video": None} if row["expression"] == 3 else row for row in rows]
    (tmp_path / "data/data").mkdir(parents=True)
    file = str(tmp_path / "data/data/validation-00000-of-00001.parquet")
    Dataset.from_list(rows, features=schema.FEATURES).to_parquet(file)
    command = ["eval", "--model", str(checkpoint), "--data", str(tmp_path / "data")]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out/metrics.json").read_text())
    assert written["bootstrap"]["unit"] == unit
    shown = capsys.readouterr().out
    assert f"95 % interval over {unit} " in shown
    assert ("no rows of Fear" in shown) is (case == "videos")
    groups = {"videos": videos, "subjects": subjects, "images": None}[unit]
    if case == "videos":
        groups = [row["video"] for row in rows]
    probabilities = direct(checkpoint, schema.load(prepared, "validation")["validation"]["image"][:])
    labels = [row["expression"] for row in rows]
    expected = compute_metrics(labels, probabilities.argmax(1), probabilities, groups=groups)
    assert written["interval"] == expected["interval"]


def test_eval_scores_groups_of_people(checkpoint, prepared, tmp_path, capsys):
    rows = schema.load(prepared, "validation")["validation"].to_list()
    for row, subject in zip(rows, ["p1", "p2", "p2", None] * 4, strict=True):
        row["subject"] = subject
    (tmp_path / "data/data").mkdir(parents=True)
    file = str(tmp_path / "data/data/validation-00000-of-00001.parquet")
    Dataset.from_list(rows, features=schema.FEATURES).to_parquet(file)
    table = tmp_path / "people.csv"
    table.write_text("subject,age\np2,old\np3,young\n")
    command = ["eval", "--model", str(checkpoint), "--data", str(tmp_path / "data")]
    command += ["--out", str(tmp_path / "out"), "--groups", str(table)]
    assert main(command) == 0
    found = json.loads((tmp_path / "out/metrics.json").read_text())["per_group"]
    sizes = {name: one["samples"] for name, one in found["age"].items()}
    assert sizes == {"old": 8, "not stated": 8}
    assert "by age:" in capsys.readouterr().out

    for text, message in {
        "age\nold\n": "a column subject or video",
        "subject,age\np1,old\np1,young\n": "several rows",
        "subject,age\nnone of these,young\n": "no subject of the data",
    }.items():
        table.write_text(text)
        assert main(command) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("split", ["test", "unlabeled"])
def test_eval_needs_a_split_with_labels(split, checkpoint, prepared, tmp_path, capsys):
    command = ["eval", "--model", str(checkpoint), "--data", str(prepared), "--out", str(tmp_path / "out")]
    assert main([*command, "--split", split]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("fer: ")
    assert not (tmp_path / "out").exists()


# -- predict ----------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    """Return a folder of 5 images, some of them deeper or with capitals, and a file that is none."""
    root = tmp_path / "photos"
    (root / "deep.jpg").mkdir(parents=True)  # a folder, whatever its name
    for i, name in enumerate(("a.png", "b.PNG", "c.bmp", "deep.jpg/d.png", "e.png")):
        picture(i, 50, size=24).save(root / name, format=name.rsplit(".", 1)[1].upper())
    (root / "notes.txt").write_text("not an image")
    return root


def test_predict_as_text(checkpoint, photos, capsys):
    assert main(["predict", str(photos), "--model", str(checkpoint), "--batch-size", "2"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    files = [photos / name for name in ("a.png", "b.PNG", "c.bmp", "deep.jpg/d.png", "e.png")]
    assert [line[0] for line in lines] == [str(path) for path in files]
    probabilities = direct(checkpoint, [Image.open(path) for path in files])
    for line, row in zip(lines, probabilities, strict=True):
        assert line[1] == CLASSES[row.argmax()]
        assert float(line[2]) == pytest.approx(row.max(), abs=0.0051)


def test_predict_as_json_on_files_and_folders(checkpoint, photos, capsys):
    paths = [photos / "e.png", photos / "deep.jpg"]
    assert main(["predict", *map(str, paths), "--model", str(checkpoint), "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    files = [photos / "e.png", photos / "deep.jpg/d.png"]
    assert [one["file"] for one in found] == [str(path) for path in files]
    for one, row in zip(found, direct(checkpoint, [Image.open(path) for path in files]), strict=True):
        assert one["expression"] == CLASSES[row.argmax()]
        assert list(one["probabilities"]) == list(CLASSES)
        assert list(one["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-4)


def test_unreadable_files_are_named_and_skipped(checkpoint, photos, capsys, monkeypatch):
    whole = (photos / "a.png").read_bytes()
    (photos / "broken.png").write_bytes(whole[: len(whole) // 2])
    (photos / "empty.png").touch()
    upright = ImageOps.exif_transpose

    def fail(image):
        if image.size == (7, 7):
            raise struct.error("unpack requires a buffer of 4 bytes")
        return upright(image)

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    picture(1, 1, size=7).save(photos / "exif.tif")
    assert main(["predict", str(photos), "--model", str(checkpoint), "--batch-size", "1"]) == 1
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 5
    skipped = output.err.splitlines()
    assert len(skipped) == 4
    assert skipped[0].startswith(f"skipped {photos / 'broken.png'}: ")
    assert skipped[1].startswith(f"skipped {photos / 'empty.png'}: ")
    assert skipped[2] == f"skipped {photos / 'exif.tif'}: unpack requires a buffer of 4 bytes (struct.error)"
    assert skipped[3] == "3 of 8 files could not be read"


@pytest.mark.parametrize(
    ("name", "message"), [("absent.png", "no such file or folder"), ("none", "holds no images or videos")]
)
def test_paths_without_images(name, message, checkpoint, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    assert main(["predict", str(tmp_path / name), "--model", str(checkpoint)]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert str(tmp_path / name) in output.err
    assert not output.out


@pytest.mark.parametrize("command", ["predict", "eval"])
def test_a_missing_model_is_one_line(command, prepared, photos, tmp_path, capsys):
    absent = str(tmp_path / "absent")
    rest = (
        [str(photos)] if command == "predict" else ["--data", str(prepared), "--out", str(tmp_path / "out")]
    )
    assert main([command, *rest, "--model", absent]) == 2
    output = capsys.readouterr()
    *progress, told = output.err.splitlines()  # data that is read for the first time shows how far it is
    assert told == f"fer: no model folder {absent}; train one (`make demo`) or pass --model DIR"
    assert all("Generating" in line or not line for line in progress)
    assert not output.out


# -- submission -------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path):
    """A folder of videos, a template of them, and the prepared data: b shows no face, c nothing at all."""
    (tmp_path / "faces/a").mkdir(parents=True)
    (tmp_path / "faces/b").mkdir()
    (tmp_path / "faces/b/notes.txt").write_text("nobody was found")
    picture(3, 1, size=16).save(tmp_path / "faces/a/00002.png")
    (tmp_path / "labels.csv").write_text("video,expression,split\na,fear,test\nb,fear,test\nc,fear,test\n")
    options = ["--root", str(tmp_path / "faces"), "--labels", str(tmp_path / "labels.csv")]
    assert main(["data", "prepare", "frames", *options, "--out", str(tmp_path / "data")]) == 0
    rows = [f"{video}/{number:05d}.jpg," for video in "abc" for number in (1, 2)]
    (tmp_path / "template.txt").write_text("\n".join([FILE_HEADER, *rows, ""]))
    return tmp_path


@pytest.mark.parametrize(("fill", "filled"), [("nearest", "Neutral"), ("Other", "Other")])
def test_videos_of_a_template_without_a_face_are_filled_and_told(fill, filled, asked, checkpoint, capsys):
    """From images and from prepared data: the same file, the same exit status."""
    where = ["--template", str(asked / "template.txt"), "--fill", fill, "--model", str(checkpoint)]
    told = {}
    for name, flag in {"faces": "--frames", "data": "--data"}.items():
        capsys.readouterr()
        given = [flag, str(asked / name), "--out", str(asked / f"{name}.txt")]
        assert main(["submission", "make", *where, *given]) == 1
        said = capsys.readouterr()
        assert f"6 frames of 3 videos; 5 filled ({fill})" in said.out
        told[name] = said.err
    assert f"b is without a readable face: filled with {filled}" in told["faces"]
    assert f"c is not among the videos given: filled with {filled}" in told["faces"]
    for video in "bc":
        assert f"{video} is not in the data, or without a face: filled with {filled}" in told["data"]
    written = (asked / "faces.txt").read_text()
    assert written == (asked / "data.txt").read_text()
    assert [int(line[-1]) for line in written.splitlines()[3:]] == [CLASSES.index(filled)] * 4


def test_what_a_submission_cannot_be_made_of_is_told(asked, checkpoint, capsys):
    where = ["--template", str(asked / "template.txt"), "--model", str(checkpoint), "--out", str(asked / "x")]
    for root in ("nowhere", "labels.csv"):
        frames = ["--frames", str(asked / "faces"), str(asked / root)]
        capsys.readouterr()
        assert main(["submission", "make", *where, *frames]) == 2
        assert capsys.readouterr().err == (
            f"fer: no folder {asked / root}: give --frames folders that hold a folder of images per video\n"
        )
    with pytest.raises(SystemExit):
        main(["submission", "make", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "a video without any prediction is Neutral under nearest" in said


# -- the grammar ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["0", "-1", "many"])
def test_a_batch_holds_at_least_one_image(size, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["predict", "x.png", "--batch-size", size])
    assert stop.value.code == 2
    assert "--batch-size" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [[], ["data"], ["data", "prepare"], ["data", "prepare", "nonsense"], ["eval"]]
)
def test_an_incomplete_command_is_refused(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    assert "usage: fer" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_listed_and_explains_itself(command, capsys):
    for words in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
        assert COMMANDS[command].lower() in " ".join(capsys.readouterr().out.lower().split())


def test_the_package_runs_as_a_module_and_help_imports_no_command():
    code = """
import runpy, sys
sys.argv = ["fer", "--help"]
try:
    runpy.run_module("modeling_fer.cli", run_name="__main__")
except SystemExit as stop:
    print(stop.code, [name for name in sys.modules if name.startswith("modeling_fer.cli.")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first.startswith("usage: fer ")
    assert last == "0 []"


def test_the_installed_command(checkpoint, photos):
    script = Path(sys.executable).with_name("fer")
    if not script.exists():
        pytest.skip("the package is not installed")
    command = [script, "predict", photos / "c.bmp", "--model", checkpoint, "--json"]
    done = subprocess.run(command, cwd=photos, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["file"] == str(photos / "c.bmp")
    assert done.stderr == ""
