"""The Space: expressions of the faces in a photograph, in a short video, or before a camera.

python demo/app.py --model FOLDER_OR_HUB_ID --detector face_detection_yunet_2023mar.onnx
"""

import argparse
import html
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from pictures import bars_figure, boxed, boxed_video, timeline_figure
from PIL import Image
from recognition import (
    DEFAULT_MODEL,
    SECONDS,
    Camera,
    Recognizer,
    describe,
    load,
    look,
    read_photo,
    read_video,
    summary,
)

from modeling_fer.video.faces import NO_FACE, Detector
from modeling_fer.video.table import Row, write_table

UPLOAD = "100mb"  # largest file
KEPT = 3600  # seconds after which Gradio deletes what was uploaded and shown
EVERY = 0.2  # seconds between two frames of a camera
WATCHED = 300  # seconds that a camera is followed at once
CAMERAS = 4  # at once

ABOUT = """# Facial expression

Finds the faces of a photograph, a short video or a camera, and says which expression people would see in
each.
"""
CAUTION = """What is shown is the expression that people would **perceive**, not what anyone **feels**. Models
learn from posed and scraped faces, err more on other cameras, ages and groups, and must not decide anything
about a person. In the European Union, the AI Act, Art. 5(1)(f), prohibits inferring emotions at work and in
education, but for medical or safety reasons.

Pictures are sent to the machine that runs this app; it deletes what was uploaded and shown after an hour or
two.
"""


def build(recognizer: Recognizer) -> Any:
    """Lay the page out, as `gradio.Blocks`."""
    import gradio as gr

    @contextmanager
    def explained() -> Iterator[None]:
        """Show what the user can mend as a message; it is read as HTML."""
        try:
            yield
        except (OSError, ValueError) as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    def table(folder: str, rows: Sequence[Row]) -> str:
        path = Path(folder) / "expressions.csv"
        write_table(path, rows, recognizer.classes)
        return str(path)

    # Gradio copies the files that are yielded, and goes on then: the folder is gone.
    def on_photo(path: str | None) -> Iterator[Sequence[Any]]:
        if path is None:
            yield None, None, None, ""
            return
        with explained(), TemporaryDirectory() as folder:
            image, rows, crops = read_photo(recognizer, path)
            bars = bars_figure(rows, crops) if crops else None
            said = f"{len(crops)} faces." if len(crops) != 1 else "1 face."
            yield boxed(image, rows), bars, table(folder, rows), said if crops else f"{NO_FACE.capitalize()}."

    def on_video(path: str | None, progress: Any = gr.Progress()) -> Iterator[Sequence[Any]]:  # noqa: B008
        if path is None:
            yield None, None, None, ""
            return
        with explained(), TemporaryDirectory() as folder:
            rows, remarks = read_video(
                recognizer, path, lambda seconds: progress((seconds, None), unit="seconds", desc="looking")
            )
            shown = boxed_video(path, rows, Path(folder) / "faces.mp4")
            timeline = timeline_figure(rows, recognizer.classes)
            yield str(shown), timeline, table(folder, rows), html.escape(summary(rows, remarks))

    def on_frame(rgb: np.ndarray | None, camera: Camera | None) -> Sequence[Any]:
        if rgb is None:
            return None, None, camera
        with explained():
            now = time.monotonic()
            camera = camera or Camera(Detector(recognizer.detector), now)
            row = look(recognizer, camera, rgb, now)
            return boxed(Image.fromarray(rgb), [row]), row.probabilities or {NO_FACE: 0.0}, camera

    def on_stop(camera: Camera | None) -> Iterator[Sequence[Any]]:
        if camera is None:
            yield None, None, "Nothing was recorded yet: start the camera first."
            return
        with explained(), TemporaryDirectory() as folder:
            timeline = timeline_figure(camera.rows, recognizer.classes)
            yield timeline, table(folder, camera.rows), summary(camera.rows)

    with gr.Blocks(title="Facial expression", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gr.Markdown(ABOUT)
        gr.Markdown(describe(recognizer))
        with gr.Tab("Photograph"), gr.Row():
            with gr.Column():
                photo = gr.Image(
                    label="Photograph",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    height=360,
                )
                photo_boxed = gr.Image(
                    label="Faces", format="jpeg", interactive=False, buttons=["download", "fullscreen"]
                )
            with gr.Column():
                photo_said = gr.Markdown()
                photo_bars = gr.Plot(show_label=False)
                photo_table = gr.File(label="Table (CSV)")
            photo.change(on_photo, photo, [photo_boxed, photo_bars, photo_table, photo_said])
        with gr.Tab("Video"):
            gr.Markdown(f"At most {SECONDS} seconds. Of several faces it follows the largest.")
            with gr.Row():
                video = gr.Video(label="Video", sources=["upload"], height=360)
                video_boxed = gr.Video(label="Face", interactive=False, height=360)
            video_said = gr.Markdown()
            video_timeline = gr.Plot(show_label=False)
            video_table = gr.File(label="Table (CSV)")
            video.change(on_video, video, [video_boxed, video_timeline, video_table, video_said])
        with gr.Tab("Camera"):
            gr.Markdown(f"At most {WATCHED // 60} minutes at once. Of several faces it follows the largest.")
            state = gr.State(time_to_live=KEPT)
            with gr.Row():
                camera = gr.Image(
                    label="Camera",
                    sources=["webcam"],
                    streaming=True,
                    webcam_options=gr.WebcamOptions(mirror=False),
                    height=360,
                )
                camera_boxed = gr.Image(
                    label="Face", format="jpeg", interactive=False, height=360, buttons=[]
                )
                camera_bars = gr.Label(label="Expression", num_top_classes=len(recognizer.classes))
            with gr.Row():
                stop = gr.Button("Timeline and table", size="sm")
                forget = gr.Button("Forget", size="sm")
            camera_said = gr.Markdown()
            camera_timeline = gr.Plot(show_label=False)
            camera_table = gr.File(label="Table (CSV)")
            camera.stream(
                on_frame,
                [camera, state],
                [camera_boxed, camera_bars, state],
                stream_every=EVERY,
                time_limit=WATCHED,
                concurrency_limit=CAMERAS,
                show_progress="hidden",
            )
            results = [camera_timeline, camera_table, camera_said]
            stop.click(on_stop, state, results)
            forget.click(lambda: (None, None, None, ""), None, [state, *results])
        gr.Markdown(CAUTION)
    return page


def main(argv: list[str] | None = None) -> int:
    """Load the model and serve the page; what the user can mend is told in one line."""
    parser = argparse.ArgumentParser(
        description="Facial expressions in the browser, computed on this machine."
    )
    parser.add_argument("--model", help=f"folder or Hub id (default: $FER_MODEL, else {DEFAULT_MODEL})")
    parser.add_argument(
        "--detector", help="ONNX file of YuNet (default: $FER_DETECTOR, else that of the Hub's cache)"
    )
    parser.add_argument("--port", type=int, help="to serve at (default: 7860, or the next that is free)")
    args = parser.parse_args(argv)
    try:
        recognizer = load(args.model, args.detector)
        page = build(recognizer)
    except (ImportError, OSError, ValueError) as error:
        sys.stderr.write(f"app: {error}\n")
        return 2
    page.launch(server_port=args.port, max_file_size=UPLOAD, ssr_mode=False, footer_links=["api", "gradio"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
