"""Videos from the file to a row a face: read, faces found and followed, their expressions named."""

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
from modeling_fer.video.faces import Crop, Detector, align, faces_of
from modeling_fer.video.table import Row
from modeling_fer.video.tracks import Tracker

Frame = tuple[int, float, np.ndarray]  # its number from 1, its time in seconds, uint8 RGB (H, W, 3)
Judged = tuple[Row, np.ndarray | None]  # with features or probabilities, where there is a face


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
    frames: Iterable[Frame],
    size: int,
    detector: Detector | None,
    crop: Crop | None,
    every_face: bool = False,
) -> Iterator[tuple[Row, np.ndarray | None]]:
    """Yield a row for each face, still without probabilities, and the face as uint8 (3, size, size).

    Those of a frame come by their numbers, which stay the same from frame to frame; a frame without a face
    has a row, too, and no pixels. Unless every face is asked for, it is the one that was followed so far,
    else the largest; see `Tracker`. Without a detector, each frame is the crop of one face.
    """
    tracker = Tracker()
    for number, seconds, rgb in frames:
        if detector is None or crop is None:
            yield Row(number, seconds, face=0), decode_image(Image.fromarray(rgb), size)
            continue
        faces = faces_of(rgb, detector, crop)
        tracks = tracker.step(faces)
        shown = sorted(range(len(faces)), key=tracks.__getitem__)
        if not every_face and tracker.foremost is not None:
            shown = [tracker.foremost]
        for place in shown:
            pixels = align(rgb, faces[place], size, crop).transpose(2, 0, 1)
            yield Row(number, seconds, tracks[place], faces[place].box), pixels
        if not faces:
            yield Row(number, seconds), None


def predict_video(
    model: Any,
    processor: Any,
    frames: Iterable[Frame],
    detector: Detector | None = None,
    batch_size: int = 64,
    every_face: bool = False,
) -> Iterator[Row]:
    """Yield the rows of a video, with the probabilities of the model's classes where there is a face.

    A model of stills sees each face for itself, and a batch of faces is held at a time. A model of videos
    looks at each face's own frames; those in which it is not seen are absent to it. Features of all frames
    are held then, and the rows come at the end.

    Args:
        model: of videos or of stills, in evaluation mode.
        processor: its image processor.
        frames: number from 1, rising time in seconds, and uint8 RGB `(H, W, 3)` of each.
        detector: finds the faces, which are cut out as the model's configuration says; None: each frame is
            the crop of one face.
        batch_size: faces at once.
        every_face: of several faces in a frame take each one; else the one that is followed.

    Raises:
        ValueError: the configuration does not say how to cut out faces, or the model's output is not finite.
    """
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    names, normalize = class_names(model), Normalize(processor.image_mean, processor.image_std)
    is_video = isinstance(model, FerForVideoClassification)

    def judge(pixels: np.ndarray) -> np.ndarray:
        if is_video:
            return encode(model.fer, pixels, normalize)
        return predict_probabilities(model, pixels, normalize, batch_size)

    crop = Crop.from_dict(model.config.crop) if detector else None
    sightings = find_faces(frames, processor.size["height"], detector, crop, every_face)
    judged: Iterable[Judged] = judge_batches(sightings, judge, batch_size)
    for row, scores in judge_tracks(model, list(judged)) if is_video else judged:
        known = {} if scores is None else dict(zip(names, scores.tolist(), strict=True))
        yield dataclasses.replace(row, probabilities=known)


def judge_batches(
    sightings: Iterator[tuple[Row, np.ndarray | None]],
    judge: Callable[[np.ndarray], np.ndarray],
    batch_size: int,
) -> Iterator[Judged]:
    """Yield each row with what is said of its face."""
    while batch := list(itertools.islice(sightings, batch_size)):
        faces = [pixels for _, pixels in batch if pixels is not None]
        said = iter(judge(np.stack(faces)) if faces else ())
        for row, pixels in batch:
            yield row, None if pixels is None else next(said)


def judge_tracks(model: Any, seen: list[Judged]) -> list[Judged]:
    """Rows with probabilities of the model's classes, from all rows of a video with features."""
    tracks: dict[int | None, dict[int, np.ndarray]] = {}  # of each face its features, by place
    for place, (row, features) in enumerate(seen):
        if features is not None:
            tracks.setdefault(row.face, {})[place] = features
    ours = [CLASSES.index(name) for name in class_names(model)]
    judged: list[Judged] = [(row, None) for row, _ in seen]
    for track in tracks.values():
        positions = np.array([seen[place][0].seconds for place in track]) * model.config.frame_rate
        logits = predict_frames(model, np.stack(list(track.values())), positions)
        for place, scores in zip(track, postprocess(model, logits, positions)[:, ours], strict=True):
            judged[place] = seen[place][0], scores
    return judged
