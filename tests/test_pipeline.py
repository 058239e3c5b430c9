"""`pipeline("facial-expression")`: the frames that the package's own tools see, and the same numbers."""

import http.server
import io
import json
import shutil
import textwrap
import threading
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from conftest import SIZE, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.features import check as can_write
from test_loading import WITHOUT_THE_PACKAGE, run
from test_temporal import features, video_model
from transformers import (
    AutoModelForVideoClassification,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from modeling_fer import CLASSES, FacialExpressionPipeline, FerForImageClassification, FerModel
from modeling_fer.frames_fer import read_frames
from modeling_fer.learning.inference import load_model
from modeling_fer.learning.timelines import predict_folder, predict_frames, windows_of
from modeling_fer.pipeline_fer import frame_logits, positions_of, windows

POST = {"smoothing": "box", "half_width": 2, "temperature": 2.0, "bias": [0.5] + [0.0] * 7}
FRAMES = [picture(i % 8, i, size=24) for i in range(21)]


def processor():
    return ViTImageProcessor(
        size={"height": SIZE, "width": SIZE}, image_mean=[0.5, 0.4, 0.6], image_std=[0.5, 0.3, 0.4]
    )


@pytest.fixture(scope="module")
def video_folder(tmp_path_factory):
    """A checkpoint that looks both ways, with windows shorter than the videos, post-processed."""
    folder = tmp_path_factory.mktemp("both") / "model"
    video_model(num_frames=8, postprocess=POST).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classify(video_folder):
    return pipeline("facial-expression", model=str(video_folder))


def pixels(frames=FRAMES):
    return np.stack([np.asarray(frame) for frame in frames])


def scores(found, names=CLASSES):
    return np.array([[row["scores"][name] for name in names] for row in found])


def film(path, frames=FRAMES, rate=25, container=None, times=None):
    """Write frames as a video whose pixels come back as they were; `times` in thousandths of a second."""
    with av.open(path, "w", format=container) as file:
        codec, layout = ("png", "rgb24") if file.format.name == "mov" else ("ffv1", "bgr0")
        stream = file.add_stream(codec, rate=rate, width=24, height=24, pix_fmt=layout)
        stream.time_base = Fraction(1, 1000 if times else rate)
        for number, frame in enumerate(frames):
            shown = av.VideoFrame.from_ndarray(np.asarray(frame), format="rgb24").reformat(format=layout)
            shown.pts = times[number] if times else number
            file.mux(stream.encode(shown))
        file.mux(stream.encode())
    return path


# Formats of pictures that can move, with what keeps their colours.
PICTURES = {
    "GIF": {},
    "PNG": {},
    "WEBP": {"lossless": True},
    **({"AVIF": {"quality": 100, "subsampling": "4:4:4"}} if can_write("avif") else {}),
}


def encoded(kind, frames, **options):
    """The bytes of a picture, which moves if it has several frames."""
    options = PICTURES.get(kind, {}) | options
    frames[0].save(
        buffer := io.BytesIO(), kind, save_all=len(frames) > 1, append_images=frames[1:], **options
    )
    return buffer.getvalue()


# -- the same numbers as the package's own tools ------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    head=st.sampled_from(["transformer", "convolution", "none"]),
    causal=st.booleans(),
    steps=st.lists(st.sampled_from([0.25, 1.0, 1.0, 1.0, 3.0, 40.0]), min_size=0, max_size=60),
    span=st.sampled_from([1, 5, 8, 64]),
)
def test_frame_logits_are_those_of_timelines(head, causal, steps, span):
    model = video_model(head, causal=causal, num_frames=span)
    positions = np.cumsum([17.0, *steps])
    x = features(len(positions))
    expected = predict_frames(model, x.numpy(), positions)
    with torch.no_grad():
        found = frame_logits(model, x, torch.from_numpy(positions))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert list(windows(torch.from_numpy(positions), span)) == list(windows_of(positions, span))


@pytest.mark.parametrize("kind", ["stills", "both ways", "causal"])
def test_a_list_of_frames_is_judged_as_a_folder_of_them(kind, checkpoint, video_folder, tmp_path):
    folder = checkpoint if kind == "stills" else video_folder
    if kind == "causal":
        folder = tmp_path / "causal"
        video_model(causal=True, postprocess=POST).save_pretrained(folder)
        processor().save_pretrained(folder)
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(FRAMES):
        frame.save(tmp_path / f"frames/{number:05d}.png")
    numbers, expected = predict_folder(*load_model(folder), tmp_path / "frames", skip=pytest.fail)
    found = pipeline("facial-expression", model=str(folder), batch_size=4)(FRAMES)
    assert [row["frame"] for row in found] == numbers.tolist()
    np.testing.assert_allclose(scores(found), expected, atol=1e-5)
    assert np.abs(scores(found) - expected[::-1]).max() > 0.1  # frames that a wrong order would confuse


def test_what_one_row_says(classify):
    for number, row in enumerate(classify(FRAMES)):
        assert (row["frame"], row["seconds"]) == (number, None)
        assert list(row["scores"]) == sorted(row["scores"], key=row["scores"].get, reverse=True)
        assert (row["label"], row["score"]) == next(iter(row["scores"].items()))
        assert sum(row["scores"].values()) == pytest.approx(1, abs=1e-5)
    whole, short = classify(FRAMES), classify(FRAMES, top_k=2)
    assert [len(row["scores"]) for row in short] == [2] * len(FRAMES)
    assert [(r["label"], r["score"]) for r in short] == [(r["label"], r["score"]) for r in whole]
    assert json.loads(json.dumps(whole)) == whole


def test_post_processing_can_be_left_out(classify):
    raw = classify(FRAMES, smooth=False)
    x = processor()(FRAMES, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        encoded = classify.model.fer(x).pooler_output.half().numpy()
    logits = predict_frames(classify.model, encoded, np.arange(len(FRAMES)))
    np.testing.assert_allclose(scores(raw), torch.from_numpy(logits).softmax(-1), atol=1e-5)
    assert np.abs(scores(raw) - scores(classify(FRAMES))).max() > 0.05


def test_neither_batches_nor_parameters_of_the_start_change_the_numbers(classify, video_folder):
    expected = scores(classify(FRAMES))
    for size in (1, 5, 100):
        np.testing.assert_allclose(scores(classify(FRAMES, batch_size=size)), expected, atol=1e-6)
    other = pipeline("facial-expression", model=str(video_folder), smooth=False, frame_rate=10.0, top_k=1)
    assert other(FRAMES) == classify(FRAMES, smooth=False, frame_rate=10.0, top_k=1)
    times = [number / 5 for number in range(len(FRAMES))]  # in place of the rate of the start
    assert other(FRAMES, frame_times=times) == classify(FRAMES, smooth=False, frame_times=times, top_k=1)


# -- what it takes ----------------------------------------------------------------------------------


def test_pixels_tensors_lists_and_images_are_alike(classify, tmp_path):
    expected = classify(FRAMES)
    for same in (pixels(), torch.from_numpy(pixels()), list(pixels()), tuple(FRAMES)):
        assert classify(same) == expected
    [one] = classify(FRAMES[3])
    FRAMES[3].save(tmp_path / "face.png")
    for same in (
        pixels()[3],
        [FRAMES[3]],
        tmp_path / "face.png",
        str(tmp_path / "face.png"),
        (tmp_path / "face.png").read_bytes(),
    ):
        assert classify(same) == [one]


def test_several_inputs_have_a_result_each(classify, tmp_path):
    FRAMES[3].save(tmp_path / "face.png")
    expected = [classify(FRAMES[3]), classify(FRAMES[:5])]
    assert classify([str(tmp_path / "face.png"), pixels()[:5]]) == expected
    assert classify([FRAMES[3:4], FRAMES[:5]]) == expected
    assert list(classify(one for one in (pixels()[3], pixels()[:5]))) == expected


@pytest.mark.parametrize("container", ["matroska", "avi", "mov"])
def test_a_video_is_told_from_its_content_and_read_with_its_times(classify, tmp_path, container):
    film(str(tmp_path / "video"), container=container)
    found = classify(tmp_path / "video")
    assert [row["seconds"] for row in found] == pytest.approx([i / 25 for i in range(len(FRAMES))], abs=1e-3)
    np.testing.assert_allclose(scores(found), scores(classify(FRAMES, frame_rate=25)), atol=1e-3)
    assert classify((tmp_path / "video").read_bytes()) == found
    # Times matter: at the rate of the model, frames are others' nearer neighbours.
    assert np.abs(scores(found) - scores(classify(FRAMES))).max() > 1e-3
    again = classify(tmp_path / "video", frame_rate=30)
    np.testing.assert_allclose(scores(again), scores(classify(FRAMES)), atol=1e-6)
    assert again[3]["seconds"] == 0.1


def test_uneven_times_of_a_video_count_from_its_first_frame(classify, tmp_path):
    times = [2000, 2040, 2081, 3000, 3033, 9000]
    found = classify(film(str(tmp_path / "v.mkv"), FRAMES[:6], rate=1000, times=times))
    seconds = [(time - 2000) / 1000 for time in times]
    assert [row["seconds"] for row in found] == pytest.approx(seconds)
    np.testing.assert_allclose(scores(found), scores(classify(FRAMES[:6], frame_times=seconds)), atol=1e-6)


def test_phones_that_film_on_their_side(classify, tmp_path):
    rows = np.arange(24 * 24 * 3, dtype=np.uint8).reshape(24, 24, 3)
    film(str(tmp_path / "v.mov"), [rows])
    plain = classify(tmp_path / "v.mov")
    np.testing.assert_allclose(scores(plain), scores(classify(rows)), atol=1e-6)
    # The display matrix of a track: a quarter turn, as 16.16 numbers.
    data = (tmp_path / "v.mov").read_bytes()
    upright = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    turned = np.array([0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    at = data.index(upright, data.index(b"tkhd"))
    found = classify(data[:at] + turned + data[at + len(turned) :])
    np.testing.assert_allclose(scores(found), scores(classify(np.rot90(rows, -1).copy())), atol=1e-6)
    assert np.abs(scores(found) - scores(plain)).max() > 1e-3


@pytest.mark.parametrize("kind", PICTURES)
def test_moving_pictures_are_videos(classify, kind):
    frames = [frame.quantize(64) for frame in FRAMES[:4]] if kind == "GIF" else FRAMES[:4]
    found = classify(encoded(kind, frames, duration=[50, 70, 1000, 20]))
    assert [row["seconds"] for row in found] == pytest.approx([0, 0.05, 0.12, 1.12])
    expected = classify([frame.convert("RGB") for frame in frames], frame_times=[0, 0.05, 0.12, 1.12])
    np.testing.assert_allclose(scores(found), scores(expected), atol=0.02 if kind == "AVIF" else 1e-6)
    with pytest.raises(ValueError, match="the input has more than 3 frames"):
        classify(encoded(kind, frames), max_frames=3)
    with pytest.raises(ValueError, match="the input has frames of 24 x 24 pixels, more than 575"):
        classify(encoded(kind, frames), max_pixels=575)


def test_moving_pictures_without_times_and_with_a_picture_for_those_that_cannot_move(classify):
    found = classify(encoded("GIF", FRAMES[:3]))
    assert [row["seconds"] for row in found] == pytest.approx([0, 0.1, 0.2])  # as browsers do
    [*_, last] = found = classify(encoded("PNG", FRAMES[:4], duration=50, default_image=True))
    assert (len(found), last["seconds"]) == (3, pytest.approx(0.1))
    expected = classify(FRAMES[1:4], frame_times=[0, 0.05, 0.1])
    np.testing.assert_allclose(scores(found), scores(expected), atol=1e-6)


def test_photographs_are_turned_upright(classify):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = FRAMES[5].transpose(Image.Transpose.ROTATE_90)
    assert classify(encoded("PNG", [turned], exif=exif)) == classify(FRAMES[5])
    assert scores(classify(FRAMES[5].convert("L"))) == pytest.approx(
        scores(classify(FRAMES[5].convert("L").convert("RGB")))
    )


def test_addresses_are_fetched(classify, tmp_path):
    film(str(tmp_path / "v.mkv"))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        found = classify(f"http://127.0.0.1:{server.server_address[1]}/v.mkv")
        server.shutdown()
    assert found == classify(tmp_path / "v.mkv")


# -- what it refuses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "options", "words"),
    [
        ([], {}, "there are no frames"),
        (pixels()[:0], {}, "has no frames"),
        (pixels() / 255.0, {}, r"must be uint8 \(H, W, 3\), got float64 \(24, 24, 3\) as frame 0"),
        (pixels()[..., :1], {}, r"got uint8 \(24, 24, 1\)"),
        ([FRAMES[0], "face.png"], {}, "frame 1 is str: expected an image"),
        (3, {}, "expected a video or an image: a path.*got int"),
        (b"", {}, "neither an image nor a video, or is damaged"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", {}, "neither an image nor a video"),
        (b"RIFF" + bytes(500), {}, "neither an image nor a video"),
        (encoded("EPS", FRAMES[:1]), {}, "neither an image nor a video"),  # whose reader starts Ghostscript
        (
            FRAMES,
            {"frame_times": [0.0] * 21},
            r"times must rise: frame 1 is at 0.0 s, after 0.0 s; pass frame_ra",
        ),
        (FRAMES, {"frame_times": [0.0, 1.0]}, "has 21 frames, but frame_times has 2"),
        (FRAMES[:2], {"frame_times": [0.0, 1.0, 2.0]}, "has 2 frames, but frame_times has 3"),
        (FRAMES, {"frame_times": [0.0], "frame_rate": 1}, "either frame_rate or frame_times"),
        (FRAMES, {"frame_rate": 0}, "frame_rate must be above 0, got 0"),
        (FRAMES, {"top_k": 0}, "top_k must be above 0"),
        (FRAMES, {"batch_size": -1}, "batch_size must be above 0"),
        (
            FRAMES,
            {"num_workers": 1},
            "num_workers must be 0, got 1: frames are read as the model asks for them",
        ),
        (FRAMES, {"max_frames": 20}, "has more than 20 frames: cut it into parts"),
        (FRAMES, {"max_pixels": 575}, "frame 0 has frames of 24 x 24 pixels, more than 575"),
        (pixels(), {"max_pixels": 575}, "24 x 24 pixels, more than 575"),
    ],
)
def test_what_is_refused(classify, inputs, options, words):
    with pytest.raises(ValueError, match=words):
        classify(inputs, **options)


def test_damaged_and_large_files_are_refused(classify, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: none\.mp4; pass the path or URL of"):
        classify("none.mp4")
    FRAMES[0].resize((200, 200)).save(tmp_path / "face.jpg")
    film(str(tmp_path / "v.mkv"))
    for name in ("face.jpg", "v.mkv"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / f"cut_{name}").write_bytes(data[: 700 if name == "v.mkv" else len(data) // 2])
        with pytest.raises(ValueError, match=rf"cut_{name} .*damaged|cut_{name} has no frames"):
            classify(tmp_path / f"cut_{name}")
        with pytest.raises(
            ValueError, match=rf"{name} has frames of \d+ x \d+ pixels, more than 575: make it"
        ):
            classify(tmp_path / name, max_pixels=575)
    assert len(classify(tmp_path / "v.mkv", max_pixels=576, max_frames=21)) == 21


def refusal(path):
    """Why a file is refused; nothing if it is read."""
    try:
        list(read_frames(path, 4096 * 4096))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of what it makes do with
@pytest.mark.parametrize(
    ("kind", "count"),
    [*((kind, 1) for kind in ("JPEG", "BMP", "TIFF", *PICTURES)), *((kind, 3) for kind in PICTURES)],
)
def test_damaged_pictures_are_refused_by_name(kind, count, tmp_path):
    data = encoded(kind, FRAMES[:count])
    rng = np.random.default_rng([count, len(data)])
    damaged = [data[:cut] for cut in (25, 30, 100, 512, *range(0, len(data) - 20, 97))]
    for place, value in zip(rng.integers(len(data), size=80), rng.integers(256, size=80), strict=True):
        damaged.append(data[:place] + bytes([value]) + data[place + 1 :])
    path = tmp_path / "face"
    refusals = []
    for sent in damaged:
        path.write_bytes(sent)
        refusals.append(refusal(path))
    assert all(refusals[:3])
    assert {one.startswith(f"{path} ") for one in refusals if one} == {True}


def test_a_list_names_the_frame_that_is_damaged(classify):
    cut = Image.open(io.BytesIO(encoded("PNG", FRAMES[:1])[:-400]))
    with pytest.raises(ValueError, match="frame 1 is damaged or unreadable: "):
        classify([FRAMES[0], cut])
    with pytest.raises(ValueError, match="frame 1 is a picture that moves: pass its frames, or its file"):
        classify([FRAMES[0], Image.open(io.BytesIO(encoded("WEBP", FRAMES[:2])))])


@given(
    st.lists(st.floats(0.001, 100), min_size=1, max_size=30).map(np.cumsum),
    st.sampled_from([24.0, 29.97, 30.0]),
)
def test_positions_are_times_in_frames(times, rate):
    positions = positions_of(times.tolist(), rate)
    np.testing.assert_allclose(
        positions[0] if len(times) == 1 else positions, 0 if len(times) == 1 else times * rate, atol=1e-6
    )
    whole = [number / rate for number in range(200)]
    assert torch.equal(positions_of(whole, rate), torch.arange(200.0, dtype=torch.float64))
    assert torch.equal(positions_of([None] * 7, rate), torch.arange(7.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="1 of 3 frames have no time stamp: pass frame_rate"):
        positions_of([0.0, None, 1.0], rate)


def test_models_that_cannot_name_expressions(classify, make_model):
    features_only = FerModel(make_model().config)
    with pytest.raises(ValueError, match="FerModel has no classifier: load a model of stills or of videos"):
        FacialExpressionPipeline(features_only, image_processor=processor())
    with pytest.raises(ValueError, match="pass image_processor"):
        FacialExpressionPipeline(make_model())
    for name, value in {"batch_size": 0, "num_workers": 2}.items():
        with pytest.raises(ValueError, match=f"{name} must be .*0, got {value}"):
            FacialExpressionPipeline(make_model(), image_processor=processor(), **{name: value})
    damaged = make_model()
    damaged.classifier.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="output is not finite"):
        FacialExpressionPipeline(damaged, image_processor=processor())(FRAMES)


def test_what_is_not_installed_is_named(classify, tmp_path, monkeypatch):
    film(str(tmp_path / "v.mkv"))
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match="reading this input needs av: pip install av"):
        classify(tmp_path / "v.mkv")
    assert classify(FRAMES[0])  # which needs none


# -- which code and which model ------------------------------------------------------------------------


def test_the_package_takes_its_own_code_and_the_right_model(video_folder, checkpoint):
    for options in ({}, {"trust_remote_code": True}):
        classify = pipeline("facial-expression", model=str(video_folder), **options)
        assert type(classify) is FacialExpressionPipeline
        assert classify.is_video
        still = pipeline("facial-expression", model=str(checkpoint), **options)
        assert type(still.model) is FerForImageClassification
        assert not still.is_video


def test_a_saved_pipeline_is_a_checkpoint_like_any_other(classify, video_folder, tmp_path):
    classify.save_pretrained(tmp_path / "again")
    names = {path.name for path in video_folder.iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} == names
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "again", video_folder))
    for key in ("architectures", "auto_map", "custom_pipelines", "postprocess"):
        assert ours[key] == theirs[key]
    assert pipeline("facial-expression", model=str(tmp_path / "again"))(FRAMES) == classify(FRAMES)


def test_configurations_name_the_pipeline_where_there_is_a_classifier(checkpoint, video_folder, tmp_path):
    task = {"impl": "pipeline_fer.FacialExpressionPipeline", "type": "video"}
    for folder, auto in ((checkpoint, "Image"), (video_folder, "Video")):
        known = json.loads((folder / "config.json").read_text())["custom_pipelines"]
        assert known == {"facial-expression": {**task, "pt": [f"AutoModelFor{auto}Classification"]}}
    model = AutoModelForVideoClassification.from_pretrained(video_folder)
    model.fer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["custom_pipelines"] == {}


def test_a_stock_model_in_our_pipeline(tmp_path):
    from transformers import ViTConfig

    torch.manual_seed(0)
    stock = ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=8,
            num_labels=3,
        )
    ).eval()
    found = FacialExpressionPipeline(stock, image_processor=processor())(FRAMES[:2])
    with torch.no_grad():
        expected = stock(**processor()(FRAMES[:2], return_tensors="pt")).logits.softmax(-1)
    np.testing.assert_allclose(scores(found, stock.config.id2label.values()), expected, atol=1e-6)


def test_with_remote_code_and_without_the_package(checkpoint, video_folder, tmp_path):
    folders = {"stills": checkpoint, "videos": video_folder}
    for name, folder in folders.items():
        shutil.copytree(folder, tmp_path / name)
    film(str(tmp_path / "faces.mkv"))
    FRAMES[4].save(tmp_path / "face.png")
    run(
        WITHOUT_THE_PACKAGE
        + textwrap.dedent("""
        import json
        from transformers import pipeline
        found = {}
        for name in ("stills", "videos"):
            try:
                pipeline("facial-expression", model=name)
            except ValueError as error:
                assert "trust_remote_code" in str(error), error
            else:
                raise AssertionError("loaded without trust")
            classify = pipeline("facial-expression", model=name, trust_remote_code=True)
            for one in (classify, classify.model):
                assert type(one).__module__.startswith("transformers_modules."), type(one).__module__
            assert classify.is_video == (name == "videos")
            found[name] = [classify("faces.mkv"), classify("face.png")]
            classify.save_pretrained("again")
            again = pipeline("facial-expression", model="again", trust_remote_code=True)
            assert [again("faces.mkv"), again("face.png")] == found[name]
        json.dump(found, open("found.json", "w"))
        """),
        tmp_path,
    )
    for name, there in json.loads((tmp_path / "found.json").read_text()).items():
        here = pipeline("facial-expression", model=str(folders[name]))
        for found, file in zip(there, ("faces.mkv", "face.png"), strict=True):
            expected = here(tmp_path / file)
            assert [row["seconds"] for row in found] == [row["seconds"] for row in expected]
            np.testing.assert_allclose(scores(found), scores(expected), atol=1e-6)
