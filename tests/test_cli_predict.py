"""`fer predict` on photographs and videos: faces found, cut out as the model was trained, named by frame."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from test_temporal import video_model
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging

from modeling_fer import CLASSES
from modeling_fer.cli import main, predict, videos
from modeling_fer.cli.videos import find_faces, predict_video, read_frames
from modeling_fer.data.augment import Normalize
from modeling_fer.data.sources.videos import MissingFramesError, UnreadableVideoError
from modeling_fer.learning.inference import load_model, predict_probabilities
from modeling_fer.video.faces import Crop, Detector, Face, align

SHARED = Path(__file__).parents[2] / "shared"
CROP = {"name": "box", "points": None, "margin": 0.25}


@pytest.fixture(autouse=True)
def _verbosity():
    """Put back what the command switches off for its own process."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.fixture
def stills(checkpoint, tmp_path):
    """Return the folder of a model of stills that says how faces are cut out."""
    return with_crop(shutil.copytree(checkpoint, tmp_path / "stills"))


@pytest.fixture
def temporal(checkpoint, tmp_path):
    """Return the folder of a model of videos."""
    folder = tmp_path / "temporal"
    model = video_model(
        frame_rate=10.0,
        postprocess={"smoothing": "box", "half_width": 2},
        id2label=dict(enumerate(CLASSES[:5])),
    )
    model.save_pretrained(folder)
    shutil.copy(checkpoint / "preprocessor_config.json", folder)
    return with_crop(folder)


def test_a_model_of_videos_looks_at_no_mirror_images(temporal, tmp_path, capsys):
    assert main(["predict", str(tmp_path), "--model", str(temporal), "--mirror"]) == 2
    assert f"{temporal} is a model of videos, which looks at no mirror images" in capsys.readouterr().err


def test_a_stock_model_answers_but_looks_at_no_mirror_images(checkpoint, tmp_path, capsys):
    stock = tmp_path / "stock"
    names = dict(enumerate(CLASSES))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = ViTConfig(**sizes, image_size=16, patch_size=8, id2label=names)
    ViTForImageClassification(config).save_pretrained(stock)
    shutil.copy(checkpoint / "preprocessor_config.json", stock)
    Image.fromarray(noise()).save(tmp_path / "a.png")
    command = ["predict", str(tmp_path / "a.png"), "--model", str(stock)]
    assert main(command) == 0
    assert main([*command, "--mirror"]) == 2
    assert "is a ViTForImageClassification, which looks at no mirror images" in capsys.readouterr().err


def with_crop(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "crop": CROP}))
    return folder


def at(x, y, side):
    return Face((float(x), float(y), float(side), float(side)), np.zeros((5, 2)), 0.9)


class Scripted:
    """A detector that finds in one image after the other what a test wrote down, then nothing more."""

    def __init__(self, *found):
        self.found = iter(found)

    def detect(self, rgb):
        return next(self.found, [])


@pytest.fixture
def detector(monkeypatch, tmp_path):
    """Return what makes the command's detector find the faces of a test, and the flags to ask for it."""

    def script(*found):
        path = tmp_path / "detector.onnx"
        path.touch()
        monkeypatch.setattr(
            predict.faces, "Detector", lambda given: Scripted(*found) if given == path else None
        )
        return ["--detect", "--detector", str(path)]

    return script


def noise(height=40, width=60, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def film(path, count, rate=10):
    """Write a video of noise, `rate` frames a second."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        for number in range(count):
            shade = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(shade.repeat(8, 0).repeat(8, 1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def frames_of(path):
    """All that the codec left of a video's frames."""
    found = list(read_frames(path, lambda what, reason: pytest.fail(f"{what}: {reason}")))
    return [rgb for _, _, rgb in found]


def probabilities(folder, pixels):
    model, processor = load_model(folder)
    return predict_probabilities(
        model, np.stack(pixels), Normalize(processor.image_mean, processor.image_std)
    )


def cut(rgb, face, size=16):
    return align(rgb, face, size, Crop.from_dict(CROP)).transpose(2, 0, 1)


def objects(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# -- photographs ------------------------------------------------------------------------------------


def test_every_face_of_a_photograph_has_a_line_with_its_box(stills, tmp_path, detector, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(("a.png", "b.png", "c.png")):
        Image.fromarray(noise(seed=number)).save(folder / name)
    found = [at(5, 6, 30), at(40.4, 2, 15)], [], [at(1, 1, 20)]
    command = ["predict", str(folder), "--model", str(stills), "--batch-size", "2"]
    assert main([*command, *detector(*found)]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    shown = [(folder / "a.png", 0, found[0][0]), (folder / "a.png", 0, found[0][1])]
    shown += [(folder / "c.png", 2, found[2][0])]
    expected = probabilities(stills, [cut(noise(seed=seed), face) for _, seed, face in shown])
    assert lines.pop(2) == [str(folder / "b.png"), "no face"]
    assert [line[:3] for line in lines] == [
        [str(path), ",".join(str(round(v)) for v in face.box), CLASSES[p.argmax()]]
        for (path, _, face), p in zip(shown, expected, strict=True)
    ]
    assert main([*command, "--json", *detector(*found)]) == 0
    said = objects(capsys)
    assert said[2] == {"file": str(folder / "b.png"), "box": None, "expression": None, "probabilities": None}
    assert said[1]["box"] == [40, 2, 15, 15]
    assert list(said[1]["probabilities"].values()) == pytest.approx(expected[1].tolist(), abs=1e-4)


def test_no_face_is_a_result_and_an_unreadable_file_is_none(stills, tmp_path, detector, capsys):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    command = ["predict", "--model", str(stills)]
    assert main([*command, str(tmp_path / "a.png"), *detector()]) == 0
    assert main([*command, str(tmp_path / "a.png"), str(tmp_path / "b.png"), *detector()]) == 1
    output = capsys.readouterr()
    assert output.out.splitlines() == [f"{tmp_path / 'a.png'}\tno face"] * 2
    assert output.err.splitlines() == [
        f"skipped {tmp_path / 'b.png'}: no image of a known format",
        "1 of 2 files could not be read",
    ]


@pytest.mark.skipif(
    not (SHARED / "models").is_dir(), reason=f"needs YuNet and a photograph of five people in {SHARED}"
)
def test_the_faces_that_yunet_finds(stills, tmp_path, capsys):
    pytest.importorskip("cv2")
    path, photo = (
        SHARED / "models/face_detection_yunet_dynamic.onnx",
        SHARED / "data/media/multi_face.jpg",
    )
    found = Detector(path).detect(np.asarray(Image.open(photo).convert("RGB")))
    command = ["predict", str(photo), "--model", str(stills), "--detect", "--detector", str(path)]
    assert main([*command, "--json"]) == 0
    said = objects(capsys)
    assert len(said) == 5
    assert [one["box"] for one in said] == [[round(value) for value in face.box] for face in found]


def test_a_detector_needs_a_crop_and_the_flag(checkpoint, stills, tmp_path, capsys):
    picture(0, 0).save(tmp_path / "a.png")
    command = ["predict", str(tmp_path / "a.png"), "--model"]
    for argv, message in (
        ([str(checkpoint), "--detect"], "does not say how to crop faces: add to its config.json"),
        ([str(stills), "--detector", "x.onnx"], "pass --detect as well"),
        ([str(stills), "--detect", "--detector", "x.onnx"], "no file x.onnx"),
    ):
        assert main([*command, *argv]) == 2
        output = capsys.readouterr()
        assert message in output.err
        assert output.err.count("\n") == 1
        assert not output.out


# -- videos -----------------------------------------------------------------------------------------


def test_a_video_frame_by_frame_by_a_model_of_stills(stills, tmp_path, detector, capsys):
    path = film(tmp_path / "film.mp4", 5)
    small, large = at(4, 4, 20), at(30, 10, 30)
    none, odd = at(4, 4, 0), at(40, 40, float("nan"))
    command = ["predict", str(path), "--model", str(stills), "--batch-size", "2"]
    found = [small], [none], [large, odd, small], [large], []
    assert main([*command, *detector(*found)]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    frames = frames_of(path)
    shown = [(0, "0", small), (2, "0", small), (2, "1", large), (3, "1", large)]
    expected = probabilities(stills, [cut(frames[i], face) for i, _, face in shown])
    said = [
        [number, ",".join(str(round(v)) for v in face.box), CLASSES[p.argmax()], f"{p.max():.2f}"]
        for (_, number, face), p in zip(shown, expected, strict=True)
    ]
    assert [line[:2] for line in lines] == [[str(path), f"{0.1 * i:.3f}"] for i in (0, 1, 2, 2, 3, 4)]
    assert [line[2:] for line in lines] == [said[0], ["no face"], *said[1:], ["no face"]]
    assert main([*command, "--json", *detector(*found)]) == 0
    assert [(one["frame"], one["face"], one["box"] is None) for one in objects(capsys)] == [
        (1, 0, False), (2, None, True), (3, 0, False), (3, 1, False), (4, 1, False), (5, None, True)
    ]  # fmt: skip


def test_without_detect_the_frames_are_face_crops(stills, tmp_path, capsys):
    path = film(tmp_path / "film.MP4", 3)
    picture(1, 1, 24).save(tmp_path / "still.png")
    paths = [str(path), str(tmp_path / "still.png")]
    assert main(["predict", *paths, "--model", str(stills), "--json"]) == 0
    said = objects(capsys)
    assert [one.get("seconds") for one in said] == [0, 0.1, 0.2, None]
    assert [one.get("frame") for one in said] == [1, 2, 3, None]
    assert all("box" not in one and "face" not in one for one in said)
    resized = [Image.fromarray(rgb).resize((16, 16), Image.Resampling.BILINEAR) for rgb in frames_of(path)]
    expected = probabilities(stills, [np.asarray(image).transpose(2, 0, 1) for image in resized])
    for one, p in zip(said, expected, strict=False):
        assert list(one["probabilities"].values()) == pytest.approx(p.tolist(), abs=1e-4)


def whole(folder, pixels, mask, seconds):
    """What the model says of all frames at once, by its own forward pass."""
    model, processor = load_model(folder)
    normalize = Normalize(processor.image_mean, processor.image_std)
    values = normalize(torch.from_numpy(np.stack(pixels)))
    mask, times = torch.tensor(mask)[None], torch.tensor(seconds, dtype=torch.float64)[None]
    with torch.no_grad():
        logits = model(values[None], frame_mask=mask, frame_times=times).frame_logits
        return model.postprocess(logits, mask, times * model.config.frame_rate)[0].numpy()


def test_a_model_of_videos_sees_the_frames_with_a_face_and_the_others_are_absent(
    temporal, tmp_path, detector, capsys
):
    path = film(tmp_path / "film.mp4", 9)
    face = at(8, 8, 25)
    there = [True, True, False, True, False, False, True, True, True]
    command = ["predict", str(path), "--model", str(temporal), "--batch-size", "4", "--json"]
    assert main([*command, *detector(*([face] if shown else [] for shown in there))]) == 0
    said = objects(capsys)
    assert [one["box"] is not None for one in said] == there
    pixels = [
        cut(rgb, face) if shown else cut(rgb, face) * 0
        for rgb, shown in zip(frames_of(path), there, strict=True)
    ]
    expected = whole(temporal, pixels, there, [one["seconds"] for one in said])
    assert list(said[0]["probabilities"]) == list(CLASSES[:5])
    found = [list(one["probabilities"].values()) for one in said if one["box"]]
    np.testing.assert_allclose(found, expected[there], atol=2e-3)  # features are kept in float16
    alone = [whole(temporal, [p], [True], [0.0])[0] for p, shown in zip(pixels, there, strict=True) if shown]
    assert np.abs(found - np.stack(alone)).max() > 0.05, "neighbours matter"


def test_two_people_one_after_the_other_are_videos_of_their_own(temporal):
    model, processor = load_model(temporal)
    frames = [(n + 1, n / 10, noise(60, 80, seed=n)) for n in range(8)]
    first, second = at(0, 0, 30), at(45, 20, 35)
    rows = list(predict_video(model, processor, frames, Scripted(*[[first]] * 4, *[[second]] * 4)))
    assert [row.face for row in rows] == [0] * 4 + [1] * 4
    for half, face in ((range(4), first), (range(4, 8), second)):
        pixels = [cut(frames[i][2], face) for i in half]
        expected = whole(temporal, pixels, [True] * 4, [frames[i][1] for i in half])
        found = [list(rows[i].probabilities.values()) for i in half]
        np.testing.assert_allclose(found, expected, atol=2e-3)


def test_two_people_at_once_are_videos_of_their_own(temporal, tmp_path, detector, capsys):
    path = film(tmp_path / "film.mp4", 8)
    faces = at(0, 0, 20), at(30, 10, 25)
    there = [[True, True, False, True, True, False, True, True], [False] * 2 + [True] * 6]
    found = [[faces[n] for n in (1, 0) if there[n][i]] for i in range(8)]
    command = ["predict", str(path), "--model", str(temporal), "--batch-size", "3", "--json"]
    assert main([*command, *detector(*found)]) == 0
    said = objects(capsys)
    frames = [one["frame"] for one in said]
    assert frames == sorted(frames)
    for number, face in enumerate(faces):
        own = [one for one in said if one["face"] == number]
        places = [i for i in range(8) if there[number][i]]
        assert [one["frame"] - 1 for one in own] == places
        assert {tuple(one["box"]) for one in own} == {tuple(map(round, face.box))}
        pixels = [cut(frames_of(path)[i], face) for i in places]
        expected = whole(temporal, pixels, [True] * len(own), [one["seconds"] for one in own])
        rows = [list(one["probabilities"].values()) for one in own]
        np.testing.assert_allclose(rows, expected, atol=2e-3)


def test_of_several_faces_one_is_followed_unless_every_one_is_asked_for(stills):
    model, processor = load_model(stills)
    frames = [(n + 1, n / 10, noise(60, 80, seed=n)) for n in range(3)]
    small, large = at(0, 0, 20), at(40, 20, 35)
    scripts = [[small], [small, large], [large]]
    rows = list(predict_video(model, processor, frames, Scripted(*scripts)))
    assert [row.face for row in rows] == [0, 0, 1]
    rows = list(predict_video(model, processor, frames, Scripted(*scripts), every_face=True))
    assert [(row.frame, row.face) for row in rows] == [(1, 0), (2, 0), (2, 1), (3, 1)]


def test_rows_of_a_model_of_stills_come_while_the_video_is_read(stills):
    """Nothing is kept of what was said, so that a long video needs no memory."""
    read = []

    def frames():
        for number in range(1, 10):
            read.append(number)
            yield number, 0.1 * number, noise(seed=number)

    rows = predict_video(*load_model(stills), frames(), Scripted(*[[at(0, 0, 9)]] * 9), batch_size=3)
    assert [next(rows).frame for _ in range(4)] == [1, 2, 3, 4]
    assert read == [1, 2, 3, 4, 5, 6]


@pytest.mark.skipif(not (SHARED / "models").is_dir(), reason=f"needs YuNet and a video in {SHARED}")
def test_the_face_of_a_real_video_keeps_its_number(stills, capsys):
    pytest.importorskip("cv2")
    pytest.importorskip("av")
    path = SHARED / "data/media/single_face.mp4"
    command = ["predict", str(path), "--model", str(stills), "--detect", "--json"]
    assert main([*command, "--detector", str(SHARED / "models/face_detection_yunet_dynamic.onnx")]) == 0
    said = objects(capsys)
    assert [one["frame"] for one in said] == list(range(1, 73))
    assert {one["face"] for one in said} == {0}


def test_a_video_without_any_face(temporal, tmp_path, detector, capsys):
    path = film(tmp_path / "film.mp4", 3)
    assert main(["predict", str(path), "--model", str(temporal), *detector()]) == 0
    assert [line.split("\t")[2] for line in capsys.readouterr().out.splitlines()] == ["no face"] * 3


def test_a_model_of_videos_is_for_videos(temporal, tmp_path, capsys):
    picture(0, 0).save(tmp_path / "a.png")
    assert main(["predict", str(tmp_path / "a.png"), "--model", str(temporal)]) == 2
    message = capsys.readouterr().err
    assert "is a model of videos" in message
    assert str(tmp_path / "a.png") in message


def test_an_unreadable_video_is_named_and_the_rest_goes_on(stills, tmp_path, capsys):
    good = film(tmp_path / "good.mp4", 2)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    paths = [str(tmp_path / "bad.mp4"), str(good)]
    assert main(["predict", *paths, "--model", str(stills)]) == 1
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 2
    assert output.err.splitlines()[0].startswith(f"skipped {paths[0]}: unreadable video (")
    assert output.err.splitlines()[1] == "1 of 2 files could not be read"


def test_a_video_that_is_read_in_part_is_no_unreadable_one(stills, monkeypatch, tmp_path, capsys):
    good, bad = (0.0, 10, False, 0), (0.1, 20, True, 0)
    (tmp_path / "x.mp4").touch()
    command = ["predict", str(tmp_path / "x.mp4"), "--model", str(stills)]
    for frames, error, code, last in (
        ([good, bad], None, 0, "1 of 1 files could be read in part only"),
        ([good], UnreadableVideoError("bad packet"), 0, "1 of 1 files could be read in part only"),
        ([bad], None, 1, "1 of 1 files could not be read"),
    ):
        decoded(monkeypatch, frames, error)
        assert main(command) == code
        output = capsys.readouterr()
        assert len(output.out.splitlines()) == frames.count(good)
        skipped, told = output.err.splitlines()
        assert skipped.startswith(f"skipped {tmp_path / 'x.mp4'} ")
        assert told == last


def decoded(monkeypatch, frames, error=None):
    """Make the decoder yield (time, shade, corrupt, rotation), then fail."""

    def decode(path):
        for time, shade, corrupt, rotation in frames:
            image = Image.fromarray(np.array([[[shade] * 3, [0] * 3]], np.uint8))  # 1 high, 2 wide
            yield time, SimpleNamespace(is_corrupt=corrupt, rotation=rotation, to_image=lambda i=image: i)
        if error is not None:
            raise error

    monkeypatch.setattr(videos, "decode", decode)


def test_frames_that_cannot_be_used_are_told_and_left_out(monkeypatch, tmp_path, capsys):
    good = (0.0, 10, False, 0), (0.2, 30, True, 0), (0.2, 40, False, 90), (0.2, 50, False, 0)
    decoded(monkeypatch, good, UnreadableVideoError("bad packet"))
    told = []
    found = list(read_frames(tmp_path / "x.mp4", lambda *words: told.append(words)))
    assert [(number, seconds) for number, seconds, _ in found] == [(1, 0.0), (3, 0.2)]
    assert found[1][2].shape == (2, 1, 3)  # upright
    assert found[1][2][1, 0, 0] == 40
    assert told == [
        (f"{tmp_path / 'x.mp4'} frame 2", "unreadable"),
        (f"{tmp_path / 'x.mp4'} frame 4", "its time, 0.200 s, is not after the last one's"),
        (f"{tmp_path / 'x.mp4'} after frame 4", "unreadable video (bad packet)"),
    ]
    assert not capsys.readouterr().err


def test_frames_that_a_file_announces_and_lacks_are_told_but_no_failure(monkeypatch, tmp_path, capsys):
    decoded(monkeypatch, [(0.0, 10, False, 0)], MissingFramesError("9 announced"))
    assert len(list(read_frames(tmp_path / "x.mp4", lambda *words: pytest.fail(str(words))))) == 1
    assert "fewer frames than the file announces (9 announced)" in capsys.readouterr().err


def test_faces_are_found_one_frame_at_a_time():
    """Nothing is read ahead, so that a long video needs no memory."""
    read = []

    def frames():
        for number in range(1, 4):
            read.append(number)
            yield number, 0.1 * number, noise(seed=number)

    found = find_faces(frames(), 8, Scripted([at(0, 0, 9)]), Crop("box"), every_face=True)
    row, pixels = next(found)
    assert (read, row.frame, row.box) == ([1], 1, (0, 0, 9, 9))
    assert pixels.shape == (3, 8, 8)
    assert dataclasses.replace(next(found)[0], seconds=0) == dataclasses.replace(
        row, frame=2, seconds=0, face=None, box=None
    )
