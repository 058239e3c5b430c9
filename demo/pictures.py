"""Pictures of what the Space says: faces boxed, bars, timelines."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from modeling_fer.cli.videos import read_frames
from modeling_fer.video.table import Row

SHOWN_FACES = 8  # whose bars are drawn; the table has them all
SHOWN_SIDE = 640  # pixels of the longer side of the video that is shown
CLOCK = Fraction(1, 90_000)  # seconds

COLOURS = {
    "Neutral": "#8a8f98", "Anger": "#c8443b", "Disgust": "#6f9a3e", "Fear": "#7b5bb0",
    "Happiness": "#e3a62a", "Sadness": "#3f78b5", "Surprise": "#2a9d94", "Other": "#b0718f",
}  # fmt: skip


def boxed(image: Image.Image, rows: Sequence[Row]) -> Image.Image:
    """A copy of an image with a box around each face, and its expression."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    unit = max(image.size) / 640
    for row in rows:
        if row.box is None or row.expression is None:
            continue
        x, y, w, h = row.box
        colour, line = COLOURS[row.expression], max(2, round(3 * unit))
        draw.rectangle((x, y, x + w, y + h), outline=colour, width=line)
        text = f"{(row.face or 0) + 1} {row.expression}"
        size = min(20 * unit, w / 6)  # about as wide as the box: no word covers another face's
        font = ImageFont.load_default(max(8, round(size)))
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        wide, high = right - left + 3 * line, bottom - top + 3 * line
        x = min(max(x, 0), max(image.width - wide, 0))
        y = y - high if y >= high else y + h
        draw.rectangle((x, y, x + wide, y + high), fill=colour)
        draw.text((x + 1.5 * line - left, y + 1.5 * line - top), text, fill="white", font=font)
    return image


def boxed_video(path: str | Path, rows: Sequence[Row], out: Path) -> Path:
    """Write a video with its faces boxed, small enough for a page, in H.264."""
    import av

    said = {row.frame: row for row in rows}
    with av.open(str(out), "w") as container:
        stream: Any = None
        for number, seconds, rgb in read_frames(Path(path), lambda what, reason: None):
            if number not in said:
                continue
            image = boxed(Image.fromarray(rgb), [said[number]])
            if stream is None:
                scale = min(1.0, SHOWN_SIDE / max(image.size))
                wide, high = (max(2, round(side * scale / 2) * 2) for side in image.size)  # even, for H.264
                stream = container.add_stream("libx264", options={"preset": "veryfast", "crf": "23"})
                stream.width, stream.height, stream.pix_fmt = wide, high, "yuv420p"
                stream.time_base = stream.codec_context.time_base = CLOCK
            frame = av.VideoFrame.from_image(image.resize((wide, high)))
            frame.pts, frame.time_base = round(seconds / CLOCK), CLOCK
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out


def bars_figure(rows: Sequence[Row], crops: Sequence[np.ndarray]) -> Figure:
    """The crop of each face, and its probabilities as bars."""
    count = min(len(crops), SHOWN_FACES)
    figure = Figure(figsize=(6, 2.1 * count), layout="constrained")
    grid = figure.subplots(count, 2, squeeze=False, width_ratios=[1, 2.2])
    for (left, right), row, crop in zip(grid, rows, crops, strict=False):
        left.imshow(crop)
        left.set_axis_off()
        left.set_title(f"face {(row.face or 0) + 1}", fontsize=9)
        names, values = list(row.probabilities), list(row.probabilities.values())
        bars = right.barh(names, values, color=[COLOURS[name] for name in names])
        right.bar_label(bars, [f"{value:.0%}" for value in values], padding=3, fontsize=8)
        right.invert_yaxis()
        right.set(xlim=(0, 1.12), xticks=[])
        right.tick_params(length=0, labelsize=8)
        right.spines[:].set_visible(False)
    return figure


def timeline_figure(rows: Sequence[Row], classes: Sequence[str]) -> Figure:
    """Probabilities over time, stacked; blank where there is no face, or another one."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots()
    start = 0
    for end in range(1, len(rows) + 1):
        if end < len(rows) and rows[end].face == rows[start].face:
            continue
        part = rows[start:end]
        # A frame lasts until the next one.
        seconds = [row.seconds for row in part] + [rows[min(end, len(rows) - 1)].seconds]
        if part[0].face is not None:
            values = np.array([[row.probabilities[name] for name in classes] for row in [*part, part[-1]]])
            axes.stackplot(seconds, values.T, colors=[COLOURS[name] for name in classes], linewidth=0)
        start = end
    for name in classes:
        axes.fill_between([], [], color=COLOURS[name], label=name)
    last = rows[-1].seconds
    axes.set(xlim=(rows[0].seconds, last if last > rows[0].seconds else last + 1), ylim=(0, 1))
    axes.set(xlabel="Seconds", ylabel="Probability")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8, reverse=True)
    return figure
