import dataclasses
import io
import json

import numpy as np
import pytest
import yaml
from PIL import Image

from modeling_fer.data.report import Report, Samples, show
from modeling_fer.data.schema import Example
from modeling_fer.labels import CLASSES

NAMES = (*CLASSES, "no label")
REPORT = Report(
    source="made",
    options={"root": "faces", "limit": None},
    counts={
        "train": dict.fromkeys(NAMES, 0) | {"Happiness": 1200, "Sadness": 3},
        "unlabeled": dict.fromkeys(NAMES, 0) | {"no label": 7},
    },
    repeats={"train": {"train": 5, "unlabeled": 2}, "unlabeled": {"train": 1, "unlabeled": 0}},
    conflicts={"train": 1, "unlabeled": 0, "all splits together": 1},
    blank={"train": 1, "unlabeled": 0},
    sizes={"width": [9, 9], "height": [3, 5]},
    crossing_subjects={},
    dropped={"train: a copy of an image before it": 1000},
    rejected={"no majority": 2, "contempt {}": 1},
    unreadable=2,
    unreadable_origins=["cut.png", "é.png"],
    remarks=["Kept by the rule: six."],
)
TEXT = """made (root faces)

class      train  unlabeled
Neutral        0          0
Anger          0          0
Disgust        0          0
Fear           0          0
Happiness  1,200          0
Sadness        3          0
Surprise       0          0
Other          0          0
no label       0          7
all        1,203          7

Kept by the rule: six.

Identical images: rows of a line's split whose pixels also occur in a column's split
(in the same split: rows after the first of each image)
           train  unlabeled
train          5          2
unlabeled      1          0

groups of identical images with conflicting labels: train 1, unlabeled 0, all splits together 1
blank images: train 1, unlabeled 0
image size: width 9 to 9, height 3 to 5
subjects in two splits: none known
dropped as duplicates: 1,000
  1,000 train: a copy of an image before it
rejected: 3
  2 no majority
  1 contempt {}
unreadable: 2
  cut.png
  é.png
warning: train has no example of Neutral, Anger, Disgust, Fear, Surprise, Other
warning: blank images in train: 1
warning: 2 images could not be read: skipped.jsonl names them
"""


def test_the_report_survives_json_and_is_shown_as_a_table(tmp_path):
    REPORT.save(tmp_path / "report.json")
    assert Report.read(tmp_path / "report.json") == REPORT
    assert json.loads((tmp_path / "report.json").read_text())["warnings"] == REPORT.warnings
    assert show(tmp_path) == TEXT
    with pytest.raises(FileNotFoundError, match=r"no .*nowhere/report.json: write .*fer data prepare"):
        show(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"source": "made", "opt',
        b"\xff\xfe\x00",
        b"null",
        b"[1, 2]",
        b'{"title": "report of another program"}',
        json.dumps(dict.fromkeys(field.name for field in dataclasses.fields(Report))).encode(),
        json.dumps({**dataclasses.asdict(REPORT), "counts": {"train": {"Happiness": 1}}}).encode(),
    ],
)
def test_a_damaged_or_foreign_report_is_named_in_one_line(tmp_path, content):
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"report.json is damaged, .*: prepare the data again") as caught:
        show(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_warnings_are_of_what_would_mislead():
    splits = ("train", "validation", "unlabeled")
    told = dataclasses.replace(
        REPORT,
        counts={split: dict.fromkeys(NAMES, 1) for split in splits},
        repeats={a: dict.fromkeys(splits, 1000) for a in splits},
        blank=dict.fromkeys(splits, 0),
        crossing_subjects={"train/validation": 1, "train/unlabeled": 4},
        unreadable=0,
    ).warnings
    assert told == [
        "1,000 train rows are images of validation too: --drop-duplicates removes them",
        "1,000 unlabeled rows are images of validation too: --drop-duplicates removes them",
        "subjects in both train and validation: 1; scores there flatter the model",
    ]


def test_the_card_names_the_files_of_the_splits_and_holds_the_report():
    _, head, body = REPORT.card().split("---\n", 2)
    (config,) = yaml.safe_load(head)["configs"]
    assert config["data_files"] == [
        {"split": split, "path": f"data/{split}-*"} for split in ("train", "unlabeled")
    ]
    assert body.startswith("\n# made for facial expression recognition\n")
    assert "- 7: Other\n" in body
    assert body.endswith(f"```\n{TEXT}```\n")


def drawn(numbers, split="train"):
    """Draw the samples of a split from as many noise images as `numbers` says for each label."""
    samples, counts = Samples(), {split: dict.fromkeys(NAMES, 0)}
    for name, number in numbers.items():
        counts[split][name] = number
        for n in range(number):
            pixels, buffer = np.random.default_rng(n).integers(0, 200, (6, 5)), io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="PNG")
            label = -1 if name == "no label" else CLASSES.index(name)
            samples.add(Example(split, buffer.getvalue(), "", "made", label))
    return np.asarray(samples.draw(counts))


def test_samples_show_a_line_per_class():
    picture = drawn({"Happiness": 30, "Sadness": 2})
    height = (picture.shape[0] - 34) // len(CLASSES)
    widths = {name: (picture[34 + n * height : 34 + (n + 1) * height, 150:] < 255).any(axis=(0, 2)).sum()
              for n, name in enumerate(CLASSES)}  # fmt: skip
    assert widths["Happiness"] == 5 * widths["Sadness"] > 0
    assert {name for name, width in widths.items() if width} == {"Happiness", "Sadness"}
    assert np.array_equal(picture, drawn({"Happiness": 30, "Sadness": 2}))
    assert len(drawn({"no label": 1}, "unlabeled")) < 200
