"""Videos from the file to a row a frame: read, the face found and followed, its expression named."""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from modeling_fer import CLASSES, FerForVideoClassification
from modeling_fer.data.augment import Normalize
from modeling_fer.data.pixels import decode as decode_image
from modeling_fer.data.sources.videos import MissingFramesError, UnreadableVideoError, decode
from modeling_fer.learning.features import encode
from modeling_fer.learning.inference import class_names, predict_probabilities
from modeling_fer.learning.timelines import postprocess, predict_frames
from modeling_fer.video.faces import Crop, Detector, align
from modeling_fer.video.table import Row
from modeling_fer.video.tracks import Tracker

Frame = tuple[int, float, np.ndarray]  # its number from 1, its time in seconds, uint8 RGB (H, W, 3)


def read_frames(path: Path, skip: Callable[[str, str], None]) -> Iterator[Frame]:
    """Yield the frames of a video file, upright, their times rising from 0.

    Args:
        path: the file.
        skip: told what of the file cannot be used (its name, with the frame's number where it is one frame),
            and why. What comes before a damage is yielded.

    Raises:
        ValueError: PyAV is not installed.
    """
    number, last = 0, -1.0
    try:
        for number, (seconds, frame) in enumerate(decode(path), start=1):
            if frame.is_corrupt:
                skip(f"{path} frame {number}", "unreadable")
            elif seconds <= last:
                skip(f"{path} frame {number}", f"its time, {seconds:.3f} s, is not after the last one's")
            else:
                last = seconds
                image = frame.to_image()
                if frame.rotation:  # what phones film on their side is marked, not turned
                    image = image.rotate(frame.rotation, expand=True)
                yield number, seconds, np.asarray(image)
    except MissingFramesError as error:  # which a video that was cut without being encoded again lacks, too
        print(f"{path}: {error.reason} ({error}); those that came are used", file=sys.stderr)
    except UnreadableVideoError as error:
        skip(f"{path} after frame {number}" if number else str(path), f"{error.reason} ({error})")


def find_faces(
    frames: Iterable[Frame], size: int, detector: Detector | None, crop: Crop | None
) -> Iterator[tuple[Row, np.ndarray | None]]:
    """Yield a row for each frame, still without probabilities, and the face as uint8 (3, size, size), if any.

    Of several faces it is the one that was followed so far, else the largest; see `Tracker`. Without a
    detector, each frame is the crop of one face.
    """
    tracker = Tracker()
    for number, seconds, rgb in frames:
        if detector is None or crop is None:
            yield Row(number, seconds, face=0), decode_image(Image.fromarray(rgb), size)
            continue
        faces = detector.detect(rgb)
        tracks = tracker.step(faces)
        if tracker.foremost is None:
            yield Row(number, seconds), None
        else:
            face = faces[tracker.foremost]
            pixels = align(rgb, face, size, crop).transpose(2, 0, 1)
            yield Row(number, seconds, tracks[tracker.foremost], face.box), pixels


def predict_video(
    model: Any,
    processor: Any,
    frames: Iterable[Frame],
    detector: Detector | None = None,
    batch_size: int = 64,
) -> list[Row]:
    """Rows of all frames of a video, with the probabilities of the model's classes where there is a face.

    A model of videos looks at each face's own frames; those in which it is not seen are absent to it. Frames
    and faces are held a batch at a time.

    Args:
        model: of videos, or of stills, which then sees each frame for itself; in evaluation mode.
        processor: its image processor.
        frames: number from 1, rising time in seconds, and uint8 RGB `(H, W, 3)` of each.
        detector: finds the faces, which are cut out as the model's configuration says; None: each frame is
            the crop of one face.
        batch_size: frames at once.

    Raises:
        ValueError: the configuration does not say how to cut out faces, or the model's output is not finite.
    """
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    names, normalize = class_names(model), Normalize(processor.image_mean, processor.image_std)
    is_video = isinstance(model, FerForVideoClassification)
    crop = Crop.from_dict(model.config.crop) if detector else None
    sightings = find_faces(frames, processor.size["height"], detector, crop)
    rows: list[Row] = []
    found = []
    while batch := list(itertools.islice(sightings, batch_size)):
        rows += [row for row, _ in batch]
        if faces := [pixels for _, pixels in batch if pixels is not None]:
            pixels = np.stack(faces)
            found.append(
                encode(model.fer, pixels, normalize)
                if is_video
                else predict_probabilities(model, pixels, normalize, batch_size)
            )
    places = [place for place, row in enumerate(rows) if row.face is not None]
    if not places:
        return rows
    values = np.concatenate(found)
    if is_video:
        tracks = np.array([rows[place].face for place in places])
        positions = np.array([rows[place].seconds for place in places]) * model.config.frame_rate
        probabilities = np.empty((len(places), len(names)), np.float32)
        ours = [CLASSES.index(name) for name in names]
        for track in np.unique(tracks):
            own = np.flatnonzero(tracks == track)
            logits = predict_frames(model, values[own], positions[own])
            probabilities[own] = postprocess(model, logits, positions[own])[:, ours]
        values = probabilities
    for place, scores in zip(places, values, strict=True):
        rows[place] = dataclasses.replace(
            rows[place], probabilities=dict(zip(names, scores.tolist(), strict=True))
        )
    return rows
