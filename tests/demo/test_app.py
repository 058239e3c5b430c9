"""What the Space computes, without its page; a detector of our own finds bright squares."""

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import recognition
from conftest import SIZE, picture
from pictures import COLOURS, bars_figure, boxed, boxed_video, timeline_figure
from PIL import Image
from recognition import Camera, Recognizer, load, look, read_photo, read_video, summary
from test_temporal import video_model
from transformers import ViTImageProcessor

from modeling_fer.cli.videos import predict_video, read_frames
from modeling_fer.data.pixels import decode
from modeling_fer.labels import CLASSES
from modeling_fer.learning.inference import load_model
from modeling_fer.video.faces import Detector, Face
from modeling_fer.video.table import Row

av = pytest.importorskip("av")

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
YUNET = SHARED / "models" / "face_detection_yunet_dynamic.onnx"
PHOTO = SHARED / "data" / "media" / "multi_face.jpg"


class Squares:
    """Finds the squares of `scene`, of any colour: what is not black."""

    def __init__(self, path=None):
        pass

    def detect(self, rgb):
        faces = []
        for first in (0, rgb.shape[1] // 2):  # at most one in each half
            half = rgb[:, first : first + rgb.shape[1] // 2].max(2) > 20
            if half.any():
                ys, xs = np.flatnonzero(half.any(1)), np.flatnonzero(half.any(0))
                x, y, w, h = first + xs[0], ys[0], np.ptp(xs) + 1, np.ptp(ys) + 1
                landmarks = np.array([(x, y), (x + w, y), (x + w / 2, y + h / 2), (x, y + h), (x + w, y + h)])
                faces.append(Face((float(x), float(y), float(w), float(h)), landmarks.astype(float), 0.9))
        return sorted(faces, key=lambda face: -face.area)


def scene(*squares, size=(96, 64)):
    """A black image with the picture of a class at each (class, x, y, side)."""
    image = Image.new("RGB", size)
    for expression, x, y, side in squares:
        image.paste(picture(expression, 0, side), (x, y))
    return image


def write_video(path, images, rate=10, layout="yuv444p"):
    """A video of images, hardly compressed, whose contents come first: cut, its beginning can be read."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "4", "g": "1"})
        stream.width, stream.height, stream.pix_fmt = *images[0].size, layout
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


def with_crop(model):
    model.config.crop = {"name": "box", "margin": 0.0}
    return model


def processor():
    return ViTImageProcessor(
        size={"height": SIZE, "width": SIZE}, image_mean=[0.5, 0.4, 0.6], image_std=[0.5, 0.3, 0.4]
    )


@pytest.fixture(autouse=True)
def _squares(monkeypatch):
    monkeypatch.setattr(recognition, "Detector", Squares)


@pytest.fixture
def stills(make_model):
    return Recognizer("org/stills", with_crop(make_model()), processor(), Path("none.onnx"))


@pytest.fixture(params=[False, True], ids=["both ways", "causal"])
def videos(request):
    return of_videos(causal=request.param)


@pytest.fixture(params=["stills", "both ways", "causal"])
def recognizer(request, stills):
    return stills if request.param == "stills" else of_videos(causal=request.param == "causal")


def of_videos(causal):
    model = video_model(causal=causal, num_frames=32)
    model.config.postprocess = {"smoothing": "box", "half_width": 2, "temperature": 1.5}
    return Recognizer("org/videos", with_crop(model), processor(), Path("none.onnx"))


# --- Model ---


def test_a_model_is_loaded_from_a_folder_and_from_the_environment(checkpoint, tmp_path, monkeypatch):
    folder, detector = tmp_path / "model", tmp_path / "detector.onnx"
    model, loaded = load_model(checkpoint)
    with_crop(model).save_pretrained(folder)
    loaded.save_pretrained(folder)
    detector.touch()
    named = load(str(folder), str(detector))
    monkeypatch.setenv("FER_MODEL", str(folder))
    monkeypatch.setenv("FER_DETECTOR", str(detector))
    assert load().name == named.name == str(folder)
    assert load().detector == detector
    face = np.asarray(picture(3, 0, SIZE))
    assert load().judge(face) == named.judge(face)
    assert not named.sees_motion


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, r"no model: checkpoints/abaw-fer-small is not there; name a folder"),
        ("org/none", "org/none is no folder, and the Hub does not give it"),
        ("a b", "a b is no folder, and the Hub does not give it"),
        ("{folder}", "crop"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused(model, message, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FER_MODEL", raising=False)
    shutil.copytree(checkpoint, tmp_path / "model")
    with pytest.raises((ValueError, OSError), match=message):
        load(model and model.format(folder=tmp_path / "model"))


def test_what_a_model_is_called_is_not_taken_for_markup(stills):
    described = recognition.describe(Recognizer("<script>", stills.model, stills.processor, Path()))
    assert "<script>" not in described
    assert "&lt;script&gt;" in described


# --- Photographs ---


def test_each_face_of_a_photograph_is_judged_as_its_crop(stills, tmp_path):
    photo = scene((4, 5, 10, 20), (1, 60, 20, 30))
    photo.save(tmp_path / "photo.png")
    image, rows, crops = read_photo(stills, tmp_path / "photo.png")
    assert image.size == photo.size
    assert [row.box for row in rows] == [(60, 20, 30, 30), (5, 10, 20, 20)]  # the largest first
    assert [row.face for row in rows] == [0, 1]
    for row, crop in zip(rows, crops, strict=True):
        (direct,) = predict_video(stills.model, stills.processor, [(1, 0.0, crop)])
        assert row.probabilities == direct.probabilities
        assert sum(row.probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert rows[0].probabilities != rows[1].probabilities


def test_a_photograph_is_turned_upright(stills, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    scene((4, 0, 0, 20)).save(tmp_path / "photo.png", exif=exif)
    image, rows, _ = read_photo(stills, tmp_path / "photo.png")
    assert image.size == (64, 96)
    assert rows[0].box == (44, 0, 20, 20)


def test_a_photograph_without_a_face_is_a_result(stills, tmp_path):
    scene().save(tmp_path / "photo.png")
    assert read_photo(stills, tmp_path / "photo.png")[1:] == ([Row(1, 0.0)], [])


def test_what_is_found_without_an_extent_is_no_face(stills, tmp_path, monkeypatch):
    class Flat(Squares):
        def detect(self, rgb):
            return [Face((3.0, 3.0, 0.0, 0.0), np.full((5, 2), 3.0), 0.9)]

    monkeypatch.setattr(recognition, "Detector", Flat)
    scene().save(tmp_path / "photo.png")
    assert read_photo(stills, tmp_path / "photo.png")[1:] == ([Row(1, 0.0)], [])
    assert [row.face for row in read_video(stills, write_video(tmp_path / "video.mp4", moving(2)))[0]] == [
        None
    ] * 2
    assert look(stills, Camera(Flat(), start=0.0), np.asarray(scene()), 1.0) == Row(1, 1.0)


def test_bad_photographs_are_refused(stills, tmp_path, monkeypatch):
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match="no image of a known format"):
        read_photo(stills, tmp_path / "text.jpg")
    scene().save(tmp_path / "photo.png")
    monkeypatch.setattr(recognition, "PIXELS", 6000)
    with pytest.raises(ValueError, match="million pixels"):
        read_photo(stills, tmp_path / "photo.png")


# --- Videos ---


def moving(count=12, empty=()):
    """A face that moves and changes, in a video without it in the frames `empty`."""
    return [scene(*([] if i in empty else [(i // 4 + 1, 5 + i, 10, 24)])) for i in range(count)]


def test_a_video_is_judged_as_by_the_command(recognizer, tmp_path):
    path = write_video(tmp_path / "video.mp4", moving(empty=(5, 6)))
    told = []
    rows, remarks = read_video(recognizer, path, told.append)
    frames = read_frames(path, lambda what, reason: None)
    assert rows == list(predict_video(recognizer.model, recognizer.processor, frames, Squares()))
    assert remarks == []
    assert [row.face is None for row in rows] == [i in (5, 6) for i in range(12)]
    assert told == pytest.approx([i / 10 for i in range(12)])
    text = summary(rows, remarks)
    assert text.startswith("10 of 12 frames show a face. Most often: ")


def test_bad_videos_are_refused_or_their_rest_is_used(stills, tmp_path, monkeypatch):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"^the video: unreadable video") as error:
        read_video(stills, tmp_path / "text.mp4")
    assert str(tmp_path) not in str(error.value)
    whole = write_video(tmp_path / "whole.mp4", moving()).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    rows, remarks = read_video(stills, tmp_path / "cut.mp4")
    assert 0 < len(rows) < 12
    assert "Left out: the video after frame" in summary(rows, remarks)
    for name, value in {"SECONDS": 1, "FRAMES": 11}.items():
        with monkeypatch.context() as patch:
            patch.setattr(recognition, name, value)
            with pytest.raises(ValueError, match="the video is longer than"):
                read_video(stills, tmp_path / "whole.mp4")


def test_a_video_without_a_face_says_so(stills, tmp_path):
    rows, _ = read_video(stills, write_video(tmp_path / "video.mp4", moving(3, empty=range(3))))
    assert summary(rows).startswith("No face: none is found in 3 frames.")


# --- Cameras ---


def test_a_camera_is_judged_like_the_video_that_it_has_shown(recognizer):
    camera = Camera(Squares(), start=100.0)
    frames = []
    for i, image in enumerate(moving(14, empty=(5, 6, 11))):
        frames.append((i + 1, i / 7, np.asarray(image)))
        row = look(recognizer, camera, frames[-1][2], 100 + i / 7)
        expected = list(predict_video(recognizer.model, recognizer.processor, frames, Squares()))[-1]
        assert (row.frame, row.face, row.box) == (expected.frame, expected.face, expected.box)
        assert row.seconds == pytest.approx(expected.seconds)
        assert row.probabilities == pytest.approx(expected.probabilities, abs=1e-5)
    assert camera.rows[-1] == row
    assert len(camera.rows) == 14


def test_a_camera_forgets_what_is_long_ago(videos, monkeypatch):
    monkeypatch.setattr(recognition, "REMEMBERED", 40)
    camera = Camera(Squares(), start=0.0)
    rgb = np.asarray(scene((4, 5, 10, 24)))
    for i in range(45):
        look(videos, camera, rgb, i / 30)
    assert len(camera.rows) == 40
    assert camera.rows[-1].frame == 45
    assert len(camera.features) == videos.model.config.num_frames


def test_another_face_does_not_remember_the_first(videos):
    camera = Camera(Squares(), start=0.0)
    for i in range(4):
        look(videos, camera, np.asarray(scene((4, 5, 10, 24))), i / 30)
    for i in range(4, 24):  # longer than the tracker is patient
        look(videos, camera, np.asarray(scene()), i / 30)
    row = look(videos, camera, np.asarray(scene((1, 60, 10, 24))), 1.0)
    assert row.face == 1
    crop = videos.cut(
        np.asarray(scene((1, 60, 10, 24))), Squares().detect(np.asarray(scene((1, 60, 10, 24))))[0]
    )
    assert row.probabilities == pytest.approx(videos.judge(crop), abs=1e-5)


# --- Pictures ---


def rows_of(*tracks, start=0.0):
    """Rows a tenth of a second apart, of a track's number or None."""
    rng = np.random.default_rng(len(tracks))
    return [
        Row(i + 1, start + i / 10)
        if track is None
        else Row(
            i + 1, start + i / 10, track, (5.0, 10.0, 24.0, 24.0), dict(zip(CLASSES, values, strict=True))
        )
        for i, (track, values) in enumerate(zip(tracks, rng.dirichlet(np.ones(8), len(tracks)), strict=True))
    ]


def test_a_box_is_drawn_around_each_face_and_nowhere_else():
    image = Image.new("RGB", (96, 64))
    row = dataclasses.replace(rows_of(0)[0], box=(5.0, 30.0, 24.0, 24.0))
    drawn = np.asarray(boxed(image, [row, Row(1, 0.0)]))
    colour = tuple(bytes.fromhex(COLOURS[row.expression][1:]))
    assert (drawn[40, [5, 29]] == colour).all()
    assert (drawn[54, 10:20] == colour).all()
    assert drawn[10:29].any()  # the name
    assert not drawn[56:].any()
    assert not drawn[32:52, 8:26].any()  # the face itself
    assert not np.asarray(image).any()


def test_a_boxed_video_has_the_frames_of_its_rows(tmp_path):
    path = write_video(tmp_path / "video.mp4", [image.resize((1300, 700)) for image in moving(6)])
    rows = rows_of(0, 0, None, 0, 0)
    out = boxed_video(path, rows, tmp_path / "out.mp4")
    frames = [(seconds, rgb) for _, seconds, rgb in read_frames(out, pytest.fail)]
    assert [seconds for seconds, _ in frames] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4], abs=1e-3)
    assert {rgb.shape for _, rgb in frames} == {(344, 640, 3)}
    with av.open(str(out)) as container:
        assert container.streams.video[0].codec_context.name == "h264"


def test_a_timeline_is_blank_where_there_is_no_face():
    rows = rows_of(0, 0, 0, None, None, 1, 1)
    (axes,) = timeline_figure(rows, CLASSES).axes
    areas = [c.get_paths()[0].get_extents() for c in axes.collections if c.get_paths()]
    ends = {(round(area.x0, 3), round(area.x1, 3)) for area in areas}
    assert ends == {(0.0, 0.3), (0.5, 0.6)}
    assert len(areas) == 2 * len(CLASSES)
    assert timeline_figure(rows_of(0), CLASSES).axes
    assert timeline_figure(rows_of(None), CLASSES).axes


def test_bars_show_every_probability_of_the_first_faces():
    rows = rows_of(*range(10))
    figure = bars_figure(rows, [np.zeros((SIZE, SIZE, 3), np.uint8)] * 10)
    panels = figure.axes[1::2]
    assert len(panels) == 8
    for row, axes in zip(rows, panels, strict=False):
        assert [bar.get_width() for bar in axes.patches] == list(row.probabilities.values())


def test_the_static_page_has_the_same_colours():
    script = (ROOT / "demo/web/app.js").read_text(encoding="utf-8")
    table = script[script.index("COLOURS = {") : script.index("};")]
    assert dict(re.findall(r'(\w+): "(#\w{6})"', table)) == COLOURS
    assert tuple(COLOURS) == CLASSES


# --- A real detector ---


@pytest.mark.skipif(
    not (YUNET.is_file() and PHOTO.is_file()), reason=f"needs YuNet and a photograph in {SHARED}"
)
def test_faces_of_a_real_photograph(stills, monkeypatch):
    pytest.importorskip("cv2")
    monkeypatch.setattr(recognition, "Detector", Detector)
    recognizer = Recognizer("stills", stills.model, stills.processor, YUNET)
    image, rows, crops = read_photo(recognizer, PHOTO)
    assert len(rows) == len(crops) == 5
    assert image.size == decode_size(PHOTO)


def decode_size(path):
    with Image.open(path) as image:
        return image.size


def test_the_detector_of_these_tests_finds_squares():
    found = Squares().detect(np.asarray(scene((4, 5, 10, 20), (1, 60, 20, 30))))
    assert [face.box for face in found] == [(60, 20, 30, 30), (5, 10, 20, 20)]
    assert decode(scene(), SIZE).shape == (3, SIZE, SIZE)
