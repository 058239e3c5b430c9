"""Handler for Inference Endpoints: the expression of faces in an image, in several, or in a video.

It travels as `handler.py` beside the model, with a `requirements.txt`. Faces are expected cropped as those
that the model learnt from. A request is `{"inputs": ..., "parameters": {...}}`:

- `inputs`: an image or a video of one face, as bytes, base64 or a data URL, or a list of such images. What it
  is, its content tells. Paths and addresses are not followed.
- `parameters`: `top_k`, classes to name a frame; `frame_rate` of videos without (right) time stamps;
  `smooth`, false for no post-processing.

The answer is a list of one object a frame, of an image too: `frame`, `seconds`, `label`, `score`, `scores`.
A list of images is answered by a list of such lists. What cannot be answered is `{"error": "..."}`, in a list
of images for the one that it is about.
"""

import base64
import binascii
from collections.abc import Iterator
from itertools import islice
from typing import Any

from transformers import pipeline

# Of one request. Frames are read one by one: memory holds the bytes, one frame, a batch of small ones.
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 4096 * 4096
MAX_FRAMES = 10_000
MAX_IMAGES = 256
BATCH = 64  # images that a model of stills sees at once


def is_positive(value: Any, kinds: Any) -> bool:
    """Whether a value of JSON is a number above 0 of such kinds, and no absurd one; true is none."""
    return isinstance(value, kinds) and not isinstance(value, bool) and bool(0 < value < 1_000_000)


PARAMETERS = {
    "top_k": ("a whole number above 0", lambda value: is_positive(value, int)),
    "frame_rate": ("a number above 0", lambda value: is_positive(value, (int, float))),
    "smooth": ("true or false", lambda value: isinstance(value, bool)),
}


def check_parameters(values: Any) -> dict[str, Any]:
    """The parameters of a request that are given.

    Raises:
        ValueError: unknown ones, or values that they do not take.
    """
    if not isinstance(values, dict):
        raise ValueError(f"parameters must be an object, got {type(values).__name__}")
    if unknown := sorted(map(str, values.keys() - PARAMETERS.keys())):
        raise ValueError(f"parameters knows {', '.join(PARAMETERS)}; got {', '.join(unknown)}")
    found = {name: value for name, value in values.items() if value is not None}
    for name, value in found.items():
        kind, is_good = PARAMETERS[name]
        if not is_good(value):
            raise ValueError(f"{name} must be {kind}, got {value!r}")
    return found


def decode(value: Any, room: int) -> Any:
    """The bytes of an input, at most `room`; an image that the server has opened already is left as it is.

    Raises:
        ValueError: too large, empty, or nothing that is known.
    """
    large = f"inputs may have {MAX_BYTES:,} bytes in all: send less"
    if isinstance(value, str):
        text = value.partition(",")[2] if value.startswith("data:") else value
        if len(text) > room * 4 // 3 + 2**16:  # room for line breaks
            raise ValueError(large)
        try:
            value = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(
                "inputs is text, but neither base64 nor a data URL in base64; paths and addresses are not "
                "followed"
            ) from error
    if isinstance(value, bytes | bytearray):
        if len(value) > room:
            raise ValueError(large)
        if not value:
            raise ValueError("inputs is empty")
        return bytes(value)
    if hasattr(value, "convert") and hasattr(value, "size"):
        return value
    raise ValueError(f"inputs must be an image, a video or a list of images, got {type(value).__name__}")


class EndpointHandler:
    """Answers the requests of an endpoint.

    Args:
        path: folder of the model, or its name on the Hub.
    """

    def __init__(self, path: str = "") -> None:
        self.classify = pipeline("facial-expression", model=path, trust_remote_code=True)  # type: ignore[call-overload]

    def __call__(self, data: dict[str, Any]) -> Any:
        """Answer one request; see above."""
        try:
            if not isinstance(data, dict) or data.get("inputs") is None:
                raise ValueError('a request is {"inputs": ..., "parameters": {...}}; this one has no inputs')
            parameters = check_parameters(data.get("parameters") or {})
            inputs = data["inputs"]
            if not isinstance(inputs, list):
                media = decode(inputs, MAX_BYTES)
                return self.classify(media, max_frames=MAX_FRAMES, max_pixels=MAX_PIXELS, **parameters)
            if not 0 < len(inputs) <= MAX_IMAGES:
                raise ValueError(f"a list must have 1 to {MAX_IMAGES} images, got {len(inputs)}")
            return self.images(inputs, parameters)
        except ValueError as error:
            return {"error": str(error)}

    def images(self, inputs: list[Any], parameters: dict[str, Any]) -> list[Any]:
        """What answers each image: models of stills see a batch at once, models of videos each for itself."""
        classify = self.classify
        reading, _, naming = classify._sanitize_parameters(max_frames=1, max_pixels=MAX_PIXELS, **parameters)
        errors: dict[int, Any] = {}

        def frames() -> Iterator[Any]:
            room = MAX_BYTES
            for number, one in enumerate(inputs):
                try:
                    image = decode(one, room)
                    room -= len(image) if isinstance(image, bytes) else 0
                    [frame] = classify.preprocess(image, **reading)["frames"]
                except ValueError as error:
                    errors[number] = {"error": str(error)}
                else:
                    yield frame

        good, rows = frames(), []
        while batch := list(islice(good, 1 if classify.is_video else BATCH)):
            rows += classify.postprocess(classify.forward({"frames": batch}), **naming)
        answers = iter(rows)
        return [errors.get(number) or [{**next(answers), "frame": 0}] for number in range(len(inputs))]
