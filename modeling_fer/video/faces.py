"""Faces in photographs: found by YuNet through OpenCV, and cut out the way a model was trained to see them.

Coordinates are continuous, in pixels: x runs right, y down, and pixel (row i, column j) covers i to i + 1 and
j to j + 1. Landmarks come in the order right eye, left eye, tip of the nose, right and left corner of the
mouth; right and left are the person's own, so that a right eye lies on the image's left.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError
from PIL import Image

from modeling_fer.configuration_fer import CROP_POINTS, check_crop
from modeling_fer.data.pixels import UnreadableImageError, open_image

REPOSITORY = "opencv/face_detection_yunet"
# The same weights; the first file states no input size, which OpenCV's other engines ask for.
FILES = ("face_detection_yunet_2026may.onnx", "face_detection_yunet_2023mar.onnx")

# YuNet was trained on faces of about 10 to 300 pixels (opencv_zoo, models/face_detection_yunet/README.md). In
# an image of COARSE pixels it still finds one that fills it; of a larger face it takes parts for faces.
TRAINED = 300
COARSE = 640
LEAST = 128  # smaller images are enlarged to it: many a face is found only then

NO_FACE = "no face"
WIDEST = 8  # sides of the image that a crop's side may have: beyond, it is the crop of no face


@dataclasses.dataclass(frozen=True, eq=False)
class Face:
    """A face that was found: `box` (x, y, width, height), `landmarks` (5, 2) float64, `score` from 0 to 1.

    The box and the landmarks of a face at the border may lie in part outside of the image.
    """

    box: tuple[float, float, float, float]
    landmarks: np.ndarray
    score: float

    @property
    def area(self) -> float:
        """Area of the box in pixels."""
        return self.box[2] * self.box[3]


# --- Detection ---


def find_detector(path: str | Path | None = None) -> Path:
    """Return the detector's file: the one given, else the one in the Hub's cache, else fetched from the Hub.

    The Hub is asked as the user has set it up (HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN, ...).

    Raises:
        FileNotFoundError: there is no such file; or none was given, none is in the cache, and none can be
            fetched.
    """
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file {path}: pass the ONNX file of YuNet as --detector")
        return Path(path)
    for name in FILES:
        if isinstance(found := try_to_load_from_cache(REPOSITORY, name), str):
            return Path(found)
    reason: Exception | None = None
    for name in FILES:
        try:
            return Path(hf_hub_download(REPOSITORY, name))
        except RemoteEntryNotFoundError as error:
            reason = error
        except Exception as error:  # no network, a proxy, no access, a full disk: the kinds differ by version
            reason = error
            break
    raise FileNotFoundError(
        "no face detector: pass its ONNX file as --detector PATH, or fetch it into the Hub's cache, where "
        f"there is a network, by `hf download {REPOSITORY} {FILES[-1]}` (the Hub's answer: {reason})"
    ) from reason


class Detector:
    """YuNet (Wu, Peng and Yu 2023, Machine Intelligence Research 20, 656-665), for images of any size.

    An image of more than 640 pixels is searched at several sizes, each half the one before; where a face is
    larger than those that YuNet was trained on, the smaller size has the say.

    Not for several threads at once.

    Args:
        path: ONNX file, see `find_detector`.
        score: faces that are less sure are left out; from 0 to 1.
        overlap: of two faces whose boxes' intersection over union is above it, the surer one stays.
        longest: pixels of the longer side up to which an image is searched as it is; larger ones are shrunk.
            A face must then be left with about 10 pixels.

    Raises:
        ValueError: OpenCV is not installed, the file is no YuNet, or a value is out of its range.
        OSError: the file cannot be read.
    """

    def __init__(
        self, path: str | Path, score: float = 0.7, overlap: float = 0.3, longest: int = 1280
    ) -> None:
        for name, value in {"score": score, "overlap": overlap}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {value}")
        if longest < LEAST:
            raise ValueError(f"longest must be at least {LEAST} pixels, got {longest}")
        try:
            import cv2
        except ImportError as error:
            raise ValueError('finding faces needs OpenCV: pip install "abaw-fer[video]"') from error
        self._cv2 = cv2
        self.overlap, self.longest = overlap, longest
        # Bytes, as OpenCV opens no path with letters that are foreign to the system.
        data = np.frombuffer(Path(path).read_bytes(), np.uint8)
        level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # it warns of its own engine
        try:
            empty = np.empty(0, np.uint8)
            self._net = cv2.FaceDetectorYN.create("onnx", data, empty, (LEAST, LEAST), score, overlap)
            self._net.detect(np.zeros((LEAST, LEAST, 3), np.uint8))  # another network shows itself here
        except cv2.error as error:
            reason = " ".join((error.err or str(error)).split())
            raise ValueError(
                f"{path} is no YuNet face detector, or damaged ({reason}): fetch it again from the Hub, "
                f"{REPOSITORY}"
            ) from error
        finally:
            cv2.utils.logging.setLogLevel(level)

    def detect(self, rgb: np.ndarray) -> list[Face]:
        """Find the faces of an image, uint8 RGB (H, W, 3), the largest box first; none gives an empty list.

        Raises:
            ValueError: the array is no such image.
        """
        _check(rgb)
        height, width = rgb.shape[:2]
        sizes = [min(max(height, width, LEAST), self.longest)]
        while sizes[-1] > COARSE:
            sizes.append(sizes[-1] // 2)
        found = [
            face
            for size in sizes
            for face, side in self._search(rgb, size)
            if side <= TRAINED or size == sizes[-1]
        ]
        kept: list[Face] = []
        for face in sorted(found, key=lambda face: -face.score):
            if all(iou(face, other) <= self.overlap for other in kept):
                kept.append(face)
        return sorted(kept, key=lambda face: (-face.area, face.box))

    def _search(self, rgb: np.ndarray, size: int) -> Iterator[tuple[Face, float]]:
        """Yield faces of the image with its longer side at `size`, with the longer side of each box there."""
        cv2 = self._cv2
        height, width = rgb.shape[:2]
        scale = size / max(height, width)
        wide, high = (max(1, round(side * scale)) for side in (width, height))
        bgr = np.ascontiguousarray(rgb[..., ::-1])
        if (wide, high) != (width, height):
            bgr = cv2.resize(
                bgr, (wide, high), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
            )
        self._net.setInputSize((wide, high))
        _, rows = self._net.detect(bgr)
        back = np.array([width / wide, height / high])
        for row in [] if rows is None else rows.astype(np.float64):
            points = row[:14].reshape(7, 2) * back  # corner, size, five landmarks
            (x, y), (w, h) = points[:2].tolist()
            yield Face((x, y, w, h), points[2:], float(row[14])), max(row[2:4])


def iou(one: Face, other: Face) -> float:
    """Return the intersection over union of two faces' boxes."""
    shared = 1.0
    for axis in (0, 1):
        start = max(one.box[axis], other.box[axis])
        end = min(face.box[axis] + face.box[axis + 2] for face in (one, other))
        shared *= max(0.0, end - start)
    return shared / max(one.area + other.area - shared, 1e-9)


def _check(rgb: np.ndarray) -> None:
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or not rgb.size:
        raise ValueError(
            f"expected an RGB image, uint8 (H, W, 3), got {rgb.dtype} {rgb.shape}: `data.pixels.open_image` "
            "makes one of any image"
        )


# --- Alignment ---


@dataclasses.dataclass(frozen=True)
class Crop:
    """How faces are cut out for a model; its configuration states it as `crop`, this as a dict.

    Args:
        name: a name in `CROPS`, or one of your own with points.
        points: where the five landmarks belong, in units of the crop's side ((0, 0) top left, (1, 1) bottom
            right, before the margin): faces are turned, scaled and shifted. None, of "box" alone: faces are
            not turned, and the crop is the smallest square around the middle of the box that holds it.
        margin: what is added on each side, in units of the crop's side without it; negative to cut off.

    Raises:
        ValueError: see `configuration_fer.check_crop`.
    """

    name: str
    points: tuple[tuple[float, float], ...] | None = None
    margin: float = 0.0

    def __post_init__(self) -> None:
        points = check_crop(dataclasses.asdict(self))["points"]
        object.__setattr__(self, "points", points and tuple((x, y) for x, y in points))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> "Crop":
        """Read the `crop` of a configuration; names in `CROPS` need no points.

        Raises:
            ValueError: there is none, it has unknown settings, or it says nonsense.
        """
        if not values:
            raise ValueError(
                "the model's configuration does not say how to crop faces: add to its config.json, for "
                'example, "crop": {"name": "box", "margin": 0.0}'
            )
        return cls(**check_crop(values))

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` reads, of JSON's types."""
        return check_crop(dataclasses.asdict(self))

    def matrix(self, face: Face) -> np.ndarray:
        """Return the similarity (2, 3) that takes points of the image to units of the crop, margin included.

        Raises:
            ValueError: the face has no extent.
        """
        if self.points is None:
            x, y, width, height = face.box
            if not max(width, height) > 0:
                raise ValueError(f"the box of a face has no extent: {face.box}")
            scale = 1 / max(width, height)
            middle = (x + width / 2, y + height / 2)
            matrix = np.array([[scale, 0, 0.5 - scale * middle[0]], [0, scale, 0.5 - scale * middle[1]]])
        else:
            matrix = similarity(face.landmarks, np.array(self.points))
        matrix[:, 2] += self.margin
        return matrix / (1 + 2 * self.margin)


CROPS = {name: Crop(name) for name in CROP_POINTS}


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the similarity (2, 3) that takes points (N, 2) to others with the least squared distances.

    The closed form of Umeyama (1991), "Least-squares estimation of transformation parameters between two
    point patterns", IEEE TPAMI 13(4), equations 40 to 42: no reflections. In the plane, points are complex
    numbers, a turn with a scale is one factor, and his singular value decomposition becomes a division.

    Raises:
        ValueError: all points of the source are the same.
    """
    z, w = (np.asarray(points, dtype=np.float64) @ [1, 1j] for points in (source, target))
    centred = z - z.mean()
    spread = np.vdot(centred, centred).real
    if not spread > 0:
        raise ValueError(f"points to align have no extent: {np.asarray(source).tolist()}")
    turn = np.vdot(centred, w) / spread
    shift = w.mean() - turn * z.mean()
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


def possible(face: Face, shape: Sequence[int], crop: Crop) -> bool:
    """Whether a face has an extent, and a crop not far larger than its image of `shape` (H, W, ...)."""
    try:
        scale = math.hypot(*crop.matrix(face)[:, 0])
    except ValueError:
        return False
    has_extent = all(map(math.isfinite, face.box)) and min(face.box[2:]) > 0
    return has_extent and scale * WIDEST * max(shape[:2]) > 1


def align(rgb: np.ndarray, face: Face, size: int, crop: Crop) -> np.ndarray:
    """Cut a face out of an image, uint8 RGB (H, W, 3), to uint8 (size, size, 3).

    What is shrunk is averaged, what is enlarged is interpolated bilinearly; beyond the border, the image's
    outermost pixels are repeated.

    Raises:
        ValueError: the array is no such image, or the face is not `possible`.
    """
    _check(rgb)
    if not possible(face, rgb.shape, crop):
        raise ValueError(f"the landmarks or the box are no face's: {face}")
    matrix = crop.matrix(face) * size
    scale = math.hypot(matrix[0, 0], matrix[1, 0])
    turn = np.linalg.inv(matrix[:, :2])
    corners = (np.array([(0, 0), (0, size), (size, 0), (size, size)]) - matrix[:, 2]) @ turn.T
    left, top = np.floor(corners.min(0)).astype(int) - 1
    right, bottom = np.ceil(corners.max(0)).astype(int) + 1
    rows, columns = (
        np.clip(np.arange(start, end), 0, length - 1)
        for start, end, length in ((top, bottom, rgb.shape[0]), (left, right, rgb.shape[1]))
    )
    patch = rgb[rows[:, None], columns].astype(np.float32)  # bytes would be cut off, not rounded
    # fine x fine points are averaged to a pixel: as many as the image has there.
    fine = max(1, math.ceil(1 / scale - 1e-9))
    origin = -turn @ matrix[:, 2] - (left, top)
    back = np.column_stack([turn / fine, origin]).ravel().tolist()
    side = size * fine
    how = (side, side), Image.Transform.AFFINE, back, Image.Resampling.BILINEAR
    bands = [np.asarray(Image.fromarray(band).transform(*how)) for band in np.moveaxis(patch, -1, 0)]
    pixels = np.stack(bands, axis=-1).reshape(size, fine, size, fine, 3).mean((1, 3))
    return np.rint(pixels).astype(np.uint8)


def faces_of(rgb: np.ndarray, detector: Detector, crop: Crop) -> list[Face]:
    """Find the faces of an image that can be cut out: what a detector takes for one may have no extent."""
    return [face for face in detector.detect(rgb) if possible(face, rgb.shape, crop)]


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What an image gave: one of its faces, or the reason why there is none.

    `face` and `pixels`, uint8 (3, size, size) as `data.pixels.decode` gives them, are None where `reason` is
    not: `NO_FACE`, or why the image could not be read.
    """

    image: Path | Image.Image
    face: Face | None = None
    pixels: np.ndarray | None = None
    reason: str | None = None


def crops(
    images: Iterable[Path | Image.Image], detector: Detector, size: int, crop: Crop
) -> Iterator[Result]:
    """Yield a result for every face of every image, an image's largest first, and one for images without.

    Images are files or opened ones, of any mode; they are turned upright first, and boxes are of that image.
    One image at a time is in memory.
    """
    for image in images:
        try:
            rgb = np.asarray(open_image(image.read_bytes() if isinstance(image, Path) else image))
        except (OSError, UnreadableImageError) as error:
            yield Result(image, reason=str(error))
            continue
        faces = faces_of(rgb, detector, crop)
        for face in faces:
            yield Result(image, face, align(rgb, face, size, crop).transpose(2, 0, 1))
        if not faces:
            yield Result(image, reason=NO_FACE)
