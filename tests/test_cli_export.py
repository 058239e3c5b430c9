"""`fer export` on faces of every kind: it prints what `export` found, and nothing is left of failures."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import SIZE, picture
from transformers import AutoModelForImageClassification
from transformers.utils import logging

from modeling_fer.cli import export as exporting
from modeling_fer.cli import main
from modeling_fer.cli.export import DRAWN, MOST, faces_to_compare, some_of
from modeling_fer.data import schema
from modeling_fer.data.pixels import decode_split
from modeling_fer.hub.export import Agreement


@pytest.fixture(autouse=True)
def _verbosity():
    """Put back what the command switches off for its own process."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.fixture
def crops(tmp_path):
    """Return a folder of five face crops, one of them deeper."""
    root = tmp_path / "crops"
    (root / "deep").mkdir(parents=True)
    for number in range(5):
        picture(number, number, 24).save(root / ("deep" if number == 4 else "") / f"{number}.png")
    return root


def test_a_stock_model_with_its_agreement_on_given_faces(checkpoint, crops, tmp_path, capsys):
    out = tmp_path / "vit"
    command = ["export", str(checkpoint), "--format", "vit", "--out", str(out)]
    assert main([*command, "--check", str(crops)]) == 0
    compared, agreement, card, written = capsys.readouterr().out.splitlines()
    assert compared == f"compared on 5 of the 5 faces of {crops}"
    assert agreement.startswith("model.safetensors: largest probability difference ")
    assert agreement.endswith("same class 100.0%, over 5 examples")
    assert (
        card == f"no card: {checkpoint} has none; write one with `fer card {checkpoint}`, then export again"
    )
    assert written == f"written: {out}"
    assert type(AutoModelForImageClassification.from_pretrained(out)).__name__ == "ViTForImageClassification"
    assert main(command) == 2
    assert capsys.readouterr().err == f"fer: {out} is there already: delete it, or export to another folder\n"


def test_format_int8_and_faces_reach_the_export(checkpoint, tmp_path, monkeypatch, capsys):
    asked = []

    def export(model, processor, faces, *rest):
        Path(out).mkdir()
        (Path(out) / "README.md").write_text("a card")
        asked.append((type(model).__name__, len(faces), *rest))
        return [Agreement("a.onnx", 3, 1e-3, 1e-5, 1.0), Agreement("b.onnx", 3, 2e-3, 2e-5, 0.5)]

    monkeypatch.setattr(exporting, "export", export)
    out = str(tmp_path / "out")
    assert main(["export", str(checkpoint), "--format", "onnx", "vit", "--int8", "--out", out]) == 0
    assert asked == [("FerForImageClassification", DRAWN, out, ["onnx", "vit"], True, str(checkpoint))]
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"compared on {DRAWN} drawn faces; real ones: --check FACES"
    assert [line.split(":")[0] for line in shown[1:]] == ["a.onnx", "b.onnx", "card", "written"]
    assert "same class 50.0%" in shown[2]
    assert shown[3] == f"card: {out}/README.md"


def test_drawn_faces_are_of_every_class_and_of_the_models_size():
    faces, _ = faces_to_compare(None, SIZE)
    assert (faces.shape, faces.dtype) == ((DRAWN, 3, SIZE, SIZE), np.uint8)
    assert len({face.tobytes() for face in faces}) == DRAWN
    assert faces_to_compare(None, 8)[0].shape == (DRAWN, 3, 8, 8)  # smaller than a face can be drawn


def test_a_prepared_data_set_gives_its_validation_faces(prepared):
    rows = schema.load(prepared)["validation"]
    faces, told = faces_to_compare([str(prepared)], SIZE)
    np.testing.assert_array_equal(faces, decode_split(rows, SIZE, show_progress=False))
    assert told == f"16 of the 16 faces of {prepared}, validation"


@pytest.mark.parametrize("count", [1, 5, MOST, MOST + 1, 2 * MOST, 28_709])
def test_of_many_faces_some_are_taken_from_all_over(count):
    places = list(some_of(count))
    assert len(places) == count if count <= MOST else MOST / 2 < len(places) <= MOST
    assert places[0] == 0
    assert count - places[-1] <= np.diff([*places, count]).max()


def test_files_and_folders_may_be_mixed(crops):
    given = [str(crops / "deep"), str(crops / "0.png"), str(crops / "1.png")]
    faces, told = faces_to_compare(given, SIZE)
    assert faces.shape == (3, 3, SIZE, SIZE)
    assert told == f"3 of the 3 faces of {', '.join(given)}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "vit", "--int8"], "int8 weights are for models of stills in format onnx"),
        (["--format", "vit", "--check", "absent"], "no such file or folder: absent"),
        (["--format", "vit", "--check", "EMPTY"], "holds no images"),
        (["--format", "vit", "--check", "BROKEN"], "pass readable face crops to --check"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(options, message, checkpoint, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_text("no image")
    places = {"EMPTY": str(tmp_path / "empty"), "BROKEN": str(tmp_path / "broken.png")}
    words = [places.get(word, word) for word in options]
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "out"), *words]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("fer: ")
    assert message in output.err
    assert output.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_model_is_one_line(tmp_path, capsys):
    absent = str(tmp_path / "absent")
    assert main(["export", absent, "--format", "vit", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"fer: no model folder {absent}")


def test_a_format_is_needed_and_known(capsys):
    for words in ([], ["--format", "tflite"]):
        with pytest.raises(SystemExit) as stop:
            main(["export", "model", "--out", "out", *words])
        assert stop.value.code == 2
        assert "--format" in capsys.readouterr().err


def test_the_class_names_travel(checkpoint, tmp_path):
    assert main(["export", str(checkpoint), "--format", "vit", "--out", str(tmp_path / "out")]) == 0
    names = [
        json.loads((folder / "config.json").read_text())["id2label"]
        for folder in (checkpoint, tmp_path / "out")
    ]
    assert names[0] == names[1]
