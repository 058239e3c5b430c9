"""Faces from frame to frame: which of them are one person's, told by how much their boxes overlap."""

from collections.abc import Sequence

from modeling_fer.video.faces import Face, iou


class Tracker:
    """Numbers the faces of frame after frame: one number, one track.

    After the IOU tracker of Bochinski, Eiselein and Sikora (2017), "High-speed tracking-by-detection without
    using image information", AVSS: pairs of a track's latest face and a new one are taken by falling
    intersection over union, each track and each face once. A face without a partner begins a track. What a
    step costs and what is remembered do not grow with the video.

    Args:
        overlap: least intersection over union of a pair; above 0, at most 1.
        patience: frames that a face may be away before its track has ended.

    Attributes:
        foremost: place of the face to go by among the latest step's, or None without a face: the one that was
            followed so far; while it is away, the largest; once its track has ended, the largest of then is
            followed.

    Raises:
        ValueError: a value out of its range.
    """

    def __init__(self, overlap: float = 0.3, patience: int = 15) -> None:
        if not 0 < overlap <= 1:
            raise ValueError(f"overlap must be above 0 and at most 1, got {overlap}")
        if patience < 0:
            raise ValueError(f"patience must not be negative, got {patience}")
        self.overlap, self.patience = overlap, patience
        self.foremost: int | None = None
        self._latest: dict[int, tuple[Face, int]] = {}  # by track: its face, and the step that showed it
        self._followed: int | None = None
        self._steps = self._tracks = 0

    def step(self, faces: Sequence[Face]) -> list[int]:
        """Return the number of each face's track, from 0, for the faces of the next frame."""
        here, self._steps = self._steps, self._steps + 1
        self._latest = {n: seen for n, seen in self._latest.items() if here - seen[1] <= self.patience + 1}
        pairs = sorted(
            (-shared, number, face.box, place)
            for number, (last, _) in self._latest.items()
            for place, face in enumerate(faces)
            if (shared := iou(last, face)) >= self.overlap
        )
        numbers: dict[int, int] = {}  # by place
        for _, number, _, place in pairs:
            if place not in numbers and number not in numbers.values():
                numbers[place] = number
        for place in range(len(faces)):
            if place not in numbers:
                numbers[place], self._tracks = self._tracks, self._tracks + 1
            self._latest[numbers[place]] = faces[place], here
        largest = max(range(len(faces)), key=lambda place: faces[place].area, default=None)
        if self._followed not in self._latest:
            self._followed = None if largest is None else numbers[largest]
        followed = [place for place, number in numbers.items() if number == self._followed]
        self.foremost = followed[0] if followed else largest
        return [numbers[place] for place in range(len(faces))]
