"""Frames of a video, or the one of an image, from whatever they come in: files, addresses, bytes, pixels.

Needed beyond transformers: Pillow, and PyAV for video files. They are looked for when they are first needed,
so that models load without them.
"""

import contextlib
import importlib
import io
import os
from collections.abc import Iterator
from typing import Any
from urllib.request import urlopen

from transformers.image_utils import load_image

TIMEOUT = 60  # seconds without an answer, of URLs
URLS = ("http://", "https://")
# What Pillow may open: not its rarer formats, of which some start other programs.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM")
# Pictures that move are videos. A JPEG may hold several pictures too (a small copy, the other eye's view).
MOVING = ("GIF", "PNG", "WEBP", "AVIF")
SHOWN = 100  # milliseconds of each picture of one that moves and does not say how fast, as in browsers
# Containers that FFmpeg may take bytes for: none that names other files or addresses, as playlists do.
CONTAINERS = "mov,mp4,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,flv,asf,ogg,h264,hevc,ivf"

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


def input_name(source: Any) -> str:
    """How messages call an input."""
    return os.fspath(source) if isinstance(source, str | os.PathLike) else "the input"


def check_pixels(width: int, height: int, most: int | None, name: str) -> None:
    """Refuse large frames, before they are decoded where that is possible."""
    if most is not None and width * height > most:
        raise ValueError(
            f"{name} has frames of {width} x {height} pixels, more than {most:,}: make it smaller"
        )


@contextlib.contextmanager
def refusing_damage(name: str) -> Iterator[None]:
    """Whatever goes wrong with an image becomes a ValueError that names it: damage raises nearly any kind."""
    try:
        yield
    except Exception as error:
        is_bomb = type(error).__name__ == "DecompressionBombError"
        raise ValueError(
            f"{name} is {'too large' if is_bomb else 'damaged or unreadable'}: {error}"
        ) from error


def open_image(source: Any, name: str) -> Any:
    """The PIL image of a path or a file, not decoded yet; None: it is none.

    Raises:
        ValueError: it is damaged or too large.
    """
    pil = needed("PIL.Image", "pillow")
    pil.init()
    formats = [one for one in FORMATS if one in pil.OPEN]  # older ones have no AVIF
    with refusing_damage(name), contextlib.suppress(pil.UnidentifiedImageError):
        return pil.open(source, formats=formats)
    return None


def is_moving(image: Any, name: str) -> bool:
    """Whether a PIL image has several pictures, one after the other."""
    with refusing_damage(name):
        return image.format in MOVING and getattr(image, "is_animated", False)


def read_still(image: Any, most_pixels: int | None, name: str) -> Any:
    """The picture of a PIL image, upright and in RGB.

    Raises:
        ValueError: it is damaged or too large.
    """
    check_pixels(image.width, image.height, most_pixels, name)
    with refusing_damage(name):
        return load_image(image)


def read_moving(image: Any, most_pixels: int | None, name: str) -> Iterator[Frame]:
    """The pictures of a PIL image that moves, with seconds from the first; one at a time is in memory.

    Raises:
        ValueError: it is damaged or too large.
    """
    milliseconds = 0.0
    with image:
        with refusing_damage(name):  # a PNG may begin with a picture for those who cannot show it moving
            numbers = range(bool(image.info.get("default_image")), image.n_frames)
        for number in numbers:
            with refusing_damage(name):
                image.seek(number)
            yield read_still(image, most_pixels, name), milliseconds / 1000
            milliseconds += image.info.get("duration") or SHOWN


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
    name = input_name(inputs)
    if isinstance(inputs, str) and inputs.startswith(URLS):
        with urlopen(inputs, timeout=TIMEOUT) as answer:
            inputs = answer.read()
    elif isinstance(inputs, str | os.PathLike) and not os.path.isfile(inputs):
        raise FileNotFoundError(f"no such file: {name}; pass the path or URL of an image or a video")
    if isinstance(inputs, str | os.PathLike | bytes | bytearray):

        def source() -> Any:
            return io.BytesIO(inputs) if isinstance(inputs, bytes | bytearray) else name

        image = open_image(source(), name)
        if image is None:
            yield from read_video(source(), most_pixels, name)
        elif is_moving(image, name):
            yield from read_moving(image, most_pixels, name)
        else:
            yield read_still(image, most_pixels, name), None
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
            if is_moving(frame, f"frame {number}"):
                raise ValueError(f"frame {number} is a picture that moves: pass its frames, or its file")
            yield read_still(frame, most_pixels, f"frame {number}"), None
            continue
        if frame.shape[2] != 3 or str(frame.dtype).removeprefix("torch.") != "uint8":
            raise ValueError(
                f"frames must be uint8 (H, W, 3), got {frame.dtype} {tuple(frame.shape)} as frame {number}"
            )
        check_pixels(frame.shape[1], frame.shape[0], most_pixels, f"frame {number}")
        yield frame, None
