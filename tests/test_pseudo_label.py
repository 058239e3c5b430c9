"""Offline pseudo-labelling through its front door: sources, kills, processes, joining, rounds."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from safetensors.torch import load_file, save_file

import pseudo_label
from modeling_fer.data import schema
from modeling_fer.data.images import content_hash
from modeling_fer.data.pseudo import Job, _born
from modeling_fer.data.pseudo_set import followed
from modeling_fer.learning.inference import load_classifier
from tests.conftest import picture

ROOT = Path(__file__).parents[1]
TWO_PROCESSES = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
COUNT, BAD = 90, 4


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Leave signals as they are, and the threads of the tests' own process too."""
    monkeypatch.setattr(pseudo_label.signal, "signal", lambda *_: None)
    monkeypatch.setattr(pseudo_label, "cpu_cores", lambda: 1)


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Return a tree of images with some that cannot be read among them."""
    root = tmp_path_factory.mktemp("faces") / "tree"
    for i in range(COUNT):
        path = root / str(i % 3) / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i % 8, i).save(path)
    whole = (root / "0/000.png").read_bytes()
    for name, content in {
        "0/005-cut.png": whole[:90],
        "1/x.jpg": b"",
        "2/a.png": b"text",
        "2/b.webp": b"RIFF",
    }.items():
        (root / name).write_bytes(content)
    return root


def command(*args, launcher=(sys.executable,), **options):
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [*launcher, str(ROOT / "pseudo_label.py"), *args, *flags]


def environment():
    return {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}


def label(**options):
    pseudo_label.main(command("label", **{"precision": "no", "batch_size": 8, **options})[2:])


def rows(out):
    """Return all rows by unit and number, with what is exact and what is a number apart."""
    job = Job(out)
    found = {}
    for unit in range(len(job.units)):
        for row in job.read_labels(unit).to_pylist():
            key = unit, row.pop("row")
            assert key not in found, "no row is there twice"
            found[key] = row
    return found


def assert_same(a, b, atol=0.0):
    assert a.keys() == b.keys()
    for key, row in a.items():
        for name, value in row.items():
            if isinstance(value, (float, list)):
                assert np.allclose(value, b[key][name], rtol=0, atol=atol), (key, name)
            else:
                assert value == b[key][name], (key, name)


@pytest.fixture(scope="module")
def finished(faces, checkpoint, tmp_path_factory):
    """Return an uninterrupted job of one process."""
    out = tmp_path_factory.mktemp("finished") / "out"
    options = {
        "model": checkpoint,
        "images": faces,
        "out": out,
        "unit_rows": 2,
        "precision": "no",
        "batch_size": 8,
    }
    subprocess.run(command("label", **options), env=environment(), check=True, timeout=300)
    return out


def test_labels_are_the_models_mean_over_both_views(finished, faces, checkpoint):
    model, processor = load_classifier(checkpoint)
    found = rows(finished)
    assert len(found) == COUNT
    for row in list(found.values())[::9]:
        data = (faces / row["file"]).read_bytes()
        assert row["content_hash"] == content_hash(data)
        image = schema.Image().decode_example({"bytes": data, "path": None}).convert("RGB")
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            p = torch.stack([model(pixel_values=x).logits.softmax(-1)[0] for x in (pixels, pixels.flip(-1))])
        assert np.allclose(row["probabilities"], p.mean(0), atol=1e-5)
        assert row["raw_label"] == p.mean(0).argmax()
        assert row["agreement"] == pytest.approx(1 - (p[0] - p[1]).abs().sum().item() / 2, abs=1e-5)


def test_views_differ_even_if_the_model_looks_at_mirror_images(finished, faces, checkpoint, tmp_path):
    model, both = tmp_path / "model", tmp_path / "both"
    shutil.copytree(checkpoint, model)
    config = json.loads((model / "config.json").read_text()) | {"mirror": True}
    (model / "config.json").write_text(json.dumps(config))
    options = {
        "model": model,
        "images": faces,
        "out": both,
        "unit_rows": 2,
        "precision": "no",
        "batch_size": 8,
    }
    pseudo_label.main(command("label", **options)[2:])
    ours, theirs = rows(both), rows(finished)
    assert ours.keys() == theirs.keys()
    assert all(ours[name]["agreement"] == pytest.approx(theirs[name]["agreement"], abs=1e-5) for name in ours)
    assert min(row["agreement"] for row in ours.values()) < 1


def test_unreadable_images_cost_a_line_each(finished):
    lines = [json.loads(line) for line in (finished / "skipped.jsonl").read_text().splitlines()]
    assert sorted(line["file"] for line in lines) == ["0/005-cut.png", "1/x.jpg", "2/a.png", "2/b.webp"]
    assert all(line["reason"] for line in lines)


def kill_and_resume(finished, faces, checkpoint, out, kills, seed):
    options = {
        "model": checkpoint,
        "images": faces,
        "out": out,
        "unit_rows": 2,
        "precision": "no",
        "batch_size": 8,
    }
    units = len(Job(finished).units)
    for step in sorted(random.Random(seed).sample(range(units * 3 // 4), kills)):
        process = subprocess.Popen(
            command("label", **options),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if len([*out.glob("labels/*.parquet")]) > step or (out / f"claims/unit-{step:06d}").exists():
                break
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it must have been killed in the middle"
        assert Job(out).unfinished()
    subprocess.run(command("label", **options), env=environment(), check=True, timeout=300)
    assert_same(rows(finished), rows(out))
    assert (out / "skipped.jsonl").read_bytes() == (finished / "skipped.jsonl").read_bytes()
    assert not [*(out / "partial").iterdir(), *(out / "claims").iterdir()]


def test_killed_at_random_it_ends_with_the_same_rows(finished, faces, checkpoint, tmp_path):
    kill_and_resume(finished, faces, checkpoint, tmp_path / "out", kills=3, seed=0)


@pytest.mark.slow
def test_killed_ten_times_it_ends_with_the_same_rows(finished, faces, checkpoint, tmp_path):
    kill_and_resume(finished, faces, checkpoint, tmp_path / "out", kills=10, seed=1)


WORKER = """if True:
    import os, pathlib, sys
    sys.path.insert(0, {root!r})
    import pseudo_label
    from modeling_fer.data.pseudo import Job
    writer = Job.writer
    def noted(job, unit):
        pathlib.Path({folder!r}, os.environ["RANK"] + "-" + str(unit)).touch()
        return writer(job, unit)
    Job.writer = noted
    pseudo_label.main()
"""


def test_two_processes_agree_with_one(finished, faces, checkpoint, tmp_path):
    (tmp_path / "noted").mkdir()
    (tmp_path / "worker.py").write_text(WORKER.format(root=str(ROOT), folder=str(tmp_path / "noted")))
    options = {
        "model": checkpoint,
        "images": faces,
        "out": tmp_path / "out",
        "unit_rows": 2,
        "precision": "no",
    }
    words = command("label", launcher=(), batch_size=8, **options)[1:]
    done = subprocess.run(
        [*TWO_PROCESSES, str(tmp_path / "worker.py"), *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    noted = [path.name.split("-") for path in (tmp_path / "noted").iterdir()]
    assert {rank for rank, _ in noted} == {"0", "1"}, "both had units in hand"
    assert {int(unit) for _, unit in noted} == {*range(len(Job(finished).units))}
    assert_same(rows(finished), rows(tmp_path / "out"), atol=1e-6)
    assert (tmp_path / "out/skipped.jsonl").read_bytes() == (finished / "skipped.jsonl").read_bytes()


def test_units_in_other_hands_are_told_by_the_exit_code(finished, faces, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    Job(out).labels_path(3).unlink()
    with Job(out).claimed(3, 60) as mine:
        assert mine
        with pytest.raises(SystemExit) as ended:
            label(model=checkpoint, images=faces, out=out, unit_rows=2)
    assert ended.value.code == os.EX_TEMPFAIL == 75
    assert "1 of 47 units are in other workers' hands" in capsys.readouterr().out


def test_who_joins_takes_the_jobs_revision_of_the_hub(finished, checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    told = json.loads((out / "job/job.json").read_text())
    told["source"]["revision"] = "known"
    (out / "job/job.json").write_text(json.dumps(told))

    def seen(*given):
        raise ValueError(f"asked for {given[-1]}")

    monkeypatch.setattr(pseudo_label, "find_source", seen)
    with pytest.raises(SystemExit, match="asked for known"):
        label(model=checkpoint, images="hub:a/b", out=out)


def test_a_rerun_does_nothing_and_a_lost_unit_is_made_again(finished, faces, checkpoint, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    Job(out).labels_path(3).unlink()
    before = {path: path.stat().st_mtime_ns for path in out.glob("labels/*.parquet")}
    label(model=checkpoint, images=faces, out=out, unit_rows=2)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_same(rows(finished), rows(out), atol=1e-6)


def test_precision_is_that_of_the_job(faces, checkpoint, tmp_path):
    some = tmp_path / "some"
    shutil.copytree(faces / "0", some)
    options = {"model": checkpoint, "images": some, "out": tmp_path / "out", "unit_rows": 20}
    label(**options, precision="bf16")
    Job(tmp_path / "out").labels_path(0).unlink()
    with pytest.raises(SystemExit, match="precision: bf16 -> no"):
        label(**options, precision="no")
    label(**options, precision="auto")
    assert not Job(tmp_path / "out").unfinished()


def test_another_model_or_source_is_refused(finished, faces, checkpoint, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(checkpoint, other)
    weights = load_file(other / "model.safetensors")
    weights["classifier.bias"] = weights["classifier.bias"] + 1e-3
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    for options, message in (
        ({"model": other}, "model_revision: [0-9a-f]{32} -> [0-9a-f]{32}"),
        ({"images": faces / "0"}, "root: "),
        ({"unit_rows": 3}, "unit_rows: 2 -> 3"),
        ({"images": tmp_path / "none"}, "no such file or folder"),
        ({"model": tmp_path / "none"}, "no model folder"),
        ({"unit_rows": 0}, "--unit_rows must be at least 1"),
    ):
        with pytest.raises(SystemExit, match=f"^pseudo_label.py: .*{message}"):
            label(**{"model": checkpoint, "images": faces, "out": finished, "unit_rows": 2, **options})
    shutil.copytree(checkpoint, tmp_path / "moved")
    label(model=tmp_path / "moved", images=faces, out=finished, unit_rows=2)


def test_every_kind_of_source_gives_the_same_labels(finished, faces, checkpoint, tmp_path):
    paths = sorted(path for path in faces.rglob("*") if path.is_file())
    data = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    (tmp_path / "tars").mkdir()
    for number, half in enumerate((paths[:50], paths[50:])):
        with tarfile.open(tmp_path / f"tars/{number}.tar", "w") as tar:
            for path in half:
                info = tarfile.TarInfo(path.name)
                info.size = path.stat().st_size
                tar.addfile(info, io.BytesIO(path.read_bytes()))
    table = Dataset.from_dict({"image": data})
    (tmp_path / "parquets").mkdir()
    table.to_parquet(tmp_path / "parquets/all.parquet", batch_size=16)
    examples = [
        {
            "image": cell,
            "expression": -1,
            "soft_label": None,
            "source": "x",
            "subject": None,
            "video": None,
            "frame": 0,
        }
        for cell in data
    ]
    (tmp_path / "prepared/data").mkdir(parents=True)
    Dataset.from_list(examples).to_parquet(tmp_path / "prepared/data/unlabeled-00000-of-00001.parquet")

    def by_content(out):
        return {row["content_hash"]: (row["raw_label"], row["probabilities"]) for row in rows(out).values()}

    expected = by_content(finished)
    for kind in ("tars", "parquets", "prepared", "hub"):
        images = f"hub:{tmp_path / 'parquets'}" if kind == "hub" else tmp_path / kind
        split = "train" if kind == "hub" else "unlabeled"
        label(model=checkpoint, images=images, split=split, out=tmp_path / "out" / kind, unit_rows=16)
        found = by_content(tmp_path / "out" / kind)
        assert found.keys() == expected.keys()
        for key, (raw, p) in found.items():
            assert raw == expected[key][0]
            assert np.allclose(p, expected[key][1], atol=1e-5)
        skipped = (tmp_path / "out" / kind / "skipped.jsonl").read_text().splitlines()
        assert len(skipped) == BAD
        assert "005-cut.png" in "".join(skipped)


def test_selected_faces_train_like_any_others(finished, prepared, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    pseudo_label.main(
        ["select", "--out", str(out), "--rule", "quota", "--quota", "5", "--against", str(prepared)]
    )
    assert "90 images labelled" in capsys.readouterr().out
    data = schema.load(out)["pseudo"]
    labels = np.array(data["expression"][:])
    assert 0 < np.bincount(labels).max() <= 5
    assert (np.array(data["soft_label"][:]).argmax(1) == labels).all()
    with pytest.raises(SystemExit, match="--rule must be one of threshold, quota"):
        pseudo_label.main(["select", "--out", str(out), "--rule", "best"])


def test_rounds_label_select_and_train_in_turn(faces, checkpoint, prepared, tmp_path, monkeypatch):
    out, seen = tmp_path / "rounds", []

    def run(command):
        script, args = Path(command[1]).name, command[2:]
        pairs = args[1:] if script == "pseudo_label.py" else args
        given = dict(zip(pairs[::2], pairs[1::2], strict=True))
        seen.append((script, args[0], given))
        if script == "pseudo_label.py":
            pseudo_label.main(args)
        else:  # what train.py would leave: another model
            model = Path(given["--output_dir"]) / "model"
            if model.exists():
                return
            shutil.copytree(checkpoint, model)
            weights = load_file(model / "model.safetensors")
            save_file(
                {k: v * (1 + len(seen) / 50) for k, v in weights.items()},
                model / "model.safetensors",
                {"format": "pt"},
            )

    monkeypatch.setattr(pseudo_label, "run_command", run)
    config = tmp_path / "x.yaml"
    config.write_text("max_steps: 10\n")
    options = {
        "model": checkpoint,
        "images": faces,
        "out": out,
        "unit_rows": 40,
        "precision": "no",
        "rounds": 2,
    }
    more = {"labelled": prepared, "config": config, "rule": "quota", "quota": 4}
    more["train_args"] = "--encoder 'a folder' --max_steps 5"
    pseudo_label.main(command("rounds", **options, **more)[2:])
    assert [(script, first) for script, first, _ in seen] == [
        ("pseudo_label.py", "label"),
        ("pseudo_label.py", "select"),
        ("train.py", "--config"),
    ] * 2
    assert seen[0][2]["--model"] == str(checkpoint)
    assert seen[1][2]["--against"] == str(prepared)
    assert seen[2][2]["--data"] == f"labelled={prepared},pseudo={out}/round-1"
    assert seen[2][2]["--resume"] == "auto"
    assert (seen[2][2]["--encoder"], seen[2][2]["--max_steps"]) == ("a folder", "5")
    assert seen[2][2]["--cache_dir"] == f"{out}/round-1/cache"
    assert seen[3][2]["--model"] == f"{out}/round-1/run/model"
    revisions = {
        load_dataset("parquet", data_files=f"{out}/round-{i}/data/*.parquet", split="train")[
            "model_revision"
        ][0]
        for i in (1, 2)
    }
    assert len(revisions) == 2

    # Again: nothing is chosen anew, as the decoded pixels are found by the age of the files.
    before = {path: path.stat().st_mtime_ns for path in out.glob("round-*/data/*.parquet")}
    seen.clear()
    pseudo_label.main(command("rounds", **options, **more, threads=1)[2:])
    assert [first for _, first, _ in seen] == ["label", "--config"] * 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for changed, message in (
        ({"quota": 3}, "quota: 4 -> 3"),
        ({"tau": 0.5}, "tau: 1.0 -> 0.5"),
        ({"train_args": "--max_steps 6"}, "train_args: "),
        ({"labelled": tmp_path}, "labelled: "),
    ):
        with pytest.raises(SystemExit, match=rf"round-1 was made with other options \(.*{message}"):
            pseudo_label.main(command("rounds", **{**options, **more, **changed})[2:])
    config.write_text("max_steps: 20\ncache_dir: elsewhere\n")
    with pytest.raises(
        SystemExit, match=r"config\.cache_dir: None -> elsewhere; config\.max_steps: 10 -> 20"
    ):
        pseudo_label.main(command("rounds", **options, **more)[2:])
    assert len(seen) == 4, "and nothing was run"
    shutil.rmtree(out / "round-1/data")
    config.write_text("max_steps: 10\n")
    pseudo_label.main(command("rounds", **{**options, **more, "rounds": 1})[2:])
    assert seen[5][1] == "select"


def test_later_rounds_learn_from_the_model_of_the_round_before(
    faces, checkpoint, prepared, tmp_path, monkeypatch
):
    out, trained = tmp_path / "rounds", []

    def run(command):
        if Path(command[1]).name == "pseudo_label.py":
            pseudo_label.main(command[2:])
        else:
            trained.append([word for word in command if word.startswith(("--encoder", "--teacher"))])
            folder = Path(command[command.index("--output_dir") + 1])
            shutil.copytree(checkpoint, folder / "model", dirs_exist_ok=True)

    monkeypatch.setattr(pseudo_label, "run_command", run)
    config = tmp_path / "x.yaml"
    config.write_text(f"encoder: {checkpoint}\nteacher: another\n")
    options = {"model": checkpoint, "images": faces, "out": out, "labelled": prepared, "config": config}
    options |= {"rule": "quota", "quota": 4, "precision": "no"}
    pseudo_label.main(command("rounds", **options)[2:])
    assert trained == [[], [f"--encoder={out}/round-1/run/model"], [f"--encoder={out}/round-2/run/model"]]
    told = json.loads((out / "round-2/options.json").read_text())["config"]
    assert told == {"encoder": f"{out}/round-1/run/model", "teacher": "another"}
    config.write_text(f"encoder: {checkpoint}\nteacher: {checkpoint}\n")
    with pytest.raises(
        SystemExit, match=r"round-1 was made with other options \(config\.teacher: another -> "
    ):
        pseudo_label.main(command("rounds", **options)[2:])


@pytest.mark.parametrize(
    ("given", "named", "follows"),
    [
        ("runs/a/model", "runs/a/model", True),
        ("runs/a/model/", "./runs/a/model", True),
        (f"{Path.cwd()}/runs/a/model", "runs/a/model", True),
        ("hub:org/fer", "org/fer", True),
        ("org/fer", "org/other", False),
        ("runs/a/model", "", False),
    ],
)
def test_a_model_is_followed_however_it_is_written(given, named, follows):
    config = {"encoder": named, "teacher": "another", "epochs": 3}
    assert followed(config, given, "newest") == ({"encoder": "newest"} if follows else {})
    assert followed(config, given, given) == {}, "in the first round"


LAUNCHER = """if True:
    import pathlib, subprocess, sys
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    pathlib.Path(sys.argv[1]).write_text(str(child.pid))
    child.wait()
"""


def test_what_a_round_runs_ends_with_it(tmp_path, monkeypatch):
    noted = tmp_path / "pid"

    class Told(subprocess.Popen):
        """Is told to end while it waits for the first time, as by a signal."""

        told = False

        def wait(self, timeout=None):
            if not self.told:
                self.told = True
                while not (noted.exists() and noted.read_text()):
                    time.sleep(0.01)
                sys.exit(143)
            return super().wait(timeout)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", Told)
        with pytest.raises(SystemExit):
            pseudo_label.run_command([sys.executable, "-c", LAUNCHER, str(noted)])
    deadline = time.monotonic() + 20
    while _born(int(noted.read_text())) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _born(int(noted.read_text())), "not the launcher alone"
    with pytest.raises(subprocess.CalledProcessError, match="status 3"):
        pseudo_label.run_command([sys.executable, "-c", "raise SystemExit(3)"])
