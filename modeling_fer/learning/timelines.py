"""What a model says of every frame of videos."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from modeling_fer import FerForVideoClassification
from modeling_fer.data.augment import Normalize
from modeling_fer.data.collection import expressions_of
from modeling_fer.data.dataset import class_translation
from modeling_fer.data.pixels import UnreadableImageError, decode
from modeling_fer.data.videos import list_frames
from modeling_fer.data.windows import Frames, Track, tracks
from modeling_fer.evaluation.tuning import VideoLogits
from modeling_fer.labels import CLASSES
from modeling_fer.learning.features import SomeFrames, encode, frame_features
from modeling_fer.learning.inference import class_names, over_all_classes, predict_probabilities

CHUNK = 512  # frames of a stream at once, where all are there


def windows_of(positions: np.ndarray, span: int) -> Iterator[tuple[float, slice]]:
    """Windows `span` frame numbers long, each half over the next, that cover all frames; where each begins.

    The first and the last end where the video does. Where no frames are, there are no windows.
    """
    first, end = positions[0], positions[-1] + 1
    start = first
    while True:
        start = max(first, min(start, end - span))
        low, high = np.searchsorted(positions, [start, start + span])
        yield float(start), slice(int(low), int(high))
        if high == len(positions):
            return
        start = positions[high] - span // 2


@torch.inference_mode()
def predict_frames(
    model: nn.Module, features: Frames, positions: np.ndarray, batch_size: int = 32
) -> np.ndarray:
    """Frame logits `(n, C)` in float32 of one video of any length, before post-processing.

    A causal model follows the frames as a stream. One that looks both ways sees windows of the length that it
    learnt from, each half over the next; where they overlap, logits are averaged with weights that fall
    towards the windows' ends, where neighbours lack. Besides the result, memory does not grow with the video.

    Args:
        model: a `FerForVideoClassification`, in evaluation mode.
        features: `(n, D)` of the frames that there are, in order; read as they are needed.
        positions: `(n,)` numbers of the frames, rising; they need not be whole. They are rounded to a
            millionth, so that the time of a whole frame, in seconds times the rate, is a whole number.
        batch_size: windows at once.

    Raises:
        ValueError: there are no frames, positions do not rise, or the model's output is not finite.
    """
    config: Any = model.config
    frames = len(positions)
    positions = np.round(np.asarray(positions, np.float64), 6)
    if not frames or (np.diff(positions) <= 0).any():
        raise ValueError(f"expected at least one frame, and positions that rise, got {positions[:5]} ...")
    device = next(model.parameters()).device
    times = torch.from_numpy(positions / config.frame_rate)
    found = np.empty((frames, len(config.id2label)), np.float32)

    def part(places: slice) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.from_numpy(np.asarray(features[places], np.float32))
        return values.to(device), times[places].to(device)

    if config.temporal_causal:
        follow: Any = model
        stream = follow.init_stream(1)
        for start in range(0, frames, CHUNK):
            places = slice(start, min(start + CHUNK, frames))
            values, own = part(places)
            logits, _, stream = follow.step(values[None], stream, own[None])
            found[places] = logits[0].float().cpu().numpy()
    else:
        total, weights = torch.zeros(found.shape), torch.zeros(frames, 1)
        windows = list(windows_of(positions, config.num_frames))
        for first in range(0, len(windows), batch_size):
            batch = windows[first : first + batch_size]
            low, high = batch[0][1].start, batch[-1][1].stop  # what windows share is read once
            values, own = part(slice(low, high))
            inside = [slice(places.start - low, places.stop - low) for _, places in batch]
            output = model(
                frame_features=pad_sequence([values[places] for places in inside], batch_first=True),
                frame_times=pad_sequence([own[places] for places in inside], batch_first=True),
                frame_mask=pad_sequence(
                    [own[places].new_ones(places.stop - places.start).bool() for places in inside],
                    batch_first=True,
                ),
            )
            for (begin, places), window in zip(batch, output.frame_logits.float().cpu(), strict=True):
                into = torch.from_numpy(positions[places] - begin)
                ramp = (torch.minimum(into, config.num_frames - 1 - into) + 1).float()[:, None]
                total[places] += window[: len(ramp)] * ramp
                weights[places] += ramp
        found = (total / weights).numpy()
    if not np.isfinite(found).all():
        raise ValueError("the model's output is not finite: its weights are damaged, or training diverged")
    return found


def predict_tracks(
    model: nn.Module,
    features: Frames,
    tracks: Sequence[Track],
    accelerator: Accelerator | None = None,
    show_progress: bool = False,
) -> list[np.ndarray]:
    """Frame logits `(n, C)` of each video, the same on every process; processes share the videos.

    Args:
        model: a `FerForVideoClassification`.
        features: `(N, D)` of the rows of the split.
        tracks: videos of that split.
        accelerator: the processes; None: this one.
        show_progress: show a progress bar.
    """
    accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available())
    model.to(accelerator.device)
    was_training = model.training
    model.eval()
    config: Any = model.config
    ends = np.cumsum([len(track.rows) for track in tracks])
    logits = np.zeros((int(ends[-1]), len(config.id2label)), np.float32)
    parts = np.split(logits, ends[:-1])
    mine = range(accelerator.process_index, len(tracks), accelerator.num_processes)
    hidden = not (show_progress and accelerator.is_main_process)
    for number in tqdm(mine, desc="videos", disable=hidden or None):
        track = tracks[number]
        parts[number][:] = predict_frames(model, SomeFrames(features, track.rows), track.frames)
    model.train(was_training)
    # Each frame was written by one process, the others have 0 there: the sum is exact.
    whole = accelerator.reduce(torch.from_numpy(logits).to(accelerator.device), "sum").cpu().numpy()
    return np.split(whole, ends[:-1])


def tracks_of(rows: Dataset, where: str) -> list[Track]:
    """The tracks of a split; `where` names it in messages.

    Raises:
        ValueError: a row is no frame of a video, or a frame is there twice.
    """
    people = zip(rows["source"][:], rows["subject"][:], strict=True)  # two data sets may use one name
    subjects = [None if subject is None else f"{source} {subject}" for source, subject in people]
    return tracks(rows["video"][:], rows["frame"][:], expressions_of(rows), where, subjects)


def video_logits(
    logits: Sequence[np.ndarray], found: Sequence[Track], classes: Sequence[str]
) -> list[VideoLogits]:
    """Logits of tracks with their labels in the order of the model's classes, for `evaluation.tuning`."""
    translate = class_translation(classes).numpy()
    return [
        VideoLogits(own, translate[track.labels], track.frames.astype(np.float64), track.group)
        for own, track in zip(logits, found, strict=True)
    ]


def postprocess(model: Any, logits: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Probabilities `(n, 8)` over our classes of a video's frame logits `(n, C)`, as the checkpoint says."""
    found = model.postprocess(
        torch.from_numpy(logits)[None], None, torch.from_numpy(positions)[None].double()
    )
    return over_all_classes(found[0].numpy(), class_names(model))


def predict_split(
    model: Any, processor: Any, rows: Dataset, where: str, cache_dir: Path, batch_size: int = 256
) -> np.ndarray:
    """Post-processed probabilities `(N, 8)` of the rows of a split by a video model, in their order.

    Features are kept in `cache_dir`, see `frame_features`.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    normalize = Normalize(processor.image_mean, processor.image_std)
    size = processor.size["height"]
    features = frame_features(model.fer, rows, normalize, size, cache_dir, accelerator, batch_size)
    found = tracks_of(rows, where)
    probabilities = np.zeros((len(rows), len(CLASSES)), np.float32)
    for track, logits in zip(found, predict_tracks(model, features, found, accelerator, True), strict=True):
        probabilities[track.rows] = postprocess(model, logits, track.frames)
    return probabilities


def predict_folder(
    model: Any,
    processor: Any,
    folder: Path,
    skip: Callable[[str, str], None],
    batch_size: int = 256,
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of a video whose frames are images in a folder, numbered by their names.

    Args:
        model: of videos, or of stills, which then sees each frame for itself.
        processor: its image processor.
        folder: face crops, as in `cropped_aligned/<video>` of Aff-Wild2.
        skip: told the name and the reason of every file that is no frame or cannot be read.
        batch_size: frames at once.

    Returns:
        Frame numbers `(n,)`, rising, and post-processed probabilities `(n, 8)`; both empty without a frame.
    """
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    normalize = Normalize(processor.image_mean, processor.image_std)
    is_video = isinstance(model, FerForVideoClassification)
    files, rejected = list_frames(folder, folder.name)
    for item in rejected:
        skip(item.origin, item.reason)
    numbers, found = [], []
    waiting: list[np.ndarray] = []

    def run() -> None:
        if not waiting:
            return
        pixels = np.stack(waiting)
        waiting.clear()
        found.append(
            encode(model.fer, pixels, normalize)
            if is_video
            else predict_probabilities(model, pixels, normalize, batch_size)
        )

    for number, name in files.items():
        try:
            waiting.append(decode((folder / name).read_bytes(), processor.size["height"]))
        except (OSError, UnreadableImageError) as error:
            skip(f"{folder.name}/{name}", str(error))
            continue
        numbers.append(number)
        if len(waiting) == batch_size:
            run()
    run()
    positions = np.asarray(numbers, dtype=np.int64)
    if not numbers:
        return positions, over_all_classes(np.zeros((0, len(class_names(model)))), class_names(model))
    values = np.concatenate(found)
    if not is_video:
        return positions, over_all_classes(values, class_names(model))
    return positions, postprocess(model, predict_frames(model, values, positions), positions)
