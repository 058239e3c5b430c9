"""A small Aff-Wild2 tree of drawn faces, in the layout in which the set is given out.

python -m tests.aff_wild2_tree OUT
"""

import argparse
import dataclasses
import io
from pathlib import Path

import numpy as np
from PIL import Image

from modeling_fer.data.drawing.acting import act
from modeling_fer.data.drawing.face import Face, Identity, View
from modeling_fer.data.drawing.render import render
from modeling_fer.labels import CLASSES, IGNORE, NUM_CLASSES

SIDE = 112
PEOPLE = 3
ROOTS = ("cropped_aligned", "cropped_aligned_new_50_vids")
# Challenge folder and name of its training folder, as spelt by one edition or another.
LAYOUTS = (("EXPR_Recognition_Challenge", "Train_Set"), ("EXPR_Classification_Challenge", "Training_Set"))


@dataclasses.dataclass(frozen=True)
class Tree:
    """Where everything lies, and what was written."""

    root: Path
    images: tuple[Path, ...]  # the image roots
    annotations: Path  # holds EXPR_Recognition_Challenge/{Train,Validation}_Set
    older_annotations: Path  # holds EXPR_Classification_Challenge/{Training,Validation}_Set
    test_list: Path  # names of the test videos, a line each
    template: Path  # a submission template that lists every frame of the test videos
    splits: dict[str, str]  # video -> train, validation or test
    labels: dict[str, list[int]]  # video -> class id of frame 1, 2, ..., true ones for test videos as well
    frames: dict[str, list[int]]  # video -> numbers of the frames that have an image

    @property
    def image_roots(self) -> str:
        """The image roots as the option `images` takes them."""
        return ",".join(map(str, self.images))

    def label_file(self, video: str) -> Path:
        """Return the label file of a training or validation video."""
        folder = {"train": "Train_Set", "validation": "Validation_Set"}[self.splits[video]]
        return self.annotations / LAYOUTS[0][0] / folder / f"{video}.txt"

    def image(self, video: str, frame: int) -> Path:
        """Return the path of the image of a frame."""
        root = next(root for root in self.images if (root / video).is_dir())
        return root / video / f"{frame:05d}.jpg"


def write_tree(root: Path | str, videos: int = 24, frames: int = 60, seed: int = 0) -> Tree:
    """Write a tree of `videos` recordings of about `frames` frames each, always the same for the same seed.

    Half of them are for training, a quarter for validation, the rest for testing. The first of each split
    shows two people: it has a second track, whose name ends in _left or _right. Labels change every few
    frames and are -1 for a stretch; some images are missing, one by one and for a stretch.
    """
    root = Path(root)
    rng = np.random.default_rng([seed])
    faces = draw_faces(seed)
    splits, labels, present = {}, {}, {}
    for number in range(videos):
        share = number / videos
        split = "train" if share < 0.5 else "validation" if share < 0.75 else "test"
        recording = f"{number + 1}-{rng.integers(10, 60)}-640x360"
        tracks = [recording]
        if split not in splits.values():
            tracks.append(recording + ("_right" if split == "train" else "_left"))
        for video in tracks:
            length = int(rng.integers(max(8, frames * 3 // 4), max(9, frames * 5 // 4)))
            splits[video] = split
            labels[video] = _labels(length, rng)
            present[video] = _present(length, rng)
            folder = root / ROOTS[number % 2] / video
            folder.mkdir(parents=True)
            person = int(rng.integers(PEOPLE))
            for frame in present[video]:
                label = labels[video][frame - 1]
                # What annotators gave no label to shows any class.
                shown = label if label != IGNORE else frame % NUM_CLASSES
                (folder / f"{frame:05d}.jpg").write_bytes(faces[person][shown])

    annotations, older = root / "annotations", root / "older_annotations"
    for base, (challenge, training) in zip((annotations, older), LAYOUTS, strict=True):
        for split, name in (("train", training), ("validation", "Validation_Set")):
            folder = base / challenge / name
            folder.mkdir(parents=True)
            for video in (video for video, of in splits.items() if of == split):
                lines = [",".join(CLASSES), *map(str, labels[video])]
                (folder / f"{video}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    test = [video for video, split in splits.items() if split == "test"]
    test_list, template = root / "test_set.txt", root / "template.txt"
    test_list.write_text("".join(f"{video}\n" for video in test), encoding="utf-8")
    rows = [f"{video}/{frame + 1:05d}.jpg" for video in test for frame in range(len(labels[video]))]
    commas = ("", ",", "," * NUM_CLASSES)  # some copies have them at the ends of some lines
    lines = [f"image_location,{','.join(CLASSES)}", *(row + commas[k % 3] for k, row in enumerate(rows))]
    template.write_text("\n".join(lines) + "\n", encoding="utf-8")
    images = tuple(root / name for name in ROOTS)
    return Tree(root, images, annotations, older, test_list, template, splits, labels, present)


def draw_faces(seed: int) -> list[list[bytes]]:
    """Return a JPEG of every class for each of a few people."""
    rng = np.random.default_rng([seed, 1])
    people = [Identity.sample(rng) for _ in range(PEOPLE)]
    drawn = [
        Face(who, act(label, 1.0, rng), View.sample(rng)) for who in people for label in range(NUM_CLASSES)
    ]
    encoded = []
    for pixels in render(drawn, SIDE):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return [encoded[k * NUM_CLASSES : (k + 1) * NUM_CLASSES] for k in range(PEOPLE)]


def _labels(length: int, rng: np.random.Generator) -> list[int]:
    """Draw a class for every stretch of 5 to 15 frames, and none for one stretch."""
    labels: list[int] = []
    while len(labels) < length:
        labels += [int(rng.integers(NUM_CLASSES))] * int(rng.integers(5, 16))
    start = int(rng.integers(length - 2))
    labels[start : start + max(2, length // 10)] = [IGNORE] * max(2, length // 10)
    return labels[:length]


def _present(length: int, rng: np.random.Generator) -> list[int]:
    """Draw the numbers of the frames in which a face was found."""
    found = rng.random(length) > 0.03
    start = int(rng.integers(1, length))
    found[start : start + length // 5] = False
    found[0] = True
    return (np.flatnonzero(found) + 1).tolist()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a small Aff-Wild2 tree of drawn faces.")
    parser.add_argument("out", help="folder to write")
    write_tree(parser.parse_args().out)
