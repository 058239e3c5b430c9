import shutil
from collections import Counter

import pytest
from aff_wild2_tree import write_tree
from transformers import HfArgumentParser

from modeling_fer.data import schema
from modeling_fer.data.prepare import prepare
from modeling_fer.data.report import show
from modeling_fer.data.schema import Example, Rejected, Remark
from modeling_fer.data.sources import aff_wild2
from modeling_fer.data.sources.aff_wild2 import AffWild2Options, examples
from modeling_fer.labels import CLASSES, NUM_CLASSES

HEADER = ",".join(CLASSES)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("aff_wild2"), videos=8, frames=24)


def read(tree, **options):
    options = {"images": tree.image_roots, "annotations": str(tree.annotations), **options}
    return list(examples(AffWild2Options(**options)))


def split_items(items):
    """Return examples, rejected rows and the remarks' texts."""
    return (
        [item for item in items if isinstance(item, Example)],
        [item for item in items if isinstance(item, Rejected)],
        [item.text for item in items if isinstance(item, Remark)],
    )


@pytest.fixture
def small(tmp_path):
    """Return a writer of one tiny training video: the content of its label file, the names of its images."""

    def write(text=f"{HEADER}\n0\n1\n2\n", names=("00001.jpg", "00002.jpg", "00003.jpg"), video="v"):
        annotations, images = tmp_path / "EXPR_Set", tmp_path / "images"
        (annotations / "Training_Set").mkdir(parents=True, exist_ok=True)
        (annotations / "Training_Set" / f"{video}.txt").write_bytes(text.encode())
        (images / video).mkdir(parents=True, exist_ok=True)
        for name in names:
            (images / video / name).write_bytes(name.encode())
        return {"images": str(images), "annotations": str(annotations)}

    return write


def read_small(options, **more):
    return split_items(list(examples(AffWild2Options(**options, **more))))


def test_every_frame_of_the_tree_is_there_in_order(tree):
    items = read(tree, test_list=str(tree.test_list))
    assert items == read(tree, test_list=str(tree.test_list))
    found, rejected, _ = split_items(items)
    expected, lost = [], []
    order = {"train": 0, "validation": 1, "test": 2}
    for video in sorted(tree.splits, key=lambda video: (order[tree.splits[video]], video)):
        split, labels = tree.splits[video], tree.labels[video]
        for frame, label in enumerate(labels, start=1):
            known = -1 if split == "test" else label
            if frame in tree.frames[video]:
                image = tree.image(video, frame)
                assert image.is_file()
                expected.append((split, video, frame, known, f"{video}/{frame:05d}.jpg", image.read_bytes()))
            elif known != -1:
                lost.append(Rejected(f"{video} frame {frame}", "no image of the frame"))
    assert [(e.split, e.video, e.frame, e.expression, e.origin, e.image) for e in found] == expected
    assert rejected == lost
    assert {(e.source, e.subject, e.soft_label) for e in found} == {("aff_wild2", None, None)}
    assert {-1, *range(NUM_CLASSES)} == {e.expression for e in found}
    assert any(e.expression == -1 for e in found if e.split == "train")  # context for temporal models
    assert len(lost) > 10


def test_remarks_count_what_is_there(tree):
    _, _, remarks = split_items(read(tree, test_list=str(tree.template)))
    for split in ("train", "validation"):
        videos = [video for video, of in tree.splits.items() if of == split]
        labelled = [
            (label, frame in tree.frames[video])
            for video in videos
            for frame, label in enumerate(tree.labels[video], start=1)
            if label != -1
        ]
        counts = Counter(label for label, there in labelled if there)
        missing = sum(not there for _, there in labelled)
        by_class = ", ".join(f"{name} {counts[label]}" for label, name in enumerate(CLASSES))
        images = sum(len(tree.frames[video]) for video in videos)
        assert (
            f"{split}: {len(videos)} videos (0 without images), {images} images; labelled frames with an "
            f"image: {counts.total()} ({by_class}); without: {missing}."
        ) in remarks
    test = [video for video, split in tree.splits.items() if split == "test"]
    no_face = sum(len(tree.labels[video]) - len(tree.frames[video]) for video in test)
    assert no_face > 5
    listed = [text for text in remarks if "template lists" in text]
    assert listed == [
        f"test: frames that the template lists and that have no image: {no_face}; "
        "a submission needs a prediction for them too."
    ]
    assert not any("two splits" in text or "known" in text for text in remarks)


def test_every_layout_of_the_labels_and_every_form_of_the_test_list_gives_the_same(tree, tmp_path):
    items = read(tree)
    (challenge,) = tree.annotations.iterdir()
    (older,) = tree.older_annotations.iterdir()
    for place in (challenge, tree.older_annotations, older):
        assert read(tree, annotations=str(place)) == items
    spaced = tmp_path / "Third ABAW Annotations"
    shutil.copytree(challenge, spaced / "EXPR Set")
    (spaced / "EXPR Set" / "Train_Set").rename(spaced / "EXPR Set" / "training set")
    (spaced / "AU_Detection_Challenge" / "Train_Set").mkdir(parents=True)
    assert read(tree, annotations=str(spaced)) == items

    by_name, by_template = (read(tree, test_list=str(path)) for path in (tree.test_list, tree.template))
    assert [e for e in by_name if isinstance(e, Example)] == [
        e for e in by_template if isinstance(e, Example)
    ]
    windows = tmp_path / "list.txt"
    text = "\ufeff" + "\r\n".join(f"{name}.mp4 " for name in tree.test_list.read_text().split())
    windows.write_text(text + "\r\n\r\n", newline="")
    assert read(tree, test_list=str(windows)) == by_name
    only_test = read(tree, annotations=None, test_list=str(tree.test_list))
    assert {e.split for e in only_test if isinstance(e, Example)} == {"test"}


def test_the_tree_can_be_prepared_and_loaded(tree, tmp_path):
    options = AffWild2Options(tree.image_roots, str(tree.annotations), str(tree.test_list))
    report = prepare("aff_wild2", options, tmp_path / "out", show_progress=False)
    data = schema.load(tmp_path / "out")
    assert {split: len(rows) for split, rows in data.items()} == {
        split: sum(len(tree.frames[video]) for video, of in tree.splits.items() if of == split)
        for split in ("train", "validation", "test")
    }
    for split, rows in data.items():
        assert rows[0]["image"].size == (112, 112)
        assert set(rows["video"][:]) == {video for video, of in tree.splits.items() if of == split}
        for video, frame, label in zip(
            rows["video"][:], rows["frame"][:], rows["expression"][:], strict=True
        ):
            assert label == (-1 if split == "test" else tree.labels[video][frame - 1])
    assert report.options["images"] == "cropped_aligned,cropped_aligned_new_50_vids"
    assert str(tree.root) not in (tmp_path / "out/README.md").read_text()
    assert "labelled frames with an image" in show(tmp_path / "out")


def test_only_some_frames(tree):
    everything, _, remarks = split_items(read(tree))
    some, rejected, same_remarks = split_items(read(tree, frame_step=5))
    assert some == [e for e in everything if e.frame % 5 == 1]
    assert all(int(item.origin.split()[-1]) % 5 == 1 for item in rejected)
    assert same_remarks == remarks


def test_gaps_one_frame_and_no_label_at_all(small):
    small(f"{HEADER}\n" + "3\n" * 400, ["00001.jpg", "00400.jpg"], video="gap")  # 13 seconds at 30 a second
    small(f"{HEADER}\n6\n", ["00001.jpg"], video="single")
    options = small(f"{HEADER}\n-1\n-1\n-1\n", video="unlabelled")
    found, rejected, _ = read_small(options)
    assert [(e.video, e.frame, e.expression) for e in found] == [
        ("gap", 1, 3), ("gap", 400, 3), ("single", 1, 6),
        ("unlabelled", 1, -1), ("unlabelled", 2, -1), ("unlabelled", 3, -1),
    ]  # fmt: skip
    assert len(rejected) == 398


@pytest.mark.parametrize(
    ("text", "labels", "remark"),
    [
        (f"{HEADER}\n4\n", [4, -1, -1], "before the images: 1; the 2 images after their ends"),
        (f"{HEADER}\n", [-1, -1, -1], "before the images: 1; the 3 images after their ends"),
        (f"{HEADER}\n4\n-1\n5\n-1\n-1\n", [4, -1, 5], "that go on after the last image: 1."),
    ],
)
def test_label_files_shorter_and_longer_than_the_video(small, text, labels, remark):
    found, rejected, remarks = read_small(small(text))
    assert [e.expression for e in found] == labels
    assert not rejected
    assert sum(remark in said for said in remarks) == 1


def test_what_lies_among_the_images(small):
    names = ["00001.jpg", "00002.JPG", "2.png", "00003.png", ".DS_Store", "._00001.jpg", "Thumbs.db",
             "frame_4.jpg", "00000.jpg"]  # fmt: skip
    options = small(names=names)
    found, rejected, _ = read_small(options)
    assert [(e.frame, e.image) for e in found] == [(1, b"00001.jpg"), (2, b"00002.JPG"), (3, b"00003.png")]
    assert {(item.origin, item.reason) for item in rejected} == {
        ("v/2.png", "a second image of the frame"),
        ("v/Thumbs.db", "not an image file"),
        ("v/frame_4.jpg", "no frame number in the name"),
        ("v/00000.jpg", "no frame number in the name"),
    }


def test_a_damaged_image_costs_one_frame(tree, tmp_path):
    shutil.copytree(tree.root, tmp_path / "tree")
    video = next(video for video, split in tree.splits.items() if split == "train")
    path = next((tmp_path / "tree").glob(f"*/{video}/{tree.frames[video][3]:05d}.jpg"))
    path.write_bytes(path.read_bytes()[:200])
    roots = ",".join(str(tmp_path / "tree" / root.name) for root in tree.images)
    options = AffWild2Options(roots, str(tmp_path / "tree" / "annotations"))
    report = prepare("aff_wild2", options, tmp_path / "out", show_progress=False)
    assert report.unreadable_origins == [f"{video}/{path.name}"]
    rows = schema.load(tmp_path / "out", "train")["train"]
    kept = [frame for name, frame in zip(rows["video"][:], rows["frame"][:], strict=True) if name == video]
    assert kept == [frame for frame in tree.frames[video] if frame != tree.frames[video][3]]


def test_videos_without_images_and_images_without_labels(small, tmp_path):
    small(f"{HEADER}\n1\n2\n", names=(), video="empty")
    options = small()
    for name in ("other", "more", ".cache"):
        (tmp_path / "images" / name).mkdir()
    (tmp_path / "EXPR_Set" / "Training_Set" / "lost.txt").write_text(f"{HEADER}\n1\n-1\n")
    (tmp_path / "EXPR_Set" / "Training_Set" / "notes.md").touch()
    (tmp_path / "EXPR_Set" / "Training_Set" / ".v.txt").touch()
    (tmp_path / "test.txt").write_text("gone\nother\n")
    found, rejected, remarks = read_small(options, test_list=str(tmp_path / "test.txt"))
    assert {e.video for e in found} == {"v"}
    assert set(rejected) == {
        Rejected("empty", "no images of the video"),
        Rejected("lost", "no images of the video"),
        Rejected("gone", "no images of the video"),
        Rejected("other", "no images of the video"),
        Rejected("Training_Set/notes.md", "not a label file"),
    }
    assert any("train: 3 videos (2 without images), 3 images; " in text for text in remarks)
    assert any(text.endswith("; without: 3.") for text in remarks)
    assert "Image folders without a label file, not in the test list, left out: 1." in remarks


def test_tracks_of_one_recording_in_two_splits_are_warned_of(small, tmp_path):
    options = small(video="12-3_left")
    small(video="12-3")
    (tmp_path / "EXPR_Set" / "Validation_Set").mkdir()
    shutil.move(tmp_path / "EXPR_Set/Training_Set/12-3.txt", tmp_path / "EXPR_Set/Validation_Set/12-3.txt")
    found, _, remarks = read_small(options)
    assert Counter(e.split for e in found) == {"train": 3, "validation": 3}
    (warning,) = [text for text in remarks if "two splits" in text]
    assert "12-3_left in train, 12-3 in validation" in warning


def test_whole_splits_are_compared_with_the_known_counts(tree, monkeypatch):
    assert sum(aff_wild2.KNOWN_FRAMES["train"]) == 585_317
    assert sum(aff_wild2.KNOWN_FRAMES["validation"]) == 280_532
    videos = Counter(tree.splits.values())
    counts = Counter(e.expression for e in read(tree) if isinstance(e, Example) and e.split == "train")
    known = tuple(counts[label] for label in range(NUM_CLASSES))
    monkeypatch.setattr(
        aff_wild2, "KNOWN_VIDEOS", {split: videos[split] for split in ("train", "validation")}
    )
    monkeypatch.setattr(aff_wild2, "KNOWN_FRAMES", {"train": known, "validation": known})
    _, _, remarks = split_items(read(tree))
    assert "train: these are the known counts of the whole set, class by class." in remarks
    assert any(text.startswith("warning: validation has all ") for text in remarks)
    assert not any(text.startswith("warning: train") for text in remarks)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"v.txt: its first line is '', expected 'Neutral,Anger"),
        ("0\n1\n2\n", r"v.txt: its first line is '0', expected"),
        (
            "Anger,Neutral,Disgust,Fear,Happiness,Sadness,Surprise,Other\n0\n",
            r"v.txt: its first line is 'Anger,N",
        ),
        ("valence,arousal\n0.1,0.2\n", r"first line is 'valence,arousal'"),
        (f"{HEADER}\n0\n9\n", r"v.txt line 3: '9' is not a class from -1 to 7: restore"),
        (f"{HEADER}\n-2\n", r"v.txt line 2: '-2' is not a class"),
        (f"{HEADER}\n0\n\n1\n", r"v.txt line 3: '' is not a class"),
        (f"{HEADER}\n0\nhappy\n", r"v.txt line 3: 'happy' is not a class"),
        (f"{HEADER}\n1.0\n", r"v.txt line 2: '1.0' is not a class"),
        (f"{HEADER.removesuffix(',Other')}\n6\n7\n", r"v.txt line 3: '7' is not a class from -1 to 6"),
    ],
)
def test_bad_label_files_are_named_by_file_and_line(small, text, message):
    with pytest.raises(ValueError, match=message):
        read_small(small(text))


@pytest.mark.parametrize(
    "text",
    [
        f"{HEADER}\n0\n1\n2",
        f"\ufeff{HEADER}\r\n0\r\n1\r\n2\r\n\r\n",
        f"{HEADER}, \n 0\n1 \n2\n",
        f"{HEADER.lower().replace(',', ', ')}\n0\n1\n2\n",
        f"{HEADER.removesuffix(',Other')}\n0\n1\n2\n",
    ],
)
def test_spellings_of_label_files(small, text):
    found, _, _ = read_small(small(text))
    assert [e.expression for e in found] == [0, 1, 2]


def test_label_files_in_another_encoding_are_named(small, tmp_path):
    options = small()
    (tmp_path / "EXPR_Set/Training_Set/v.txt").write_bytes(HEADER.encode("utf-16"))
    with pytest.raises(ValueError, match=r"v.txt cannot be read .*restore the original"):
        read_small(options)


def test_one_video_twice_is_named(small, tmp_path):
    options = small()
    (tmp_path / "images_2" / "v").mkdir(parents=True)
    both = {**options, "images": f"{options['images']}, {tmp_path / 'images_2'}"}
    with pytest.raises(ValueError, match=r"images/v and .*images_2/v are of one video: remove one"):
        read_small(both)
    (tmp_path / "test.txt").write_text("v\n")
    with pytest.raises(ValueError, match=r"test.txt lists v, but .*v.txt labels it"):
        read_small(options, test_list=str(tmp_path / "test.txt"))
    shutil.copytree(tmp_path / "EXPR_Set/Training_Set", tmp_path / "EXPR_Set/Validation_Set")
    with pytest.raises(ValueError, match=r"Training_Set/v.txt and .*Validation_Set/v.txt label one video"):
        read_small(options)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["AU_Set/Train_Set", "VA_Set"], r"annotations holds AU_Set, VA_Set: expected Train_Set and Valid"),
        ([], "annotations holds no folder: expected Train_Set"),
        (
            ["EXPR_Set/Train_Set", "EXPR_Recognition_Challenge/Train_Set"],
            "both hold labels: give one of them",
        ),
        (["Train_Set", "Training_Set"], r"Train_Set and .*Training_Set are both for train: remove one"),
        (["Train_Set", "Validation_Set"], r"Train_Set and .*Validation_Set: no label files"),
    ],
)
def test_label_folders_that_cannot_be_read_are_named(small, tmp_path, folders, message):
    options = small()
    (tmp_path / "annotations").mkdir()
    for name in folders:
        (tmp_path / "annotations" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=message):
        read_small({**options, "annotations": str(tmp_path / "annotations")})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no video: give a line per video"),
        ("image_location,Neutral\n", "names no video"),
        ("v/00001.jpg\n", r"test.txt line 1: 'v/00001.jpg' is not the name of a video; .*image_location"),
        ("image_location,Neutral\nv/00001.jpg,\nv\n", r"test.txt line 3: 'v' is not <video>/<frame>.jpg"),
        ("image_location,Neutral\nv/first.jpg\n", r"line 2: 'v/first.jpg' is not <video>/<frame>"),
    ],
)
def test_bad_test_lists_are_named_by_line(small, tmp_path, text, message):
    options = small()
    (tmp_path / "test.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_small(options, test_list=str(tmp_path / "test.txt"))


def test_options_are_checked_and_can_be_flags(small, tmp_path):
    with pytest.raises(ValueError, match=r"give annotations, .* or test_list, or both"):
        AffWild2Options("images")
    with pytest.raises(ValueError, match="frame_step must be at least 1, got 0"):
        AffWild2Options("images", "labels", frame_step=0)
    options = small()
    for name in ("images", "annotations"):
        with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere: give the folder that holds"):
            read_small({**options, name: str(tmp_path / "nowhere")})
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere: give the path of the test list"):
        read_small(options, test_list=str(tmp_path / "nowhere"))
    with pytest.raises(
        ValueError, match=r"images/v holds no folders: give the folder that holds a folder of im"
    ):
        read_small({**options, "images": f"{options['images']}/v"})
    flags = ["--images", "a,b", "--annotations", "c"]
    (parsed,) = HfArgumentParser(AffWild2Options).parse_args_into_dataclasses(flags)
    assert parsed == AffWild2Options("a,b", "c")
