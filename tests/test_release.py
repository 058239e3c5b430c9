"""The recipe of the released model: each command once, in order, and all of it at a tiny size."""

import csv
import io
import json
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import release
import train
from modeling_fer.data.sources.fer2013 import VOTES
from modeling_fer.data.sources.synthetic import SyntheticOptions, examples
from modeling_fer.labels import FER2013_ORDER, class_id
from modeling_fer.learning.command_line import parse_arguments
from release import Release, Step, main, run_step
from tests.runs import in_this_process

SCALES = ("cpu", "gpu", "tiny", "tiny_vit")


def recipe(folder, **changed):
    given = {"scale": "tiny", "fer2013": "a.csv", "ferplus": "b.csv", "faces": "faces", "repo": "org/name"}
    return Release(out=folder / "out", **{**given, **changed})


@pytest.mark.parametrize("scale", SCALES)
def test_each_stage_has_a_configuration_that_train_reads(scale, tmp_path):
    made = recipe(tmp_path, scale=scale)
    made.write_configs()
    parsed = {stage: parse_arguments(["--config", str(made.config(stage))]) for stage in release.STAGES}
    for stage, changed in made.scaled().items():
        if stage in release.STAGES:
            assert all(getattr(parsed[stage], name) == value for name, value in changed.items())
    assert parsed["pretrain"].stage == "pretrain"
    image = parsed["image"]
    assert image.encoder == ("" if image.encoder_config else str(made.out / "pretrain/model"))
    assert made.pretrains() == (not image.encoder_config) == (scale in ("gpu", "tiny_vit"))
    assert parsed["second"].encoder == parsed["second"].teacher == str(made.out / "image/model")
    if made.pretrains():
        assert image.image_size == parsed["pretrain"].image_size
    first = [step.name for step in islice(made.steps(), 5)]  # those after it ask for what these make
    assert first[:3] == ["data: fer2013", "data: fer2013_and_votes", "data: faces"]
    assert (
        first[3:]
        == ["pretraining", "image stage"][not made.pretrains() :] + ["further rounds"][made.pretrains() :]
    )
    if not made.pretrains():
        *_, further = islice(made.steps(), 5)
        words = further.command
        assert words[words.index("--rounds") + 1] == str(made.scaled()["further_rounds"]) == "2"
        # By this later rounds know that it is the model of the round before that they start from.
        assert words[words.index("--model") + 1] == parsed["second"].encoder
        assert further.made == made.out / "second/round-2/run/metrics.json"
    assert (parsed["video"].stage, parsed["video"].encoder) == ("video", str(made.out / "final/model"))
    assert len({arguments.output_dir for arguments in parsed.values()}) == len(parsed)


def test_a_scale_that_names_something_else(tmp_path, monkeypatch):
    monkeypatch.setattr(release, "ROOT", tmp_path)
    path = tmp_path / "configs/release/tiny.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("imge: {epochs: 3}\n")
    with pytest.raises(ValueError, match=f"{path}: imge is none of accelerate, folds, further_rounds, image"):
        recipe(tmp_path).scaled()
    for wrong in ("0", "2.0", "'2'", "true"):
        path.write_text(f"accelerate: x\nfurther_rounds: {wrong}\n")
        with pytest.raises(ValueError, match=f"{path}: further_rounds, after the first, must be a whole"):
            recipe(tmp_path).scaled()


@pytest.mark.parametrize(
    ("scores", "best"),
    [((0.96, 0.94, 0.95), 1), ((0.94, 0.95, 0.96), 0), ((1, 1, 1), 0), ((0.96, 0.95, 0.94), 2)],
)
def test_the_best_round_is_chosen_by_validation(scores, best, tmp_path, monkeypatch):
    made = recipe(tmp_path)
    monkeypatch.setattr(Release, "scaled", lambda self: {"further_rounds": 2})
    runs = [made.out / run for run in made.runs()]
    for run, score in zip(runs, scores, strict=True):
        run.mkdir(parents=True)
        (run / "metrics.json").write_text(json.dumps({"nll": score, "macro_f1_present": 0.6}))
    assert made.best() == runs[best]


def counting(folder, code=0, made="count", **options):
    """A step that notes each time it is run."""
    script = (
        f"open('{folder / 'count'}', 'a').write('x'); import time; time.sleep(0.2); raise SystemExit({code})"
    )
    return Step("counting", [sys.executable, "-c", script], folder / made, **options)


def count(folder):
    return len((folder / "count").read_text())


def test_what_is_done_is_not_done_again(tmp_path):
    step, record = counting(tmp_path), tmp_path / "steps/00.json"
    for _ in range(2):
        run_step(step, record, None)
    assert count(tmp_path) == 1
    (tmp_path / "count").unlink()  # unless what it made is gone
    run_step(step, record, None)
    assert count(tmp_path) == 1


def test_what_failed_is_done_again_and_its_time_adds_up(tmp_path):
    record = tmp_path / "00.json"
    with pytest.raises(subprocess.CalledProcessError):
        run_step(counting(tmp_path, code=3), record, None)
    told = json.loads(record.read_text())
    assert not told["done"]
    record.write_text(json.dumps({**told, "seconds": 100.0}))
    run_step(counting(tmp_path), record, None)  # with another command: what failed may be mended
    assert count(tmp_path) == 2
    assert json.loads(record.read_text())["seconds"] > 100
    record.write_text(json.dumps({**told, "seconds": 100.0, "name": "another"}))  # of an older recipe
    run_step(counting(tmp_path), record, None)
    assert json.loads(record.read_text())["seconds"] < 100


def test_what_is_done_with_other_words_is_refused(tmp_path):
    config = tmp_path / "stage.yaml"
    config.write_text("epochs: 3\n")
    run_step(counting(tmp_path, config=config), tmp_path / "00.json", None)
    with pytest.raises(ValueError, match="counting was done with another command;"):
        run_step(counting(tmp_path, code=4, config=config), tmp_path / "00.json", None)
    config.write_text("epochs: 4\n")
    with pytest.raises(ValueError, match="counting was done with another config;"):
        run_step(counting(tmp_path, config=config), tmp_path / "00.json", None)
    assert count(tmp_path) == 1


def test_a_command_that_makes_nothing_is_not_done(tmp_path):
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=r"counting ended well, but .*nothing is not there"):
            run_step(counting(tmp_path, made="nothing"), tmp_path / "00.json", None)
    assert count(tmp_path) == 2


def test_what_a_killed_step_left_is_removed_where_it_starts_anew(tmp_path):
    """As where `fer calibrate` was killed between its last rename and its end."""
    left = tmp_path / "model"
    script = f"import os; os.mkdir('{left}')"
    step = Step("making", [sys.executable, "-c", script], left, anew=True)
    left.mkdir()
    (left / "old").touch()
    run_step(step, tmp_path / "00.json", None)
    assert list(left.iterdir()) == []


FLAGS = ["--fer2013", "a", "--ferplus", "b", "--faces", "c", "--scale", "tiny"]


def waiting(folder):
    return Step("waiting", [sys.executable, "-c", "import time; time.sleep(60)"], folder / "never")


def test_it_stops_in_time_and_goes_on(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    run_step(counting(tmp_path), out / "steps/00.json", None)
    monkeypatch.setattr(Release, "steps", lambda self: iter([counting(tmp_path), waiting(tmp_path)]))
    for minutes in ("0.01", "0"):
        with pytest.raises(SystemExit) as stop:
            main([*FLAGS, "--out", str(out), "--minutes", minutes])
        assert stop.value.code == 75
    assert count(tmp_path) == 1
    assert "the same command goes on" in capsys.readouterr().out
    assert not json.loads((out / "steps/01.json").read_text())["done"]


SLEEPER = """
import sys
from pathlib import Path
import release
import train
folder = Path(sys.argv[1])
script = f"import os, time; open('{folder}/pid', 'w').write(str(os.getpid())); time.sleep(60)"
step = release.Step("waiting", [sys.executable, "-c", script], folder / "never")
release.Release.steps = lambda self: iter([step])
release.main([*sys.argv[2:], "--out", str(folder / "out")])
"""


def test_what_it_started_ends_with_it_and_nobody_else_is_at_work(tmp_path):
    command = [sys.executable, "-c", SLEEPER, str(tmp_path), *FLAGS]
    first = subprocess.Popen(command, cwd=release.ROOT)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    second = subprocess.run(command, cwd=release.ROOT, capture_output=True, text=True, timeout=60)
    assert "another release.py is at work in" in second.stderr
    first.terminate()
    assert first.wait(timeout=30) == 143
    child = int((tmp_path / "pid").read_text())
    wait_for(lambda: not Path(f"/proc/{child}").exists())


def wait_for(happened, seconds=60):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["a,b", "a=b"])
def test_a_folder_whose_name_cannot_be_passed_on(name, tmp_path):
    with pytest.raises(SystemExit, match="its name must hold no comma"):
        main([*FLAGS, "--out", str(tmp_path / name)])


def write_fer2013(folder):
    """Drawn faces in the files of FER2013 and FER+, and a folder of others."""
    native = {class_id(name): name for name in FER2013_ORDER}
    counts = {"train": 200, "validation": 80, "test": 0, "unlabeled": 40}
    rows, votes = [["emotion", "pixels", "Usage"]], [["Usage", "Image name", *VOTES]]
    (folder / "faces").mkdir()
    for number, item in enumerate(examples(SyntheticOptions(image_size=48, imbalance=1, **counts))):
        grey = np.array(Image.open(io.BytesIO(item.image)).convert("L"))
        if item.split == "unlabeled":
            Image.fromarray(grey).save(folder / f"faces/{number}.png")
        elif name := native.get(item.expression):  # all but Other
            usage = {"train": "Training", "validation": "PublicTest"}[item.split]
            rows.append([FER2013_ORDER.index(name), " ".join(map(str, grey.ravel())), usage])
            votes.append([usage, "", *(8 if vote == name else 2 * (vote == "unknown") for vote in VOTES)])
    for name, table in (("fer2013.csv", rows), ("fer2013new.csv", votes)):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows(table)


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["tiny", "tiny_vit"])
def test_the_whole_recipe(scale, tmp_path):
    write_fer2013(tmp_path)
    flags = ["--fer2013", "fer2013.csv", "--ferplus", "fer2013new.csv", "--faces", "faces", "--out", "out"]
    command = [sys.executable, str(release.ROOT / "release.py"), *flags, "--scale", scale]
    stopped = subprocess.run([*command, "--minutes", "0.7"], cwd=tmp_path, timeout=300)
    assert stopped.returncode == 75  # by far too short for all of it
    subprocess.run(command, cwd=tmp_path, check=True, timeout=1500)
    out = tmp_path / "out"
    told = json.loads((out / "summary.json").read_text())
    pretrained = {"pretrain"} if scale == "tiny_vit" else set()
    rounds = {"image", "second/round-1/run"} | ({"second/round-2/run"} if scale == "tiny" else set())
    assert set(told["trainings"]) == rounds | {"video"} | pretrained
    assert len(told["seconds"]) == len(list((out / "steps").iterdir())) == 13 + len(pretrained)
    assert told["chosen"] in rounds
    if scale == "tiny":  # the last round learnt from the one before
        given = json.loads((out / "second/round-2/run/arguments.json").read_text())
        assert given["encoder"] == given["teacher"] == "out/second/round-1/run/model"
    assert yaml.safe_load((out / "final/model/README.md").read_text().split("---")[1])["library_name"]
    assert (out / "export/onnx").is_dir()
    again = subprocess.run(command, cwd=tmp_path, check=True, timeout=120, capture_output=True, text=True)
    assert "image stage" not in again.stdout  # all is there


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_the_image_stage_of_each_scale_trains(scale, prepared, tmp_path):
    """With every option that it sets, at a tiny size."""
    made = recipe(tmp_path, scale=scale)
    made.write_configs()
    small = ["--image_size=16", "--patch_size=8", "--hidden_size=16", "--num_layers=1", "--num_heads=2"]
    steps = ["--max_steps=4", "--batch_size=8", "--eval_steps=4", "--save_steps=4", "--encoder="]
    places = [f"--data={prepared}", f"--output_dir={tmp_path / 'run'}"]
    with in_this_process():
        train.train(parse_arguments(["--config", str(made.config("image")), *small, *steps, *places]))
    assert (tmp_path / "run/metrics.json").exists()
