import itertools
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modeling_fer.data.drawing.face import Actions, Identity, View
from modeling_fer.data.drawing.face import Face as Drawn
from modeling_fer.data.drawing.render import render
from modeling_fer.data.sources.videos import decode as frames_of
from modeling_fer.video import faces
from modeling_fer.video.faces import (
    CROPS,
    NO_FACE,
    Crop,
    Detector,
    Face,
    align,
    crops,
    find_detector,
    similarity,
)

cv2 = pytest.importorskip("cv2")

SHARED = Path(__file__).parents[3] / "shared"
YUNET = SHARED / "models" / "face_detection_yunet_dynamic.onnx"
MEDIA = SHARED / "data" / "media"
needs_shared = pytest.mark.skipif(
    not (YUNET.is_file() and MEDIA.is_dir()), reason=f"needs YuNet and photographs in {SHARED}"
)
ARCFACE = np.array(CROPS["arcface112"].points)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def at(points, box=(0, 0, 1, 1), score=0.9):
    return Face(tuple(map(float, box)), np.asarray(points, dtype=float), score)


def turned(points, angle, scale=1.0, shift=(0.0, 0.0)):
    """Points turned by an angle (positive: clockwise in the image), scaled and shifted."""
    cos, sin = math.cos(angle), math.sin(angle)
    return scale * np.asarray(points) @ np.array([[cos, sin], [-sin, cos]]) + shift


def mapped(matrix, points):
    return np.asarray(points) @ matrix[:, :2].T + matrix[:, 2]


def squares(matrix, source, target):
    return ((mapped(matrix, source) - target) ** 2).sum()


numbers = st.floats(-100, 100)
five = st.lists(st.tuples(numbers, numbers), min_size=5, max_size=5).map(np.array)


# --- The similarity ---


@given(st.floats(-math.pi, math.pi), st.floats(0.01, 100), st.tuples(numbers, numbers))
def test_a_similarity_that_exists_is_found(angle, scale, shift):
    source = turned(ARCFACE, angle, scale, shift)
    np.testing.assert_allclose(mapped(similarity(source, ARCFACE), source), ARCFACE, atol=1e-9)


@given(five, five)
def test_it_is_the_one_of_least_squares(source, target):
    if np.ptp(source, axis=0).max() < 1e-3:
        return
    x, y = source.T
    one, zero = np.ones(5), np.zeros(5)
    rows = np.concatenate([np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)])
    (a, b, s, t), *_ = np.linalg.lstsq(rows, target.T.ravel(), rcond=None)
    expected = np.array([[a, -b, s], [b, a, t]])
    found = similarity(source, target)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@given(five, five)
def test_it_is_what_umeyama_finds_by_singular_values(source, target):
    if np.ptp(source, axis=0).max() < 1e-3:
        return
    centred, goal = source - source.mean(0), target - target.mean(0)
    u, d, v = np.linalg.svd(goal.T @ centred / 5)
    sign = np.array([1, 1 if np.linalg.det(u) * np.linalg.det(v) > 0 else -1])
    turn = (d * sign).sum() / centred.var(0).sum() * u @ np.diag(sign) @ v
    theirs = np.column_stack([turn, target.mean(0) - turn @ source.mean(0)])
    ours = similarity(source, target)
    least = squares(theirs, source, target)
    assert squares(ours, source, target) == pytest.approx(least, rel=1e-6, abs=1e-6)


def test_points_without_extent_are_refused():
    with pytest.raises(ValueError, match="no extent"):
        similarity(np.full((5, 2), 3.0), ARCFACE)


# --- Conventions ---


def test_arcface_is_that_of_112_pixels():
    x, y = (38.2946, 73.5318, 56.0252, 41.5493, 70.7299), (51.6963, 51.5014, 71.7366, 92.3655, 92.2041)
    # The middle of the first pixel is 0 there, 0.5 here.
    np.testing.assert_allclose(ARCFACE * 112 - 0.5, np.stack([x, y], 1))


@pytest.mark.parametrize("margin", [-0.2, 0.0, 0.25, 1.0])
def test_a_margin_shows_more_on_every_side(margin):
    points = turned(ARCFACE, 0.4, 50, (30, 20))
    plain, wide = (Crop("arcface112", margin=m).matrix(at(points)) for m in (0.0, margin))
    side = 1 / np.linalg.norm(plain[:, 0])
    assert 1 / np.linalg.norm(wide[:, 0]) == pytest.approx(side * (1 + 2 * margin))
    middle = np.linalg.solve(plain[:, :2], 0.5 - plain[:, 2])
    np.testing.assert_allclose(mapped(wide, [middle]), [[0.5, 0.5]])
    box = Crop("box", margin=margin).matrix(at(points, (10, 20, 30, 40)))  # a square of 40 around (25, 40)
    reach = 20 + 40 * margin
    corners = [(25 - reach, 40 - reach), (25 + reach, 40 + reach)]
    np.testing.assert_allclose(mapped(box, corners), [(0, 0), (1, 1)], atol=1e-12)


@pytest.mark.parametrize(
    "crop", [*CROPS.values(), Crop("box", margin=0.1), Crop("mine", tuple(map(tuple, ARCFACE * 0.9)), 0.2)]
)
def test_a_crop_is_written_to_a_configuration_and_read_back(crop, make_model, tmp_path):
    model = make_model(crop=crop.to_dict())
    model.config.save_pretrained(tmp_path)
    stored = type(model.config).from_pretrained(tmp_path).crop
    assert Crop.from_dict(stored) == crop
    if crop.name in CROPS:
        assert Crop.from_dict({"name": crop.name, "margin": crop.margin}) == crop


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "does not say how to crop faces"),
        ({}, "does not say how to crop faces"),
        ({"name": "box", "size": 3}, "crop knows name, points, margin; got size"),
        ({"margin": 0.1}, "crop takes a name"),
        ({"name": "mine"}, "points or be one of arcface112, box, got 'mine'"),
        ({"name": "mine", "points": [[0, 0, 1]] * 5}, "five points"),
        ({"name": "mine", "points": 3}, "five points"),
        ({"name": "mine", "points": [[0, 0], [1, 1]]}, "must be five"),
        ({"name": "mine", "points": [[0.5, 0.2]] * 5}, "that differ"),
        ({"name": "mine", "points": [[0, math.nan], *[[1, 1]] * 4]}, "must be five"),
        ({"name": "box", "points": ARCFACE.tolist()}, "'box' has other points"),
        ({"name": "arcface112", "points": (ARCFACE * 2).tolist()}, "'arcface112' has other points"),
        ({"name": "box", "margin": -0.5}, "above -0.5"),
        ({"name": "box", "margin": 1.5}, "at most 1"),
        ({"name": "box", "margin": math.nan}, "margin"),
        ({"name": "box", "margin": "wide"}, "margin"),
    ],
)
def test_a_wrong_crop_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Crop.from_dict(values)


# --- Alignment ---


def test_a_box_that_fits_is_cut_out_pixel_by_pixel():
    image = noise(30, 40)
    face = at(ARCFACE, (7, 5, 16, 16))
    np.testing.assert_array_equal(align(image, face, 16, CROPS["box"]), image[5:21, 7:23])
    wide = align(image, face, 20, Crop("box", margin=0.125))  # two more on each side
    np.testing.assert_array_equal(wide, image[3:23, 5:25])
    small = align(image, face, 4, CROPS["box"]).astype(float)
    np.testing.assert_allclose(small, image[5:21, 7:23].reshape(4, 4, 4, 4, 3).mean((1, 3)), atol=0.51)


def test_landmarks_on_the_template_leave_a_face_as_it_is():
    image = noise(112, 112)
    np.testing.assert_array_equal(align(image, at(ARCFACE * 112), 112, CROPS["arcface112"]), image)


def test_a_quarter_turn_is_undone_exactly():
    image = noise(64, 64)
    on_its_side = np.rot90(image, -1)  # clockwise: (x, y) goes to (64 - y, x)
    points = ARCFACE * 64
    face = at(np.stack([64 - points[:, 1], points[:, 0]], 1))
    np.testing.assert_array_equal(align(on_its_side, face, 64, CROPS["arcface112"]), image)


@settings(deadline=None, max_examples=50)
@given(
    st.floats(-math.pi, math.pi),
    st.floats(0.3, 4),
    st.floats(-20, 80),
    st.floats(-20, 80),
    st.integers(8, 60),
)
def test_pixels_are_those_of_a_bilinear_look_up_with_a_repeated_border(angle, side, x, y, size):
    """By definition: where each averaged point lies, and the weighted mean of its four neighbours."""
    image = noise(50, 60)
    face = at(turned(ARCFACE, angle, side * size, (x, y)))
    fine = max(1, math.ceil(1 / (1 / side) - 1e-9))
    matrix = CROPS["arcface112"].matrix(face) * size
    centres = (np.arange(size * fine) + 0.5) / fine
    grid = np.stack(np.meshgrid(centres, centres), -1)
    where = (grid - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T - 0.5
    first = np.floor(where).astype(int)
    part = where - first
    total = np.zeros((size * fine, size * fine, 3))
    for dx, dy in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weight = np.abs(1 - dx - part[..., 0]) * np.abs(1 - dy - part[..., 1])
        rows, columns = np.clip(first[..., 1] + dy, 0, 49), np.clip(first[..., 0] + dx, 0, 59)
        total += weight[..., None] * image[rows, columns]
    expected = total.reshape(size, fine, size, fine, 3).mean((1, 3))
    if abs(side - round(side)) < 1e-6:  # as many points as pixels, or one more: both are right
        return
    found = align(image, face, size, CROPS["arcface112"])
    assert found.shape == (size, size, 3)
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found, expected, atol=0.51)


def test_beyond_the_border_the_outermost_pixels_are_repeated():
    image = noise(20, 20)
    corner = align(image, at(ARCFACE, (-8, -8, 16, 16)), 16, CROPS["box"])
    np.testing.assert_array_equal(corner, np.pad(image, ((8, 0), (8, 0), (0, 0)), "edge")[:16, :16])
    corner = align(image, at(ARCFACE, (12, 12, 16, 16)), 16, CROPS["box"])
    np.testing.assert_array_equal(corner, np.pad(image, ((0, 8), (0, 8), (0, 0)), "edge")[12:, 12:])
    outside = align(image, at(ARCFACE, (40, 0, 16, 16)), 16, CROPS["box"])
    np.testing.assert_array_equal(outside, np.repeat(image[:16, -1:], 16, axis=1))


def drawn_face(roll):
    """A drawn face, uint8 (192, 192, 3), turned by `roll`, and its landmarks in head units."""
    who = Identity.sample(np.random.default_rng(3))
    view = View(
        roll=roll, scale=0.8, background=(0.5, 0.5, 0.5), backdrop=(0.5, 0.5, 0.5), light_y=0.0, ambient=1.0
    )
    pixels = render([Drawn(who, Actions(), view)], 192)[0]
    eye, mouth, nose = who.eye_y, who.mouth_y, who.eye_y + who.nose_length
    points = [
        (-who.eye_spacing, eye),
        (who.eye_spacing, eye),
        (0, nose),
        (-who.mouth_width, mouth),
        (who.mouth_width, mouth),
    ]
    return pixels, points


def test_a_drawn_face_turned_by_30_degrees_is_turned_back():
    angle = math.radians(30)
    (upright, points), (tilted, _) = drawn_face(0.0), drawn_face(angle)
    assert np.abs(upright.astype(float) - tilted).mean() > 15
    unit = 0.8 * 192 / 2
    straight, leaning = (at(turned(points, a, unit, (96, 96 - 0.1 * unit))) for a in (0.0, angle))
    for crop in (CROPS["arcface112"], Crop("arcface112", margin=-0.1)):
        expected = align(upright, straight, 96, crop).astype(float)
        found = align(tilted, leaning, 96, crop).astype(float)
        middle = np.s_[24:80, 24:72]  # the face itself: hair and shoulders are no part of the turn
        assert np.abs(found - expected)[middle].mean() < 2
        wrong = align(tilted, straight, 96, crop).astype(float)
        assert np.abs(wrong - expected)[middle].mean() > 20


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((9, 9), np.uint8),
        np.zeros((9, 9, 4), np.uint8),
        np.zeros((9, 9, 3)),
        np.zeros((0, 9, 3), np.uint8),
    ],
)
def test_what_is_no_rgb_image_is_refused(image, detector_of):
    with pytest.raises(ValueError, match="expected an RGB image"):
        align(image, at(ARCFACE), 8, CROPS["box"])
    with pytest.raises(ValueError, match="expected an RGB image"):
        detector_of({}).detect(image)


impossible = pytest.mark.parametrize(
    ("face", "crop"),
    [
        (at(np.full((5, 2), 4.0)), CROPS["arcface112"]),
        (at(ARCFACE, (3, 3, 0, 0)), CROPS["box"]),
        (at(ARCFACE, (3, 3, 1e6, 1e6)), CROPS["box"]),
        (at(ARCFACE, (3, 3, math.nan, 2)), CROPS["box"]),
        (at(ARCFACE, (math.inf, 3, 2, 2)), CROPS["box"]),
        (at(ARCFACE * 1e6), CROPS["arcface112"]),
        (at(ARCFACE * math.nan), CROPS["arcface112"]),
        (at(ARCFACE * 10, (3, 3, math.nan, 2)), CROPS["arcface112"]),
        (at(ARCFACE * 10, (3, 3, 2, 0)), CROPS["arcface112"]),
    ],
)


@impossible
def test_a_face_of_no_possible_size_is_refused(face, crop):
    with pytest.raises(ValueError, match=r"no extent|no face's"):
        align(noise(20, 20), face, 16, crop)


@impossible
def test_what_has_no_possible_size_is_found_as_no_face(face, crop):
    image, real = noise(20, 20), at(ARCFACE * 10 + 5, (5, 5, 10, 10))
    shade = int(image[0, 0, 0])
    (alone,) = crops([Image.fromarray(image)], Scripted({shade: [face]}), 16, crop)
    assert (alone.face, alone.pixels, alone.reason) == (None, None, NO_FACE)
    (other,) = crops([Image.fromarray(image)], Scripted({shade: [face, real]}), 16, crop)
    assert (other.face, other.reason) == (real, None)


# --- Detection ---


@pytest.fixture
def detector_of(tmp_path, monkeypatch):
    """Return a builder of detectors whose network is replaced: it gives the rows of each size."""

    def make(rows, **options):
        asked = []

        class Network:
            def setInputSize(self, size):  # noqa: N802, OpenCV's name
                self.size = size

            def detect(self, bgr):
                asked.append(bgr)
                found = rows.get(bgr.shape[1::-1])
                return 1, None if found is None else np.array(found, np.float32)

        class Factory:
            @staticmethod
            def create(framework, data, config, size, score, overlap):
                assert (framework, bytes(data)) == ("onnx", b"weights")
                network = Network()
                network.options = score, overlap
                return network

        monkeypatch.setattr(cv2, "FaceDetectorYN", Factory)
        path = tmp_path / "détecteur.onnx"
        path.write_bytes(b"weights")
        detector = Detector(path, **options)
        asked.clear()
        detector.asked = asked
        return detector

    return make


def row(x, y, w, h, score):
    """What YuNet says of a face: its box, landmarks in it, and its score."""
    points = np.array([(0.3, 0.4), (0.7, 0.4), (0.5, 0.6), (0.35, 0.8), (0.65, 0.8)]) * (w, h) + (x, y)
    return [x, y, w, h, *points.ravel(), score]


def test_faces_come_largest_first_with_landmarks_in_pixels(detector_of):
    found = detector_of(
        {(200, 150): [row(5, 5, 20, 30, 0.95), row(80, 40, 40, 50, 0.8), row(150, 9, 20, 30, 0.75)]}
    )
    image = noise(150, 200)
    big, one, other = found.detect(image)
    assert big.box == (80, 40, 40, 50)
    assert big.score == pytest.approx(0.8)
    np.testing.assert_allclose(big.landmarks[0], (92, 60), atol=1e-4)
    assert big.landmarks.shape == (5, 2)
    assert (one.box[0], other.box[0]) == (5, 150)
    (seen,) = found.asked
    np.testing.assert_array_equal(seen, image[..., ::-1])  # YuNet is asked in BGR


def test_no_face_is_an_empty_list_and_settings_reach_the_network(detector_of):
    detector = detector_of({}, score=0.4, overlap=0.5)
    assert detector.detect(noise(200, 200)) == []
    assert detector._net.options == (0.4, 0.5)


@pytest.mark.parametrize(
    ("shape", "searched"),
    [
        ((1, 1), [(128, 128)]),
        ((48, 48), [(128, 128)]),
        ((64, 30), [(60, 128)]),
        ((300, 500), [(500, 300)]),
        ((480, 640), [(640, 480)]),
        ((600, 800), [(800, 600), (400, 300)]),
        ((1080, 1920), [(1280, 720), (640, 360)]),
        ((3, 4000), [(1280, 1), (640, 1)]),
    ],
)
def test_images_of_any_size_are_searched_at_sizes_that_yunet_can_see(detector_of, shape, searched):
    detector = detector_of({})
    detector.detect(noise(*shape))
    assert [image.shape[1::-1] for image in detector.asked] == searched


def test_coordinates_are_those_of_the_image_whatever_size_was_searched(detector_of):
    detector = detector_of(
        {(1280, 720): [row(100, 200, 60, 80, 0.9)], (640, 360): [row(400, 90, 150, 200, 0.9)]}
    )
    big, small = detector.detect(noise(1440, 2560))
    np.testing.assert_allclose(big.box, (1600, 360, 600, 800))
    np.testing.assert_allclose(small.box, (200, 400, 120, 160))
    np.testing.assert_allclose(small.landmarks[2], (260, 496), atol=1e-3)
    (tiny,) = detector_of({(128, 64): [row(40, 16, 32, 32, 0.9)]}).detect(noise(16, 32))
    np.testing.assert_allclose(tiny.box, (10, 4, 8, 8))


def test_one_face_found_at_two_sizes_is_one_and_parts_of_a_large_one_are_none(detector_of):
    twice = {(1200, 800): [row(100, 100, 90, 120, 0.8)], (600, 400): [row(51, 50, 44, 61, 0.9)]}
    (face,) = detector_of(twice).detect(noise(800, 1200))
    assert face.score == pytest.approx(0.9)
    parts = {
        (1200, 800): [row(200, 100, 310, 310, 0.99), row(500, 300, 200, 301, 0.99), row(0, 0, 300, 90, 0.8)],
        (600, 400): [row(100, 20, 250, 350, 0.85)],
    }
    large, small = detector_of(parts).detect(noise(800, 1200))
    assert large.box == (200, 40, 500, 700)
    assert small.box == (0, 0, 300, 90)
    neighbours = {
        (600, 400): [row(0, 0, 100, 100, 0.9), row(60, 0, 100, 100, 0.8), row(130, 0, 100, 100, 0.7)]
    }
    assert len(detector_of(neighbours).detect(noise(400, 600))) == 3  # 0.25 and 0.18 are shared
    assert len(detector_of(neighbours, overlap=0.2).detect(noise(400, 600))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": 1.5}, "score must be"),
        ({"overlap": -1}, "overlap must be"),
        ({"longest": 64}, "at least 128"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Detector("any.onnx", **options)


@pytest.mark.parametrize("data", [b"", b"version https://git-lfs.github.com/spec/v1\n", bytes(range(256))])
def test_a_damaged_detector_is_named_with_the_remedy(tmp_path, data):
    path = tmp_path / "yunet.onnx"
    path.write_bytes(data)
    before = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_FATAL)  # no level that the code knows
    with pytest.raises(ValueError, match=r"yunet\.onnx is no YuNet .*opencv/face_detection_yunet"):
        Detector(path)
    assert cv2.utils.logging.setLogLevel(before) == cv2.utils.logging.LOG_LEVEL_FATAL


def test_without_opencv_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match=r'pip install "abaw-fer\[video\]"'):
        Detector("any.onnx")


# --- The detector's file ---


def cache_file(root, name):
    """Lay a file into a cache as the Hub's client does."""
    repository = root / "models--opencv--face_detection_yunet"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    path = repository / "snapshots" / "abc" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    return path


def test_a_given_detector_comes_first_then_that_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached = cache_file(tmp_path, faces.FILES[1])
    given = tmp_path / "mine.onnx"
    given.write_bytes(b"weights")
    monkeypatch.setattr(faces, "hf_hub_download", None)  # nobody asks the network
    assert find_detector(str(given)) == given
    assert find_detector() == cached
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.onnx: .*--detector"):
        find_detector(str(tmp_path / "absent.onnx"))


def test_what_is_not_cached_is_fetched_by_the_name_that_the_hub_has(monkeypatch):
    asked = []

    def download(repository, name):
        asked.append((repository, name))
        if name == faces.FILES[0]:
            raise RemoteEntryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
        return os.path.join("cache", name)

    monkeypatch.setattr(faces, "hf_hub_download", download)
    assert find_detector() == Path("cache", faces.FILES[1])
    assert asked == [("opencv/face_detection_yunet", name) for name in faces.FILES]


@pytest.mark.parametrize("kind", [None, LocalEntryNotFoundError, PermissionError, RuntimeError])
def test_without_a_detector_both_ways_to_one_are_told(monkeypatch, kind):
    if kind is not None:  # otherwise the client itself, which is offline in tests

        def fail(*_):
            raise kind("the reason")

        monkeypatch.setattr(faces, "hf_hub_download", fail)
    with pytest.raises(FileNotFoundError) as caught:
        find_detector()
    for words in (
        "--detector PATH",
        "hf download opencv/face_detection_yunet",
        *(["the reason"] if kind else []),
    ):
        assert words in str(caught.value)


# --- From files to crops ---


class Scripted:
    """A detector that says of an image, told by its first pixel, what a test wrote down for it."""

    def __init__(self, said):
        self.said = said

    def detect(self, rgb):
        return self.said.get(int(rgb[0, 0, 0]), [])


def test_every_face_is_a_result_and_so_is_none(tmp_path):
    image = noise(60, 80)
    shades = {"two.png": 10, "none.png": 20, "grey.png": 30}
    for name, shade in shades.items():
        image[0, 0] = shade
        Image.fromarray(image).convert("L" if name == "grey.png" else "RGBA").save(tmp_path / name)
    (tmp_path / "bad.png").write_bytes(b"no image")
    first, second = at(ARCFACE * 40 + 5, (5, 5, 40, 40)), at(ARCFACE * 20 + 30, (30, 30, 20, 20), 0.8)
    detector = Scripted({10: [first, second], 30: [first]})
    paths = [tmp_path / name for name in ("two.png", "none.png", "absent.png", "bad.png", "grey.png")]
    found = list(crops(paths, detector, 16, CROPS["arcface112"]))
    assert [(r.image.name, r.face) for r in found] == [
        ("two.png", first),
        ("two.png", second),
        ("none.png", None),
        ("absent.png", None),
        ("bad.png", None),
        ("grey.png", first),
    ]
    assert [r.reason for r in found[:3]] == [None, None, NO_FACE]
    assert "No such file" in found[3].reason
    assert found[4].reason == "no image of a known format"
    for result in found:
        assert (result.pixels is None) == (result.face is None) == (result.reason is not None)
    rgb = np.asarray(Image.open(paths[0]).convert("RGB"))
    np.testing.assert_array_equal(
        found[1].pixels, align(rgb, second, 16, CROPS["arcface112"]).transpose(2, 0, 1)
    )
    assert (found[5].pixels == found[5].pixels[:1]).all()  # grey stays grey


def test_photographs_are_turned_upright_and_opened_images_taken_as_well():
    image = noise(40, 30)
    image[0, 0] = 10
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: its rows are the photograph's columns
    lying = Image.fromarray(np.rot90(image).copy())
    lying.getexif().update(exif)
    face = at(ARCFACE, (4, 8, 16, 16))
    (result,) = crops([lying], Scripted({10: [face]}), 16, CROPS["box"])
    assert result.image is lying
    np.testing.assert_array_equal(result.pixels.transpose(1, 2, 0), image[8:24, 4:20])


# --- YuNet itself ---


@pytest.fixture(scope="module")
def yunet():
    return Detector(YUNET)


def photograph(name):
    return np.asarray(Image.open(MEDIA / name).convert("RGB"))


@needs_shared
@pytest.mark.parametrize(
    ("name", "count"), [("multi_face.jpg", 5), ("single_face.jpg", 1), ("no_face.jpg", 0)]
)
def test_every_face_of_the_photographs_is_found_at_its_template(yunet, name, count):
    image = photograph(name)
    found = yunet.detect(image)
    assert len(found) == count
    assert [face.area for face in found] == sorted((face.area for face in found), reverse=True)
    results = list(crops([MEDIA / name], yunet, 112, CROPS["arcface112"]))
    assert [r.reason for r in results] == [None] * count or [r.reason for r in results] == [NO_FACE]
    for result in results[:count]:
        (again, *_) = yunet.detect(result.pixels.transpose(1, 2, 0))
        assert np.abs(again.landmarks / 112 - ARCFACE).max() < 0.09


@needs_shared
@pytest.mark.parametrize("angle", [-30, -15, 15, 30])
def test_a_turned_photograph_gives_the_same_crop(yunet, angle):
    upright = Image.open(MEDIA / "single_face.jpg").convert("RGB")
    pair = [np.asarray(image) for image in (upright, upright.rotate(angle, Image.Resampling.BICUBIC))]
    found = [yunet.detect(image)[0] for image in pair]
    middle = np.array(upright.size) / 2
    expected = turned(found[0].landmarks - middle, -math.radians(angle), 1, middle)
    assert np.abs(found[1].landmarks - expected).max() < 0.1 * found[0].box[2]
    alike = {}
    for name, crop in CROPS.items():
        one, two = (align(*shown, 64, crop)[8:56, 8:56].ravel() for shown in zip(pair, found, strict=True))
        alike[name] = np.corrcoef(one, two)[0, 1]
    assert alike["arcface112"] > 0.75
    assert alike["arcface112"] > alike["box"] + 0.15


@needs_shared
@pytest.mark.parametrize("width", [70, 300, 1300, 4000])
def test_a_face_is_found_once_in_the_same_place_at_every_size(yunet, width):
    image = Image.open(MEDIA / "single_face.jpg").convert("RGB")
    (reference,) = yunet.detect(np.asarray(image))
    scale = width / image.width
    (found,) = yunet.detect(np.asarray(image.resize((width, round(image.height * scale)))))
    box = np.array(reference.box)
    assert np.abs(found.landmarks / scale - reference.landmarks).max() < 0.1 * box[2]
    assert np.abs(np.array(found.box) / scale - box).max() < 0.15 * box[3]


@needs_shared
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("single_face.mp4", [1, 1]),
        ("no_face.mp4", [0, 0]),
        ("face_noface.mov", [1, 0]),
        ("noface_face.mov", [0, 1]),
        ("people_pexels.mp4", [1, 1]),
    ],
)
def test_faces_come_and_go_in_films(yunet, name, counts):
    pytest.importorskip("av")
    later = 120 if "noface" in name else 60  # the face goes or comes between frames 75 and 105
    some = itertools.islice(frames_of(MEDIA / name), 0, later + 1, later)
    assert [len(yunet.detect(np.asarray(frame.to_image()))) for _, frame in some] == counts
