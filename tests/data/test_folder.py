import dataclasses
import io
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import HfArgumentParser

from modeling_fer.data.pixels import ENDINGS
from modeling_fer.data.schema import Example, Rejected
from modeling_fer.data.sources.folder import FolderOptions, examples
from modeling_fer.labels import CLASSES


def picture(shade, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("L", (4, 4), shade % 256).save(buffer, format=kind)
    return buffer.getvalue()


def put(root, *names):
    for shade, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(shade))


def read(root, **options):
    return list(examples(FolderOptions(str(root), **options)))


def where(items):
    return {
        item.origin: (item.split, CLASSES[item.expression] if item.expression >= 0 else None)
        for item in items
    }


def test_a_folder_per_split_and_class(tmp_path):
    put(
        tmp_path, "train/happy/a.png", "train/Anger/b.jpg", "val/sad/c.JPEG", "test/neutral/deep/d.webp",
        "unlabeled/any/depth/e.bmp", "train/happy/.hidden.png", ".cache/x/f.png",
    )  # fmt: skip
    items = read(tmp_path)
    assert where(items) == {
        "train/happy/a.png": ("train", "Happiness"),
        "train/Anger/b.jpg": ("train", "Anger"),
        "val/sad/c.JPEG": ("validation", "Sadness"),
        "test/neutral/deep/d.webp": ("test", "Neutral"),
        "unlabeled/any/depth/e.bmp": ("unlabeled", None),
    }
    assert items == read(tmp_path)  # the same again, in the same order
    for item in items:
        assert item.image == (tmp_path / item.origin).read_bytes()
        assert item.source == tmp_path.name


def test_every_ending_is_taken_and_other_files_are_counted(tmp_path):
    put(tmp_path, *(f"train/happy/{n}{ending.upper()}" for n, ending in enumerate(ENDINGS)))
    put(tmp_path, "train/sad/a.gif", "train/sad/deep/notes.txt", "train/sad/none", "unlabeled/b.gif")
    put(tmp_path, "train/sad/.DS_Store", "train/sad/metadata.csv", "train/sad/.hidden/c.gif")
    items = read(tmp_path)
    assert {"tif", "tiff", "jpeg"} < {ending.removeprefix(".") for ending in ENDINGS}
    assert sum(isinstance(item, Example) for item in items) == len(ENDINGS)
    assert [item for item in items if isinstance(item, Rejected)] == [
        Rejected(name, "not an image file")
        for name in ("train/sad/a.gif", "train/sad/deep/notes.txt", "train/sad/none", "unlabeled/b.gif")
    ]
    assert sum(isinstance(item, Example) for item in read(tmp_path, unlabeled=True)) == len(ENDINGS)


def test_folders_of_other_files_need_no_class_name(tmp_path):
    put(tmp_path, "happy/a.png", "notes/a.txt")
    assert read(tmp_path)[1:] == [Rejected("notes/a.txt", "not an image file")]


def test_metadata_may_list_files_of_any_name(tmp_path):
    put(tmp_path, "a", "b.gif")
    (tmp_path / "metadata.csv").write_text("file_name,expression,split\na,happy,train\nb.gif,sad,train\n")
    assert where(read(tmp_path)) == {"a": ("train", "Happiness"), "b.gif": ("train", "Sadness")}


def test_metadata_with_every_column(tmp_path):
    put(tmp_path, "1.png", "sub/2.png", "3.png", "4.png", "5.png")
    (tmp_path / "metadata.csv").write_text(
        "\ufefffile_name,expression,subject,split,video,frame\n"  # as spreadsheets save it
        "1.png,fear,p1,training,clip,7\nsub/2.png,surprised,p2,valid,,\n3.png,,p3,train,,\n4.png,,,test,,\n"
        "5.png,anger,,unlabelled,,\nlost.png,sad,,train,,\n"
    )
    first, second, *rest = read(tmp_path, name="mine")
    assert dataclasses.asdict(first) == {
        "split": "train", "image": picture(0), "origin": "1.png", "source": "mine", "expression": 3,
        "soft_label": None, "subject": "p1", "video": "clip", "frame": 7,
    }  # fmt: skip
    assert (second.split, second.expression, second.subject) == ("validation", 6, "p2")
    assert (second.video, second.frame) == (None, None)
    assert (rest[0].split, rest[0].expression) == ("unlabeled", -1)
    assert rest[1] == Rejected("4.png", "no label in test")
    assert (rest[2].split, rest[2].expression) == ("unlabeled", -1)
    assert rest[3] == Rejected("lost.png", "missing file")


def test_metadata_in_split_folders(tmp_path):
    put(tmp_path, "train/a.png", "validation/images/b.png", "unlabeled/c.png")
    (tmp_path / "train/metadata.csv").write_text("file_name,expression\na.png,disgusted\n")
    (tmp_path / "validation/metadata.csv").write_text("file_name,expression\nimages/b.png,joy\n")
    (tmp_path / "unlabeled/metadata.csv").write_text("file_name,subject\nc.png,p9\n")
    items = read(tmp_path)
    assert where(items) == {
        "train/a.png": ("train", "Disgust"),
        "validation/images/b.png": ("validation", "Happiness"),
        "unlabeled/c.png": ("unlabeled", None),
    }
    assert {item.subject for item in items} == {None, "p9"}


def test_everything_unlabelled(tmp_path):
    put(tmp_path, "a.png", "train/happy/b.png", "who/knows/how/deep/c.png")
    assert set(where(read(tmp_path, unlabeled=True)).values()) == {("unlabeled", None)}
    assert len(read(tmp_path, unlabeled=True)) == 3
    (tmp_path / "metadata.csv").write_text("file_name,subject,expression\na.png,p1,no such\n")
    (item,) = read(tmp_path, unlabeled=True)  # its subjects are known, its labels are not looked at
    assert (item.split, item.expression, item.subject) == ("unlabeled", -1, "p1")


def test_a_folder_without_splits_is_split_by_class_and_new_files_move_no_other(tmp_path):
    names = [f"{name}/{i:03}.png" for name in ("happy", "fear") for i in range(400)]
    put(tmp_path, *names)
    before = where(read(tmp_path, validation_fraction=0.2, test_fraction=0.1))
    shares = Counter(before.values())
    for name in ("Happiness", "Fear"):
        assert shares["validation", name] == pytest.approx(80, abs=24)  # three standard deviations
        assert shares["test", name] == pytest.approx(40, abs=18)
        assert sum(n for (_, which), n in shares.items() if which == name) == 400
    put(tmp_path, *(f"happy/new{i}.png" for i in range(50)))
    after = where(read(tmp_path, validation_fraction=0.2, test_fraction=0.1))
    assert {name: after[name] for name in before} == before
    assert where(read(tmp_path, validation_fraction=0.2, test_fraction=0.1, seed=1)) != after
    assert {split for split, _ in where(read(tmp_path, validation_fraction=0, test_fraction=0)).values()} == {
        "train"
    }


@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["happy", "sad"])), min_size=1), st.integers(0, 99)
)
def test_no_subject_is_in_two_splits(tmp_path_factory, people, seed):
    root = tmp_path_factory.mktemp("faces")
    put(root, "face.png")
    lines = [f"face.png,{label},p{subject}" for subject, label in people]
    (root / "metadata.csv").write_text("\n".join(["file_name,expression,subject", *lines]))
    splits = {}
    for item in read(root, validation_fraction=0.3, test_fraction=0.3, seed=seed):
        assert splits.setdefault(item.subject, item.split) == item.split


def test_contempt_is_left_out_or_other(tmp_path):
    put(tmp_path, "train/Contempt/a.png")
    assert read(tmp_path) == [Rejected("train/Contempt/a.png", "contempt (no class of ours)")]
    assert where(read(tmp_path, contempt="other")) == {"train/Contempt/a.png": ("train", "Other")}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["train/happy/a.png", "train/bored/b.png"],
            r"train/bored: unknown expression 'bored'; known spellings: .*sad",
        ),
        (
            ["train/happy/a.png", "extra/b.png"],
            r"extra: not a split, beside the splits train; splits are train, training",
        ),
        (
            ["happy/a.png", "b.png"],
            r"b.png: an image outside a class folder: .*metadata.csv, or .*--unlabeled",
        ),
        (["train/a.png"], r"train/a.png: an image outside a class folder"),
    ],
)
def test_layouts_that_cannot_be_read_are_named(tmp_path, files, message):
    put(tmp_path, *files)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "file_name,expression\na.png,happy\na.png,bored\n",
            r"metadata.csv row 2: unknown expression 'bored'; known .*",
        ),
        (
            "file_name,expression,split\na.png,happy,holdout\n",
            r"row 1: unknown split 'holdout', known: train",
        ),
        ("file_name,expression,frame\na.png,happy,3rd\n", r"row 1: frame '3rd' is not a whole number"),
        ("file_name,expression\n,happy\n", r"row 1: no file_name"),
        (
            "file,expression\na.png,happy\n",
            r"lacks the column file_name, it has file, expression: name it in",
        ),
        ("file_name,subject\na.png,p1\n", r"lacks the column expression, .* --unlabeled"),
        ("", r"metadata.csv lacks the column file_name, it has none"),
    ],
)
def test_bad_metadata_is_named_by_file_and_row(tmp_path, text, message):
    put(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_metadata_in_another_encoding_is_named(tmp_path):
    (tmp_path / "metadata.csv").write_bytes("file_name,expression\nä.png,happy\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"metadata.csv cannot be read .*UTF-8"):
        read(tmp_path)


def test_options_are_checked_and_can_be_flags(tmp_path):
    with pytest.raises(ValueError, match=r"must leave a rest for train, got 0.5 and 0.5"):
        FolderOptions("x", validation_fraction=0.5, test_fraction=0.5)
    with pytest.raises(ValueError, match="must not be negative"):
        FolderOptions("x", test_fraction=-0.1)
    with pytest.raises(ValueError, match="contempt must be one of drop, other"):
        FolderOptions("x", contempt="keep")
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        read(tmp_path / "nowhere")
    (parsed,) = HfArgumentParser(FolderOptions).parse_args_into_dataclasses(["--root", "x", "--unlabeled"])
    assert parsed == FolderOptions("x", unlabeled=True)
