"""What a model says of a video's faces as a table: a row for each face of each frame, written as csv.

    frame,seconds,face,x,y,w,h,expression,<a column of probabilities for each class>

A frame without a face has a row of its own, whose other cells are empty.
"""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from modeling_fer.evaluation.metrics import write_whole
from modeling_fer.labels import CLASSES

COLUMNS = ("frame", "seconds", "face", "x", "y", "w", "h", "expression")


@dataclass(frozen=True)
class Row:
    """A face in a frame, or a frame without one.

    Attributes:
        frame: its number, from 1.
        seconds: its time, the first frame's being 0.
        face: number of the face's track, from 0; None: the frame shows no face.
        box: the face's x, y, width and height in pixels; None where the frame itself is the face.
        probabilities: of each class by its name; empty without a face.
    """

    frame: int
    seconds: float
    face: int | None = None
    box: tuple[float, float, float, float] | None = None
    probabilities: dict[str, float] = field(default_factory=dict)

    @property
    def expression(self) -> str | None:
        """The most probable class, the first of equals; None without a face."""
        return max(self.probabilities, key=self.probabilities.__getitem__, default=None)


def write_table(path: str | Path, rows: Iterable[Row], classes: Sequence[str] = CLASSES) -> None:
    """Write rows as csv: seconds and pixels to the thousandth, probabilities to the millionth.

    Args:
        path: file to write; it appears whole.
        rows: in the order in which they are to stand.
        classes: columns of probabilities.

    Raises:
        OSError: the file cannot be written.
        ValueError: a row with a face has probabilities of other classes.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*COLUMNS, *classes))
    for row in rows:
        if row.face is not None and set(row.probabilities) != set(classes):
            raise ValueError(
                f"frame {row.frame} has probabilities of {', '.join(row.probabilities) or 'nothing'}, the "
                f"columns are {', '.join(classes)}"
            )
        cells: list[str | int] = [""] * (len(COLUMNS) - 2 + len(classes))
        if row.face is not None:
            box = [""] * 4 if row.box is None else [f"{value:.3f}" for value in row.box]
            shown = replace(row, probabilities={name: round(row.probabilities[name], 6) for name in classes})
            said = [f"{p:.6f}" for p in shown.probabilities.values()]
            cells = [row.face, *box, shown.expression or "", *said]
        writer.writerow((row.frame, f"{row.seconds:.3f}", *cells))
    write_whole(path, text.getvalue().encode())


def read_table(path: str | Path) -> list[Row]:
    """Read what `write_table` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such table; the message names the file and the line.
    """
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            lines = csv.reader(file)
            header = next(lines, [])
            classes = header[len(COLUMNS) :]
            if tuple(header[: len(COLUMNS)]) != COLUMNS or not classes or len(set(classes)) < len(classes):
                raise ValueError(
                    f"{path} line 1: expected {','.join(COLUMNS)} and the classes, got {','.join(header)}: "
                    "pass a table of a video"
                )
            rows = []
            for cells in lines:
                try:
                    rows.append(_row(cells, classes))
                except ValueError as error:
                    place = f"{path} line {lines.line_num}"
                    raise ValueError(f"{place}: {error}: write the table again") from error
            return rows
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read ({error}): write the table again") from error


def _row(cells: list[str], classes: list[str]) -> Row:
    """Read one line."""
    if len(cells) != len(COLUMNS) + len(classes):
        raise ValueError(f"{len(cells)} cells, not the header's {len(COLUMNS) + len(classes)}")
    frame, seconds, face, *box, expression = cells[: len(COLUMNS)]
    said = cells[len(COLUMNS) :]
    if not face:
        if any((*box, expression, *said)):
            raise ValueError("a frame without a face has other cells")
        return Row(int(frame), _number(seconds))
    corner = tuple(map(_number, box)) if any(box) else None
    probabilities = dict(zip(classes, map(_number, said), strict=True))
    row = Row(int(frame), _number(seconds), int(face), corner, probabilities)  # type: ignore[arg-type]
    if expression != row.expression:
        raise ValueError(f"expression {expression!r}, but {row.expression} is the most probable class")
    return row


def _number(text: str) -> float:
    """Return a finite number."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text!r} is no finite number")
    return value
