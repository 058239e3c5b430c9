"""The handler of Inference Endpoints: what it answers and refuses, and that it runs with the model alone."""

import base64
import json
import shutil
import struct
import textwrap
import tomllib
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL.PngImagePlugin import PngImageFile
from test_loading import WITHOUT_THE_PACKAGE, run
from test_pipeline import FRAMES, POST, encoded, film, processor
from test_temporal import video_model
from transformers import pipeline

from modeling_fer import CLASSES
from modeling_fer.hub import handler, release
from modeling_fer.hub.handler import EndpointHandler
from modeling_fer.hub.release import endpoint_files
from tests.test_train import ROOT


@pytest.fixture(scope="module")
def video_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("video") / "model"
    video_model(num_frames=8, postprocess=POST).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stills(checkpoint):
    return EndpointHandler(str(checkpoint))


@pytest.fixture(scope="module")
def videos(video_folder):
    return EndpointHandler(str(video_folder))


def png(image):
    return encoded("PNG", [image])


def text(data):
    return base64.b64encode(data).decode()


def ask(endpoint, inputs, **parameters):
    """What an endpoint answers, as it comes through JSON."""
    return json.loads(json.dumps(endpoint({"inputs": inputs, "parameters": parameters}), allow_nan=False))


def refusal(endpoint, inputs, **parameters):
    answer = ask(endpoint, inputs, **parameters)
    assert list(answer) == ["error"]
    return answer["error"]


# -- what it answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stills", "videos"])
def test_images_in_every_form(kind, request):
    endpoint = request.getfixturevalue(kind)
    data = png(FRAMES[3])
    [expected] = endpoint.classify(FRAMES[3])
    for inputs in (
        FRAMES[3],
        data,
        bytearray(data),
        text(data),
        base64.encodebytes(data).decode(),  # with line breaks
        f"data:image/png;base64,{text(data)}",
    ):
        assert ask(endpoint, inputs) == [expected]
    assert endpoint({"inputs": data}) == endpoint({"inputs": data, "parameters": None}) == [expected]


def test_a_list_of_images_is_answered_one_by_one(videos):
    images = [png(frame) for frame in FRAMES[:4]]
    expected = [videos.classify(frame) for frame in FRAMES[:4]]
    assert ask(videos, [text(image) for image in images]) == expected
    answers = ask(videos, [text(images[0]), "no base64!", text(b"no image"), text(images[3])])
    assert [answers[0], answers[3]] == [expected[0], expected[3]]
    assert "neither base64" in answers[1]["error"]
    assert "neither an image nor a video" in answers[2]["error"]


def test_models_of_stills_see_a_list_at_once(stills, videos):
    """And each is answered as if it came alone; what is bad among them is refused alone."""
    images = [png(frame) for frame in FRAMES[:6]]
    bad = {0: images[0][:25], 3: encoded("GIF", FRAMES[:2]), 7: b"no image"}
    for place, data in bad.items():
        images.insert(place, data)
    sizes = []
    for endpoint in (stills, videos):
        hook = endpoint.classify.model.fer.register_forward_hook(
            lambda model, inputs, output: sizes.append(len(output.pooler_output))
        )
        answers = ask(endpoint, [text(image) for image in images], frame_rate=10, top_k=2)
        hook.remove()
        for place, (answer, image) in enumerate(zip(answers, images, strict=True)):
            assert ("error" in answer) == (place in bad)
            if place not in bad:
                [row], [alone] = answer, ask(endpoint, image, frame_rate=10, top_k=2)
                assert row.pop("scores") == pytest.approx(alone.pop("scores"), abs=1e-6)
                assert row.pop("score") == pytest.approx(alone.pop("score"), abs=1e-6)
                assert row == alone
        assert [answers[place]["error"] for place in bad] == [
            refusal(endpoint, images[0]),
            "the input has more than 1 frames: cut it into parts",
            refusal(endpoint, images[7]),
        ]
    assert sizes == [6, *[1] * 6]
    assert all("error" in answer for answer in ask(stills, [text(b"no image")] * 3))
    answers = ask(stills, [text(images[1])] * 70)
    assert len(answers) == 70
    assert all(len(answer) == 1 for answer in answers)


@pytest.mark.parametrize("kind", ["stills", "videos"])
def test_videos_are_told_from_their_content(kind, request, tmp_path):
    endpoint = request.getfixturevalue(kind)
    data = (film(str(tmp_path / "v.mkv")), (tmp_path / "v.mkv").read_bytes())[1]
    expected = endpoint.classify(tmp_path / "v.mkv")
    assert len(expected) == len(FRAMES)
    assert ask(endpoint, text(data)) == expected
    assert ask(endpoint, f"data:image/png;base64,{text(data)}") == expected  # whatever it is called
    found = ask(endpoint, data, frame_rate=10, top_k=2, smooth=False)
    assert found == endpoint.classify(tmp_path / "v.mkv", frame_rate=10, top_k=2, smooth=False)
    assert found[5]["seconds"] == 0.5
    assert len(found[5]["scores"]) == 2


# -- what it refuses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "parameters", "words"),
    [
        ("/etc/passwd", {}, "neither base64 nor a data URL in base64; paths and addresses are not followed"),
        ("http://127.0.0.1:9/face.png", {}, "paths and addresses are not followed"),
        ("file:///etc/passwd", {}, "paths and addresses are not followed"),
        (text(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"), {}, "neither an image nor a video"),
        (text(b"ffconcat version 1.0\nfile /etc/passwd\n"), {}, "neither an image nor a video"),
        ("", {}, "inputs is empty"),
        ("data:image/png;base64,", {}, "inputs is empty"),
        (7, {}, "inputs must be an image, a video or a list of images, got int"),
        ({"image": "x"}, {}, "got dict"),
        ([], {}, "a list must have 1 to 256 images, got 0"),
        (["x"] * 257, {}, "a list must have 1 to 256 images, got 257"),
        ("", {"top_k": 0}, "top_k must be a whole number above 0, got 0"),
        ("", {"top_k": True}, "top_k must be a whole number above 0, got True"),
        ("", {"top_k": 2.5}, "top_k must be a whole number"),
        ("", {"top_k": 10**400}, "top_k must be a whole number"),
        ("", {"frame_rate": -1}, "frame_rate must be a number above 0, got -1"),
        ("", {"frame_rate": float("nan")}, "frame_rate must be a number above 0, got nan"),
        ("", {"frame_rate": "30"}, "frame_rate must be a number above 0, got '30'"),
        ("", {"smooth": 1}, "smooth must be true or false, got 1"),
        ("", {"max_frames": 10**9}, "parameters knows top_k, frame_rate, smooth; got max_frames"),
    ],
)
def test_what_is_refused(stills, inputs, parameters, words):
    assert words in refusal(stills, inputs, **parameters)


@pytest.mark.parametrize("data", [None, [], "x", {}, {"inputs": None}, {"input": "x"}])
def test_requests_without_inputs(stills, data):
    assert stills(data) == {
        "error": 'a request is {"inputs": ..., "parameters": {...}}; this one has no inputs'
    }


def test_parameters_that_are_no_object(stills):
    assert stills({"inputs": "", "parameters": [1]}) == {"error": "parameters must be an object, got list"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    ),
    st.none()
    | st.dictionaries(st.sampled_from(["top_k", "frame_rate", "smooth", "x"]), st.integers() | st.text()),
)
def test_no_request_breaks_it(stills, inputs, parameters):
    answer = stills({"inputs": inputs, "parameters": parameters})
    assert isinstance(answer, list) or (list(answer) == ["error"] and answer["error"])
    json.dumps(answer, allow_nan=False)  # what an endpoint sends back


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, 10**6), value=st.integers(0, 255), kept=st.floats(0, 1))
def test_no_damaged_file_breaks_it(videos, tmp_path_factory, place, value, kept):
    folder = tmp_path_factory.getbasetemp()
    for data in (png(FRAMES[0]), open_video(folder)):
        damaged = bytearray(data)
        damaged[place % len(data)] = value
        for sent in (bytes(damaged), data[: int(kept * len(data))]):
            answer = videos({"inputs": sent})
            assert isinstance(answer, list) or "error" in answer


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_cut_images_are_refused_alone(stills, kind):
    data, face = encoded(kind, FRAMES[:1]), png(FRAMES[1])
    cuts = [data[:size] for size in (25, 30, 100, 512) if size < len(data)]
    for cut in cuts:
        assert refusal(stills, cut).startswith("the input is ")
    answers = ask(stills, [text(one) for one in (face, *cuts, face)])
    assert ["error" in answer for answer in answers] == [False, *[True] * len(cuts), False]


def open_video(folder):
    if not (folder / "damage.mkv").exists():
        film(str(folder / "damage.mkv"), FRAMES[:3])
    return (folder / "damage.mkv").read_bytes()


# -- limits -------------------------------------------------------------------------------------------


def test_bytes_are_limited_before_they_are_decoded(stills, monkeypatch):
    face = png(FRAMES[0])
    monkeypatch.setattr(handler, "MAX_BYTES", len(face) + 10)
    assert len(ask(stills, face)) == 1
    said = f"inputs may have {len(face) + 10:,} bytes in all: send less"
    assert refusal(stills, face + bytes(11)) == said
    assert refusal(stills, text(bytes(10**6))) == said
    monkeypatch.setattr(base64, "b64decode", pytest.fail)
    assert refusal(stills, "A" * 10**6) == said
    monkeypatch.undo()
    monkeypatch.setattr(handler, "MAX_BYTES", 2 * len(face))
    answers = ask(stills, [text(face)] * 3)
    assert [isinstance(answer, list) for answer in answers] == [True, True, False]
    assert "bytes in all" in answers[2]["error"]


def test_a_picture_that_would_fill_the_memory_is_refused_unopened(stills, monkeypatch):
    monkeypatch.setattr(PngImageFile, "load", pytest.fail)
    for size, words in (((14_000, 13_000), "is too large: Image size"), ((4097, 4096), "4097 x 4096 pixels")):
        header = b"IHDR" + struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
        chunks = [header, b"IDAT" + zlib.compress(b""), b"IEND"]
        data = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
        assert words in refusal(stills, b"\x89PNG\r\n\x1a\n" + data)


def test_frames_are_limited(videos, tmp_path, monkeypatch):
    film(str(tmp_path / "v.mkv"))
    data = (tmp_path / "v.mkv").read_bytes()
    monkeypatch.setattr(handler, "MAX_FRAMES", len(FRAMES))
    assert len(ask(videos, data)) == len(FRAMES)
    monkeypatch.setattr(handler, "MAX_FRAMES", len(FRAMES) - 1)
    assert refusal(videos, data) == "the input has more than 20 frames: cut it into parts"
    [answer] = ask(videos, [text(data)])  # a list is of images
    assert "more than 1 frames" in answer["error"]
    monkeypatch.undo()
    monkeypatch.setattr(handler, "MAX_PIXELS", 24 * 24 - 1)
    assert "24 x 24 pixels, more than 575" in refusal(videos, data)


# -- beside the model -----------------------------------------------------------------------------------


def test_it_runs_with_what_is_pushed_and_nothing_else(checkpoint, video_folder, tmp_path):
    """As an endpoint does: a file loaded by its path; without the package, and what training needs."""
    film(str(tmp_path / "v.mkv"))
    (tmp_path / "face.png").write_bytes(png(FRAMES[3]))
    folders = {"stills": checkpoint, "videos": video_folder}
    for name, folder in folders.items():
        shutil.copytree(folder, tmp_path / name)
        for file, content in endpoint_files(folder).items():
            data = content if isinstance(content, bytes) else content.read_bytes()
            (tmp_path / name / file).write_bytes(data)
    hidden = ["peft", "datasets", "evaluate", "sklearn", "scipy", "matplotlib", "cv2", "torchvision"]
    run(
        WITHOUT_THE_PACKAGE
        + f"\nsys.modules.update(dict.fromkeys({hidden}))"
        + textwrap.dedent("""
        import importlib.util, json
        found = {}
        for name in ("stills", "videos"):
            spec = importlib.util.spec_from_file_location("handler", f"{name}/handler.py")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            endpoint = module.EndpointHandler(name)
            assert type(endpoint.classify).__module__.startswith("transformers_modules.")
            media = [open(file, "rb").read() for file in ("face.png", "v.mkv")]
            found[name] = [endpoint({"inputs": one}) for one in media]
        json.dump(found, open("found.json", "w"))
        """),
        tmp_path,
    )
    for name, answers in json.loads((tmp_path / "found.json").read_text()).items():
        classify = pipeline("facial-expression", model=str(folders[name]))
        for answer, file in zip(answers, ("face.png", "v.mkv"), strict=True):
            expected = classify(tmp_path / file)
            assert len(answer) == len(expected)
            for one, other in zip(answer, expected, strict=True):
                assert one["seconds"] == other["seconds"]
                ours, theirs = ([row["scores"][name] for name in CLASSES] for row in (one, other))
                np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_what_it_requires_is_what_the_package_was_tested_with():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = {*project["dependencies"], *project["optional-dependencies"]["video"]}
    pins = (ROOT / "constraints.txt").read_text().split()
    transformers, *others = release.REQUIREMENTS.decode().splitlines()
    # Older ones need torchvision for `pipeline`: the tested one, without its patch number.
    assert f"{transformers.replace('>=', '==')}.0" in pins
    assert set(others) <= floors
    assert {line.split(">")[0] for line in others} == {"pillow", "av"}


def test_stock_models_need_no_handler(checkpoint, tmp_path):
    assert set(endpoint_files(checkpoint)) == {"handler.py", "requirements.txt"}
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert endpoint_files(tmp_path) == {}
