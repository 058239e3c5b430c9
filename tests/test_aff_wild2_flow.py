"""Aff-Wild2 from the official layout to a checked submission, by the commands of the README."""

import os
import subprocess
import sys

import pytest

from modeling_fer.cli import main
from tests.aff_wild2_tree import write_tree
from tests.runs import run_here
from tests.test_train import ROOT, environment
from tests.test_train_video import TINY, arguments


@pytest.fixture(scope="module")
def flow(checkpoint, tmp_path_factory):
    """The tree, its prepared folder, and a trained and tuned model."""
    work = tmp_path_factory.mktemp("aff_wild2")
    tree = write_tree(work / "tree", videos=16, frames=80)
    images = ",".join(map(str, tree.images))
    options = ["--images", images, "--annotations", str(tree.annotations), "--test_list", str(tree.template)]
    assert main(["data", "prepare", "aff_wild2", *options, "--out", str(work / "data")]) == 0
    more = {"classes": "present", "max_steps": 8, "eval_steps": 4, "save_steps": 8}
    run_here(arguments(work / "data", checkpoint, work / "run", **more))
    argv = [f"--{k}={v}" for k, v in {**TINY, **more, "data": work / "data", "encoder": checkpoint}.items()]
    script = [sys.executable, str(ROOT / "cross_validate.py"), "--k", "2", "--out", str(work / "folds")]
    script += ["--model", str(work / "run/model"), "--tracker=none", *argv]
    done = subprocess.run(script, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return tree, work


def submission(flow, *options, template=None, out="prediction.txt"):
    tree, work = flow
    frames = [str(folder) for folder in tree.images]
    where = ["--template", str(template or tree.template), "--out", str(work / out)]
    return main(
        ["submission", "make", "--model", str(work / "run/model"), "--frames", *frames, *where, *options]
    )


def test_train_tune_evaluate_submit_and_check(flow, capsys):
    tree, work = flow
    data, model = str(work / "data"), str(work / "run/model")
    assert main(["eval", "--model", model, "--data", data, "--out", str(work / "eval")]) == 0
    assert "over videos" in capsys.readouterr().out
    assert submission(flow) == 0
    said = capsys.readouterr().out
    asked = [video for video, split in tree.splits.items() if split == "test"]
    total = sum(len(tree.labels[video]) for video in asked)
    filled = total - sum(len(tree.frames[video]) for video in asked)
    assert f"{total} frames of {len(asked)} videos; {filled} filled (nearest)" in said
    check = ["submission", "check", str(work / "prediction.txt"), "--template", str(tree.template)]
    assert main(check) == 0
    lines = (work / "prediction.txt").read_text().splitlines()
    lines[3], lines[4] = lines[4], lines[3]
    (work / "prediction.txt").write_text("\n".join(lines) + "\n")
    assert main(check) == 1
    assert "00003.jpg is out of order" in capsys.readouterr().out


def test_a_submission_is_rehearsed_on_validation(flow, tmp_path, capsys):
    """From the prepared split, and from the images: the same predictions."""
    tree, work = flow
    template, out = str(tmp_path / "template.txt"), str(tmp_path / "prediction.txt")
    split = ["--data", str(work / "data"), "--split", "validation"]
    assert main(["submission", "template", *split, "--out", template]) == 0
    model = ["--model", str(work / "run/model"), "--template", template]
    assert main(["submission", "make", *model, *split, "--out", out]) == 0
    assert main(["submission", "check", out, "--template", template]) == 0
    frames = [str(folder) for folder in tree.images]
    assert main(["submission", "make", *model, "--frames", *frames, "--out", out + "2"]) == 0
    assert (tmp_path / "prediction.txt").read_bytes() == (tmp_path / "prediction.txt2").read_bytes()
    assert main(["submission", "make", *model, "--out", out]) == 2
    assert "pass either --frames" in capsys.readouterr().err


def test_an_unknown_video_is_listed_and_filled(flow, capsys):
    tree, work = flow
    template = work / "template.txt"
    template.write_text(tree.template.read_text().rstrip("\n") + "\nnobody/00001.jpg,\n")
    assert submission(flow, template=template, out="more.txt") == 1
    assert "nobody is not among the videos given: filled" in capsys.readouterr().err
    assert (work / "more.txt").read_text().endswith("nobody/00001.jpg,0\n")
    assert main(["submission", "check", str(work / "more.txt"), "--template", str(template)]) == 0


def test_an_image_model_and_older_editions(flow, checkpoint):
    """Edition 3 wants a folder of one file a video; frames seen one by one come from the same crops."""
    tree, work = flow
    frames = [str(folder) for folder in tree.images]
    rest = ["--template", str(tree.template), "--edition", "3", "--out", str(work / "edition3")]
    code = main(["submission", "make", "--model", str(checkpoint), "--frames", *frames, *rest])
    assert code == 0
    assert main(["submission", "check", str(work / "edition3"), *rest[:4]]) == 0


def test_a_video_in_two_roots_is_an_error(flow, capsys, tmp_path):
    tree, _ = flow
    video = next(p for p in tree.images[0].iterdir() if p.is_dir())
    os.symlink(video, tmp_path / video.name)
    rest = ["--template", str(tree.template), "--out", str(tmp_path / "out.txt")]
    frames = [str(tree.images[0]), str(tmp_path)]
    code = main(["submission", "make", "--model", str(flow[1] / "run/model"), "--frames", *frames, *rest])
    assert code == 2
    assert "are of one video: leave out one of the roots" in capsys.readouterr().err
