"""Frames of a video, or the one of an image, from whatever they come in: files, addresses, bytes, pixels.

Needed beyond transformers: Pillow, and PyAV for video files. They are looked for when they are first needed,
so that models load without them.
"""

import importlib
import io
import os
from collections.abc import Iterator
from typing import Any
from urllib.request import urlopen

from transformers.image_utils import load_image

TIMEOUT = 60  # seconds without an answer, of URLs
URLS = ("http://", "https://")
# Pictures that move are videos. A JPEG may hold several pictures too (a small copy, the other eye's view).
MOVING = ("GIF", "PNG", "WEBP")
# Containers that FFmpeg may take bytes for: none that names other files or addresses, as playlists do.
CONTAINERS = "mov,mp4,matroska,webm,avi,gif,apng,mpeg,mpegts,mpegvideo,m4v,flv,asf,ogg,h264,hevc,ivf"

# One frame: what the image processor takes, and its time in seconds where it has one.
Frame = tuple[Any, float | None]


def needed(name: str, package: str) -> Any:
    """A module that not everyone has.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"reading this input needs {package}: pip install {package}") from error


def told(source: Any) -> str:
    """How messages call an input."""
    return os.fspath(source) if isinstance(source, str | os.PathLike) else "the input"


def check_pixels(width: int, height: int, most: int | None, name: str) -> None:
    """Refuse large frames, before they are decoded where that is possible."""
    if most is not None and width * height > most:
        raise ValueError(
            f"{name} has frames of {width} x {height} pixels, more than {most:,}: make it smaller"
        )


def read_still(source: Any, most_pixels: int | None, name: str) -> Any:
    """One picture of a path, file or PIL image, upright and in RGB; None: it is none, or one that moves.

    Raises:
        ValueError: a picture that is damaged or too large.
    """
    pil = needed("PIL.Image", "pillow")
    try:
        image = source if isinstance(source, pil.Image) else pil.open(source)
    except pil.UnidentifiedImageError:
        return None
    except pil.DecompressionBombError as error:
        raise ValueError(f"{name} is too large: {error}") from error
    if image.format in MOVING and getattr(image, "is_animated", False):
        return None
    check_pixels(image.width, image.height, most_pixels, name)
    try:
        return load_image(image)
    except Exception as error:  # damaged EXIF raises nearly any kind
        raise ValueError(f"{name} is a damaged image: {error}") from error


def read_video(source: Any, most_pixels: int | None, name: str) -> Iterator[Frame]:
    """The frames of a video file, upright, with seconds from the first; one at a time is in memory.

    Raises:
        ValueError: it is no video, damaged, or too large.
    """
    av = needed("av", "av")
    try:
        with av.open(source, options={"format_whitelist": CONTAINERS}) as file:
            if not file.streams.video:
                raise ValueError(f"{name} has no pictures")
            stream = file.streams.video[0]
            check_pixels(stream.width, stream.height, most_pixels, name)
            if most_pixels is not None:  # frames may grow on the way; decoders add borders
                stream.codec_context.options = {"max_pixels": str(4 * most_pixels)}
            first = None
            for frame in file.decode(stream):
                check_pixels(frame.width, frame.height, most_pixels, name)
                first = frame.time if first is None else first
                image = frame.to_image()
                if frame.rotation:  # phones mark what is filmed on their side, they do not turn it
                    image = image.rotate(frame.rotation, expand=True)
                yield image, None if frame.time is None or first is None else frame.time - first
    except (av.FFmpegError, UnicodeDecodeError) as error:  # the latter: titles in an old encoding
        said = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{name} is neither an image nor a video, or is damaged: {said}") from error


def is_pixels(value: Any, axes: int) -> bool:
    """Whether a value is an array or tensor of so many axes."""
    return hasattr(value, "dtype") and len(getattr(value, "shape", ())) == axes


def is_frame(value: Any) -> bool:
    """Whether a value is one frame: a PIL image, or pixels `(H, W, 3)`."""
    return is_pixels(value, 3) or (hasattr(value, "convert") and hasattr(value, "size"))


def read_frames(inputs: Any, most_pixels: int | None = None) -> Iterator[Frame]:
    """The frames of whatever the pipeline takes, one after the other.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no image and no video, or is damaged or too large.
    """
    name = told(inputs)
    if isinstance(inputs, str) and inputs.startswith(URLS):
        with urlopen(inputs, timeout=TIMEOUT) as answer:
            inputs = answer.read()
    elif isinstance(inputs, str | os.PathLike) and not os.path.isfile(inputs):
        raise FileNotFoundError(f"no such file: {name}; pass the path or URL of an image or a video")
    if isinstance(inputs, str | os.PathLike | bytes | bytearray):

        def source() -> Any:
            return io.BytesIO(inputs) if isinstance(inputs, bytes | bytearray) else name

        still = read_still(source(), most_pixels, name)
        yield from read_video(source(), most_pixels, name) if still is None else [(still, None)]
        return
    frames = [inputs] if is_frame(inputs) else inputs
    if not is_pixels(frames, 4) and not isinstance(frames, list | tuple):
        raise ValueError(
            "expected a video or an image: a path, a URL, bytes, an array (T, H, W, 3), a list of frames; "
            f"got {type(inputs).__name__}"
        )
    for number, frame in enumerate(frames):
        if not is_frame(frame):
            raise ValueError(
                f"frame {number} is {type(frame).__name__}: expected an image or (H, W, 3) pixels"
            )
        if not is_pixels(frame, 3):
            still = read_still(frame, most_pixels, f"frame {number}")
            if still is None:
                raise ValueError(f"frame {number} is a picture that moves: pass its frames, or its file")
            yield still, None
            continue
        if frame.shape[2] != 3 or str(frame.dtype).removeprefix("torch.") != "uint8":
            raise ValueError(
                f"frames must be uint8 (H, W, 3), got {frame.dtype} {tuple(frame.shape)} as frame {number}"
            )
        check_pixels(frame.shape[1], frame.shape[0], most_pixels, f"frame {number}")
        yield frame, None
