"""What the Space says of faces: a photograph's, a video's frame by frame, a camera's as frames come."""

import html
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from PIL import Image

from modeling_fer import FerForVideoClassification
from modeling_fer.cli.videos import Frame, predict_video, read_frames
from modeling_fer.data.augment import Normalize
from modeling_fer.data.pixels import open_image
from modeling_fer.labels import CLASSES
from modeling_fer.learning.features import encode
from modeling_fer.learning.inference import class_names, load_model
from modeling_fer.learning.timelines import postprocess, predict_frames
from modeling_fer.video.faces import NO_FACE, Crop, Detector, Face, align, faces_of, find_detector
from modeling_fer.video.table import Row
from modeling_fer.video.tracks import Tracker

DEFAULT_MODEL = "checkpoints/abaw-fer-small"
SECONDS = 60  # longest video
FRAMES = 60 * SECONDS  # most frames of one
PIXELS = 40_000_000  # largest photograph
REMEMBERED = 3000  # frames of a camera that the timeline and the table hold

# --- Model ---


@dataclass(frozen=True)
class Recognizer:
    """A model of stills or of videos, and what finds and cuts out faces for it."""

    name: str
    model: Any
    processor: Any
    detector: Path

    @property
    def sees_motion(self) -> bool:
        """Whether frames are judged in the light of their neighbours."""
        return isinstance(self.model, FerForVideoClassification)

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return class_names(self.model)

    def cut(self, rgb: np.ndarray, face: Face) -> np.ndarray:
        """The crop of a face, uint8 RGB (size, size, 3), as the model learnt to see them."""
        return align(rgb, face, self.processor.size["height"], Crop.from_dict(self.model.config.crop))

    def find(self, rgb: np.ndarray, detector: Detector) -> list[Face]:
        """The faces of an image, uint8 RGB (H, W, 3), the largest first."""
        return faces_of(rgb, detector, Crop.from_dict(self.model.config.crop))

    def judge(self, crop: np.ndarray) -> dict[str, float]:
        """Probabilities of the expressions of one crop, by itself."""
        return next(predict_video(self.model, self.processor, [(1, 0.0, crop)])).probabilities


def load(model: str | None = None, detector: str | None = None) -> Recognizer:
    """Load a model, from a folder or the Hub, and find the face detector.

    Args:
        model: folder or Hub id; None: the environment's FER_MODEL, else the checkpoint that comes along.
        detector: ONNX file of YuNet; None: FER_DETECTOR, else that of the Hub's cache or the Hub.

    Raises:
        FileNotFoundError: there is no such model, or no detector.
        ValueError: the model is damaged, or does not say how faces are to be cut out for it; the file is no
            detector.
    """
    name = model or os.environ.get("FER_MODEL") or DEFAULT_MODEL
    folder = Path(name)
    if not folder.is_dir():
        if name == DEFAULT_MODEL:
            raise FileNotFoundError(
                f"no model: {DEFAULT_MODEL} is not there; name a folder that training saved, or a model of "
                "the Hub, with --model or FER_MODEL"
            )
        try:
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
        except Exception as error:  # no such model, no network, no access: the kinds differ by version
            raise FileNotFoundError(
                f"{name} is no folder, and the Hub does not give it as a model ({error})"
            ) from error
    loaded, processor = load_model(folder)
    Crop.from_dict(loaded.config.crop)
    path = find_detector(detector or os.environ.get("FER_DETECTOR") or None)
    Detector(path)
    return Recognizer(name, loaded, processor, path)


def describe(recognizer: Recognizer) -> str:
    """What the page says of the model, as Markdown."""
    how = (
        "It judges each frame of a video in the light of the frames around it."
        if recognizer.sees_motion
        else "It is a model of stills: each frame of a video is judged for itself."
    )
    return f"Model: <code>{html.escape(recognizer.name)}</code>. {how}"


# --- Photographs, videos, cameras ---


def read_photo(recognizer: Recognizer, path: str | Path) -> tuple[Image.Image, list[Row], list[np.ndarray]]:
    """Judge the faces of an image file.

    Returns:
        The image, upright; a row for each face, the largest first, or one without a face; the faces' crops.

    Raises:
        OSError, ValueError: the file is no image, or too large.
    """
    data = Path(path).read_bytes()
    check_size(data)
    image = open_image(data)
    rgb = np.asarray(image)
    faces = recognizer.find(rgb, Detector(recognizer.detector))
    crops = [recognizer.cut(rgb, face) for face in faces]
    rows = [
        Row(1, 0.0, number, face.box, recognizer.judge(crop))
        for number, (face, crop) in enumerate(zip(faces, crops, strict=True))
    ]
    return image, rows or [Row(1, 0.0)], crops


def check_size(data: bytes) -> None:
    """Refuse an image with more pixels than the page takes, before it is decoded."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = image.width * image.height
    except Exception:  # `open_image` says why
        return
    if pixels > PIXELS:
        raise ValueError(f"the image has {pixels / 1e6:.0f} million pixels, the most is {PIXELS / 1e6:.0f}")


def read_video(
    recognizer: Recognizer, path: str | Path, tell: Callable[[float], None] = lambda seconds: None
) -> tuple[list[Row], list[str]]:
    """Judge every frame of a video file by its foremost face; `fer predict --detect` judges them all.

    Args:
        recognizer: model and detector.
        path: the video.
        tell: told the seconds that have been looked at.

    Returns:
        A row for each frame, and what of the video could not be used.

    Raises:
        ValueError: there is no readable frame, or the video is too long.
    """
    remarks: list[str] = []

    def skip(what: str, reason: str) -> None:
        remarks.append(f"{what.replace(str(path), 'the video')}: {reason}")

    def watched() -> Iterator[Frame]:
        for count, frame in enumerate(read_frames(Path(path), skip)):
            if frame[1] > SECONDS or count >= FRAMES:
                raise ValueError(
                    f"the video is longer than {SECONDS} s or {FRAMES} frames: cut it, or use `fer predict`, "
                    "which takes any length"
                )
            tell(frame[1])
            yield frame

    detector = Detector(recognizer.detector)
    rows = list(predict_video(recognizer.model, recognizer.processor, watched(), detector))
    if not rows:
        raise ValueError("; ".join(remarks) or "the video has no frame")
    return rows, remarks


@dataclass
class Camera:
    """What is remembered of a camera: its clock, its face, and what was said of it."""

    detector: Detector
    start: float
    tracker: Tracker = field(default_factory=Tracker)
    rows: list[Row] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)  # of the followed face's frames in `rows`


def look(recognizer: Recognizer, camera: Camera, rgb: np.ndarray, now: float) -> Row:
    """Judge the next frame of a camera, uint8 RGB (H, W, 3), at a time in seconds, by its foremost face.

    A model of videos sees the face's frames so far, as many as it was trained on.
    """
    faces = recognizer.find(rgb, camera.detector)
    tracks = camera.tracker.step(faces)
    place = camera.tracker.foremost
    number = camera.rows[-1].frame + 1 if camera.rows else 1
    row = Row(number, now - camera.start)
    if place is not None:
        crop = recognizer.cut(rgb, faces[place])
        if recognizer.sees_motion:
            probabilities = in_motion(recognizer, camera, crop, row.seconds, tracks[place])
        else:
            probabilities = recognizer.judge(crop)
        row = Row(number, row.seconds, tracks[place], faces[place].box, probabilities)
    camera.rows = [*camera.rows[1 - REMEMBERED :], row]
    return row


def in_motion(
    recognizer: Recognizer, camera: Camera, crop: np.ndarray, seconds: float, track: int
) -> dict[str, float]:
    """Probabilities of a face's latest frame in the light of those before it."""
    model, processor = recognizer.model, recognizer.processor
    before = [row for row in camera.rows if row.face is not None]
    camera.features = camera.features if before and before[-1].face == track else []
    normalize = Normalize(processor.image_mean, processor.image_std)
    camera.features.append(encode(model.fer, crop.transpose(2, 0, 1)[None], normalize)[0])
    camera.features = camera.features[-model.config.num_frames :]
    times = [row.seconds for row in before][len(before) + 1 - len(camera.features) :]
    positions = np.array([*times, seconds]) * model.config.frame_rate
    logits = predict_frames(model, np.stack(camera.features), positions)
    last = postprocess(model, logits, positions)[-1]
    return {name: float(last[CLASSES.index(name)]) for name in recognizer.classes}


def summary(rows: Sequence[Row], remarks: Sequence[str] = ()) -> str:
    """How many frames of a video show a face, and which expression most of them do."""
    seen = [row.expression for row in rows if row.expression]
    text = f"{len(seen):,} of {len(rows):,} frames show a face."
    if not seen:
        text = f"{NO_FACE.capitalize()}: none is found in {len(rows):,} frames. A face needs about 10 pixels."
    else:
        most = max(dict.fromkeys(seen), key=seen.count)
        text += f" Most often: {most}, {seen.count(most) / len(seen):.0%} of them."
    return " ".join([text, *(f"Left out: {remark}." for remark in remarks)])
