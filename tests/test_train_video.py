"""Stage video and cross-validation through their scripts: features, resumes, processes, bad input."""

import io
import json
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import picture
from safetensors.torch import load_file, save_file

import cross_validate
import train
from modeling_fer import CLASSES, FerForVideoClassification
from modeling_fer.cli import main
from modeling_fer.data import schema
from modeling_fer.data.augment import Normalize
from modeling_fer.data.shards import Shards
from modeling_fer.learning import features
from modeling_fer.learning.command_line import parse_arguments
from modeling_fer.learning.features import frame_features
from modeling_fer.learning.inference import load_model
from modeling_fer.learning.timelines import predict_split, tracks_of, video_logits
from modeling_fer.learning.video import build_model, split_fold
from tests.runs import run_here
from tests.test_train import ROOT, TWO_PROCESSES, command, environment, history
from tests.test_train_semi import assert_same_run

TINY = {
    "stage": "video",
    "temporal_hidden_size": 16,
    "temporal_layers": 1,
    "temporal_heads": 2,
    "temporal_window": 4,
    "num_frames": 8,
    "batch_size": 8,
    "learning_rate": 1e-2,
    "erasing": 0,
    "dropout": 0,
}


def png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Six training videos and two others, of expressions that follow one another; some frames lack."""
    out = tmp_path_factory.mktemp("videos") / "colours"
    out.mkdir()
    with Shards(out / "data") as shards:
        for number in range(8):
            split = "train" if number < 6 else "validation"
            rng = np.random.default_rng(number)
            for frame in np.sort(rng.permutation(64)[:56]).tolist():
                expression = (frame // 8 + number) % 8
                image = png(picture(expression, 100 * number + frame, size=16))
                label = -1 if frame % 11 == 3 else expression
                video = f"v{number // 2}_{('left', 'right')[number % 2]}" if number < 4 else f"w{number}"
                shards.add(schema.Example(split, image, "", "colours", label, video=video, frame=frame + 1))
    return out


def arguments(videos, checkpoint, out, **options):
    return command(videos, out, **{**TINY, "encoder": checkpoint, "image_size": 0, **options})[2:]


@pytest.fixture(scope="module")
def finished(videos, checkpoint, tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "video"
    run_here(arguments(videos, checkpoint, out))
    return out


def test_a_run_leaves_a_model_of_videos_whose_encoder_is_that_of_the_image_model(finished, checkpoint):
    model, processor = load_model(finished / "model")
    assert isinstance(model, FerForVideoClassification)
    ours, theirs = (
        load_file(finished / "model/model.safetensors"),
        load_file(checkpoint / "model.safetensors"),
    )
    encoder = [name for name in theirs if name.startswith("fer.")]
    assert encoder
    assert all(torch.equal(ours[name], theirs[name]) for name in encoder)
    assert tuple(processor.image_mean) == (0.5, 0.4, 0.6)
    assert [row["step"] for row in history(finished) if "validation/macro_f1" in row] == [4, 8, 12]


def test_killed_and_resumed_is_uninterrupted(finished, videos, checkpoint, tmp_path):
    argv = arguments(videos, checkpoint, tmp_path / "killed", resume="auto")
    for step in (5, 11):
        run_here(argv, killed_before=step)
    run_here(argv)
    assert_same_run(finished, tmp_path / "killed")


def test_two_processes_learn_what_one_learns(videos, checkpoint, tmp_path):
    """Frames of a batch are not shared out evenly: the loss is a mean over all of them nonetheless."""
    data = tmp_path / "data"  # with features of their own
    options = {"augmentation": "none", "temporal_dropout": 0, "precision": "no", "max_steps": 6}
    run_here(arguments(videos, checkpoint, tmp_path / "one", **options))
    shutil.copytree(videos, data, ignore=shutil.ignore_patterns("cache"))
    argv = [*TWO_PROCESSES, str(ROOT / "train.py"), *arguments(data, checkpoint, tmp_path / "two", **options)]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "two/checkpoints/step_00000006/own_1.pt").exists(), "one process only"
    for a, b in zip(*(history(tmp_path / name) for name in ("one", "two")), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"accuracy"}:  # that is a mean of the processes' own
            assert a[key] == pytest.approx(b[key], abs=2e-5), key
    a, b = (load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two"))
    for key in a:
        # Attention does not depend on the keys' bias: its gradient is rounding, which Adam blows up.
        tolerance = 1e-2 if key.endswith("query_key_value.bias") else 1e-5
        assert torch.allclose(a[key], b[key], rtol=0, atol=tolerance), key


def test_it_learns(videos, checkpoint, tmp_path):
    """Frames told apart by their colour, by features of random weights."""
    run_here(
        arguments(
            videos, checkpoint, tmp_path / "run", max_steps=120, eval_steps=60, save_steps=60, log_steps=30
        )
    )
    scores = [row["validation/macro_f1"] for row in history(tmp_path / "run") if "validation/macro_f1" in row]
    assert max(scores) > 0.5


def test_features_are_kept_by_model_and_data(videos, checkpoint, tmp_path):
    data, cache = tmp_path / "data", tmp_path / "data/cache"
    shutil.copytree(videos, data, ignore=shutil.ignore_patterns("cache"))
    model, processor = load_model(checkpoint)
    video = FerForVideoClassification(model.config)
    video.fer.load_state_dict(model.fer.state_dict())
    video.eval()
    rows = schema.load(data)["train"]
    found = predict_split(video, processor, rows, "here", cache)
    (folder,) = cache.glob("features-*")
    (shard,) = folder.iterdir()
    before = shard.stat().st_mtime_ns
    assert np.array_equal(predict_split(video, processor, rows, "here", cache), found)
    assert shard.stat().st_mtime_ns == before, "computed once"
    with torch.no_grad():
        next(video.fer.parameters()).add_(0.1)
    predict_split(video, processor, rows, "here", cache)
    assert len(list(cache.glob("features-*"))) == 2, "other weights, other features"
    predict_split(video, processor, rows.select(range(20)), "here", cache)
    assert len(list(cache.glob("features-*"))) == 3, "other data, other features"
    predict_split(video, processor, schema.load(data, "train")["train"], "here", cache)
    assert len(list(cache.glob("features-*"))) == 3, "the same data, however loaded"


def test_features_are_shared_out_and_go_on_shard_by_shard(videos, checkpoint, tmp_path, monkeypatch):
    """Shards of 50 rows; one that is lost is made again, the others are left alone."""
    model, processor = load_model(checkpoint)
    rows = schema.load(videos)["validation"]
    normalize = Normalize(processor.image_mean, processor.image_std)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    make = partial(frame_features, model.fer, rows, normalize, 16, accelerator=Accelerator())
    whole = make(cache_dir=tmp_path / "whole")[np.arange(len(rows))]
    monkeypatch.setattr(features, "SHARD", 50)
    found = make(cache_dir=tmp_path)
    assert len(found.parts) == 3
    order = np.random.default_rng(0).permutation(len(rows))
    assert np.array_equal(found[order], whole[order])
    assert np.array_equal(found[20:110], whole[20:110])
    shards = sorted(next(tmp_path.glob("features-*")).iterdir())
    before = [shard.stat().st_mtime_ns for shard in shards]
    shards[1].unlink()
    assert np.array_equal(make(cache_dir=tmp_path)[order], whole[order])
    after = [shard.stat().st_mtime_ns for shard in shards]
    assert (after[0], after[2]) == (before[0], before[2])


def test_another_image_model_under_the_same_path_is_noticed(videos, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    shutil.copytree(checkpoint, tmp_path / "model")
    argv = arguments(videos, tmp_path / "model", tmp_path / "run", resume="auto")
    run_here(argv, killed_before=5)
    weights = load_file(tmp_path / "model/model.safetensors")
    save_file(
        {k: v * 1.01 for k, v in weights.items()}, tmp_path / "model/model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="or the features of its frames, have changed since"):
        train.train(parse_arguments(argv))


def test_cross_validation_scores_unseen_videos_and_stores_post_processing(
    finished, videos, checkpoint, tmp_path, capsys
):
    model, out = tmp_path / "model", tmp_path / "folds"
    shutil.copytree(finished / "model", model)
    argv = arguments(videos, checkpoint, tmp_path / "unused", max_steps=20)
    argv = [a for i, a in enumerate(argv) if "--output_dir" not in argv[max(0, i - 1) : i + 1]]
    script = [
        sys.executable,
        str(ROOT / "cross_validate.py"),
        "--k",
        "3",
        "--out",
        str(out),
        "--model",
        str(model),
    ]
    for launcher in (TWO_PROCESSES, (sys.executable,)):  # the second time everything is there
        done = subprocess.run(
            [*launcher, *script[1:], *argv],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((out / "cross_validation.json").read_text())
    assert len(result["folds"]) == 3
    assert result["tuning"]["groups"] == 4, "left and right of a recording are one"
    stored = json.loads((model / "config.json").read_text())["postprocess"]
    assert stored == {k: v for k, v in result["postprocess"].items() if k != "causal"}
    assert load_model(model)[0].postprocess.to_dict() == result["postprocess"]
    # The part that a fold's run left out is what it was judged by.
    trained = [json.loads((out / f"fold-{i}/arguments.json").read_text())["fold"] for i in range(3)]
    assert trained == [0, 1, 2]
    assert main(["eval", "--model", str(model), "--data", str(videos), "--out", str(tmp_path / "eval")]) == 0
    assert "over videos" in capsys.readouterr().out
    assert (tmp_path / "eval/timeline_1.png").exists()


def test_folds_and_tuning_keep_what_one_person_is_in_together(videos):
    """Of the four recordings, v0 and w4 show one person, whom the data set calls so; another has none."""
    rows = schema.load(videos)["train"]
    people = {"v0_left": "p", "w4": "p", "v1_left": "q"}
    named = rows.remove_columns("subject").add_column("subject", [people.get(v) for v in rows["video"][:]])
    found = tracks_of(named, "here")
    assert {track.group for track in found} == {"v0", "v1", "w5"}
    assert {track.group for track in tracks_of(rows, "here")} == {"v0", "v1", "w4", "w5"}
    parts = [split_fold(found, 3, fold, seed=0)[1] for fold in range(3)]
    assert sorted(len(part) for part in parts) == [1, 2, 3]
    logits = [np.zeros((len(track.rows), 8), np.float32) for track in found]
    assert [v.group for v in video_logits(logits, found, CLASSES)] == [track.group for track in found]
    # The same name in another data set is another person.
    sources = ["other" if video == "w4" else "colours" for video in rows["video"][:]]
    apart = named.remove_columns("source").add_column("source", sources)
    assert {track.group for track in tracks_of(apart, "here")} == {"v0", "v1", "w4", "w5"}


def test_models_of_folds_never_go_to_the_hub(videos, checkpoint, tmp_path, monkeypatch):
    taught = []
    monkeypatch.setattr(train, "train", taught.append)
    argv = [*arguments(videos, checkpoint, tmp_path / "run"), "--hub_model_id", "org/name"]
    for flags in (["--push_to_hub"], ["--push_to_hub", "true"]):
        cross_validate.train_fold([*argv, *flags], 3, 1, tmp_path / "fold-1")
    assert [given.push_to_hub for given in taught] == [False, False]
    assert parse_arguments([*argv, "--push_to_hub"]).push_to_hub


def copy_of(model, folder, **config):
    """A copy of a model's folder with other settings."""
    shutil.copytree(model, folder)
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, **config}))
    return load_model(folder)[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_frames": 9}, "has num_frames 9, the models of the folds have 8"),
        ({"frame_rate": 25.0}, r"has frame_rate 25\.0, the models of the folds have 30\.0"),
        ({"temporal_window": 5}, "has temporal_window 5, the models of the folds have 4"),
        ({"temporal_causal": True}, "has temporal_causal True, the models of the folds have False"),
        ({"temporal_dropout": 0.3}, "has temporal_dropout"),
        ({"id2label": dict(enumerate(CLASSES[::-1]))}, "has classes"),
    ],
)
def test_post_processing_is_for_models_of_one_configuration(config, message, finished, tmp_path):
    ours, _ = load_model(finished / "model")
    theirs = copy_of(finished / "model", tmp_path / "model", **config)
    cross_validate.check_fits(ours, tmp_path, ours)
    with pytest.raises(ValueError, match=f"{message}.*: pass the model that the same configuration made"):
        cross_validate.check_fits(theirs, tmp_path, ours)


def test_post_processing_is_for_models_on_one_encoder(finished, tmp_path):
    """With LoRA, which every model learns for itself, what it adapts may differ, and nothing else."""
    ours, theirs = (load_model(finished / "model")[0] for _ in range(2))
    with torch.no_grad():
        theirs.fer.encoder.layers[1].attention.q_proj.weight += 0.1
    cross_validate.check_fits(theirs, tmp_path, ours, adapted=True)
    with pytest.raises(ValueError, match=f"--model {tmp_path} has another encoder than the models of the"):
        cross_validate.check_fits(theirs, tmp_path, ours)
    with torch.no_grad():
        theirs.fer.encoder.embeddings.position_embeddings += 0.1
    with pytest.raises(ValueError, match="has another encoder than the models of the folds"):
        cross_validate.check_fits(theirs, tmp_path, ours, adapted=True)


def test_adapters_of_the_last_blocks_learn_with_the_head(finished, videos, checkpoint, tmp_path):
    """Starting from a trained head; the first block and all that is not adapted stay as they were."""
    out = tmp_path / "joint"
    options = {"lora_rank": 2, "lora_layers": 1, "max_steps": 4, "encoder": finished / "model"}
    run_here(arguments(videos, checkpoint, out, **options))
    before, after = (load_file(run / "model/model.safetensors") for run in (finished, out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    encoder = {name for name in changed if name.startswith("fer.encoder")}
    assert encoder
    assert all(".1.attention." in name for name in encoder)
    assert any(name.startswith("temporal.") for name in changed)
    assert (out / "model/adapter/adapter_config.json").exists()
    assert not [name for name in after if "lora" in name]
    model, processor = load_model(out / "model")
    assert isinstance(model, FerForVideoClassification)
    (last,) = [row for row in history(out) if row["step"] == 4 and "validation/macro_f1" in row]
    probabilities = predict_split(
        model, processor, schema.load(videos)["validation"], "here", tmp_path / "cache"
    )
    labels = np.array(schema.load(videos)["validation"]["expression"][:])
    accuracy = (probabilities.argmax(1) == labels)[labels >= 0].mean()
    assert accuracy == pytest.approx(last["validation/accuracy"])


def test_a_trained_head_goes_on_only_as_it_is(finished, videos, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    argv = arguments(videos, finished / "model", tmp_path / "run", temporal_window=5)
    with pytest.raises(ValueError, match="is a video model with other temporal_window"):
        train.train(parse_arguments(argv))


def test_a_model_of_videos_keeps_the_crop_of_its_image_model(finished, videos, checkpoint, make_model):
    def crop(start, **options):
        argv = arguments(videos, checkpoint, "unused", **options)
        return build_model(parse_arguments(argv), start, list(CLASSES)).config.crop

    box = {"name": "box", "points": None, "margin": 0.0}
    assert load_model(finished / "model")[0].config.crop == box, "of an image model that says nothing"
    upright = make_model(crop={"name": "arcface112", "margin": 0.1})
    assert crop(upright) == upright.config.crop
    assert crop(upright, crop="arcface112", crop_margin=0.1) == upright.config.crop
    with pytest.raises(ValueError, match=r"cut out as arcface112, margin 0\.1: leave out --crop"):
        crop(upright, crop="arcface112")
    assert crop(make_model(), crop="box", crop_margin=0.2) == {**box, "margin": 0.2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--k", "1"], "there must be 2 parts or more"),
        (["--model", "IMAGE"], "is no video model"),
        (["--model", "VIDEO", "--causal", "true"], "pass the model that the same configuration made"),
    ],
)
def test_what_cannot_be_cross_validated_is_told(
    options, message, finished, videos, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    known = {"IMAGE": str(checkpoint), "VIDEO": str(finished / "model")}
    argv = arguments(videos, checkpoint, tmp_path / "unused", max_steps=2)
    place = argv.index("--output_dir")
    argv = [*argv[:place], *argv[place + 2 :], "--out", str(tmp_path / "folds"), "--k", "2"]
    with pytest.raises(SystemExit, match=message):
        cross_validate.main([*argv, *(known.get(word, word) for word in options)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": ""}, "--stage video needs the image model"),
        ({"encoder": "nowhere"}, "no model folder nowhere"),
        ({"method": "fixmatch"}, "are for stage image: leave them out"),
        ({"lora_rank": 2, "lora_targets": "none"}, "LoRA targets must be one of"),
        ({"folds": 1}, "2 folds or more, counted from 0"),
        ({"folds": 2, "encoder": "VIDEO"}, "is a video model that has seen the part to judge by"),
        ({"folds": 3, "fold": 3}, "2 folds or more, counted from 0"),
        ({"folds": 9}, "must lie between 2 and that of groups, 4"),
        ({"temporal_heads": 3}, "must divide by twice temporal_num_heads 3"),
    ],
)
def test_what_cannot_be_trained_is_told(
    options, message, finished, videos, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    if options.get("encoder") == "VIDEO":
        options = {**options, "encoder": finished / "model"}
    with pytest.raises((ValueError, OSError), match=message):
        train.train(parse_arguments(arguments(videos, checkpoint, tmp_path / "run", **options)))


def test_stills_are_no_videos(prepared, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match="has rows without video and frame number: they are stills"):
        train.train(parse_arguments(arguments(prepared, checkpoint, tmp_path / "run")))
