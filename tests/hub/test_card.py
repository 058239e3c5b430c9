"""A model card tells what the run's files say, to the last digit it shows, and its snippets run."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from cards import (
    HISTORY,
    NUMBER,
    between,
    evaluate,
    expected_tables,
    number_faults,
    report,
    save_run,
    section,
    shown,
    sums,
    tables,
    write_json,
)
from conftest import picture
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_loading import WITHOUT_THE_PACKAGE, run
from transformers import pipeline

from modeling_fer import FerConfig, FerForVideoClassification
from modeling_fer.evaluation.metrics import compute_metrics
from modeling_fer.evaluation.report import weights_digest, write_report
from modeling_fer.evaluation.selective import risk_coverage
from modeling_fer.hub.card import SCORES, make_card, write_card
from modeling_fer.hub.facts import OURS, PLACES, RESEARCH, UNKNOWN, read_facts, title_of
from modeling_fer.hub.runs import FACTS
from modeling_fer.labels import CLASSES
from modeling_fer.learning.inference import load_classifier, load_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path):
    report(tmp_path / "data" / "faces")
    return tmp_path


def save_video_model(checkpoint, folder, causal):
    torch.manual_seed(1)
    image_model, processor = load_classifier(checkpoint)
    sizes = {"temporal_hidden_size": 16, "temporal_num_layers": 2, "temporal_num_heads": 2}
    post = {"smoothing": "box", "half_width": 2, "temperature": 2.0, "bias": [0.25, *[0.0] * 6, -0.5]}
    config = FerConfig(
        encoder_config=image_model.config.encoder_config,
        temporal_causal=causal,
        temporal_window=4,
        num_frames=6,
        postprocess=post,
        **sizes,
    )
    model = FerForVideoClassification(config)
    model.fer.load_state_dict(image_model.fer.state_dict())
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def video_checkpoints(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return {
        causal: save_video_model(checkpoint, folder / f"causal-{causal}", causal) for causal in (True, False)
    }


# -- numbers ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(checkpoint):
    return read_facts(checkpoint)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_tables_and_model_index_are_the_numbers_of_the_evaluation(bare, data):
    labels = st.lists(st.integers(-1, 7), min_size=8, max_size=30).filter(lambda found: max(found) >= 0)
    references = np.array(data.draw(labels))
    weights = data.draw(st.integers(0, 2**32 - 1))
    probabilities = np.random.default_rng(weights).dirichlet(np.full(8, 0.3), len(references))
    metrics = {
        "model": "m",
        "data": "data/faces",
        "split": "test",
        **compute_metrics(references, probabilities.argmax(1), probabilities, bootstrap_samples=20),
        "selective": risk_coverage(references, probabilities).summary(),
    }
    card = make_card(dataclasses.replace(bare, evaluations=[(Path("e"), metrics)]))
    found = section(card.text, "## Evaluation")
    assert tables(found) == expected_tables(metrics)
    assert f"\n{metrics['samples']} labelled images.\n" in found
    absent = [name for name in CLASSES if name not in metrics["classes_present"]]
    assert ("No images of " in found) is bool(absent)
    assert not absent or f"No images of {', '.join(absent)}, which counts 0" in found
    results = ModelCard(str(card)).data.eval_results
    assert {result.metric_name: result.metric_value for result in results} == {
        title: metrics[key] for key, (_, title) in SCORES.items()
    }


def test_every_number_in_every_table_is_in_a_file_of_the_run(project, video_checkpoints):
    counts = [
        json.loads((project / "data/faces/report.json").read_text())["counts"],
        report(project / "data/more", "fer2013", splits=("pseudo",)),
    ]
    home = save_run(
        project,
        video_checkpoints[True],
        data="data/faces,pseudo=data/more",
        stage="video",
        encoder="google/vit-base",
        learning_rate=0.000123,
        batch_size=64,
    )
    groups = {"age": {"40 to 60": compute_metrics([0, 1, 1], [0, 1, 0], bootstrap_samples=10)}}
    evaluate(home, "validation", seed=3, absent=["Fear"])
    evaluate(home, "test", per_group=groups, dropped="12 images whose pixels are also in train")
    rows = [{name: i / 7 + j / 100 for i, name in enumerate(SCORES)} for j in range(5)]
    crossed = {"folds": rows[:2], "mean": rows[2], "spread": rows[3], "pooled": rows[4]}
    write_json(home / "folds/cross_validation.json", crossed)
    sides = {"before": {"ece": 0.1234, "nll": 2.1}, "cross_fitted": {"ece": 0.0123, "nll": 1.9}}
    fitted = {"data": "faces", "split": "validation", "faces": 321, "temperature": 1.3456}
    write_json(home / "calibration.json", {**fitted, **sides})
    write_json(
        home / "environment.json",
        {
            "started": "2026-11-24T04:40:12Z",
            "threads": 3,
            "device": "Processor 7B13 of 2.5 GHz",
            "seconds": 1234.5,
            "since_step": 7,
            "energy_kwh_estimated": 1.25e-05,
            "energy_source": "estimate: 3 threads x 12 W",
            "versions": {"torch": "2.13.0+cpu", "python-dateutil": "4.0"},
        },
    )
    text = write_card(home, "org/fer").read_text()
    files = [path for path in home.rglob("*.json*") if path.name not in (FACTS, "history.jsonl")]
    (project / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HISTORY))
    files += [project / "history.jsonl", *project.glob("data/*/report.json")]
    derived = [*sums(counts), 20 * 64 / 100 + 10 * 64 / 50]
    assert number_faults(text, files, derived) == []
    shown_numbers = sum(len(NUMBER.findall(row)) for row in text.splitlines() if row.startswith("| "))
    assert shown_numbers > 250, "else little was looked at"
    accuracy = json.loads((home / "test/metrics.json").read_text())["accuracy"]
    wrong = text.replace(f"| Accuracy | {accuracy:.3f} |", f"| Accuracy | {accuracy + 0.0017:.3f} |", 1)
    assert len(number_faults(wrong, files, derived)) == 1
    assert len(number_faults(text.replace("| 1234.5,", "| 1234.6,"), files, derived)) == 1
    assert number_faults(text, files[:1]) != []


def test_evaluations_of_a_run_the_test_split_first(project, checkpoint):
    home = save_run(project, checkpoint)
    validation = evaluate(home, "validation", seed=1, absent=["Anger", "Other"])
    test = evaluate(home, "test", seed=2)
    evaluate(home, "other")
    write_json(
        home / "other/metrics.json", {"model": "runs/another/model", "weights": "0", "macro_f1": 0.999}
    )
    card = ModelCard.load(write_card(home, "org/fer"))
    parts = re.findall(r"^### (.*)\n((?:(?!^#)[\s\S])*)", section(card.text, "## Evaluation"), re.M)
    assert [title for title, _ in parts] == [
        "The test split of faces",
        "The validation split of faces",
    ]
    for (_, text), metrics in zip(parts, (test, validation), strict=True):
        assert tables(text) == expected_tables(metrics)
    chosen = "chosen on the validation split"
    assert chosen in parts[1][1]
    assert chosen not in parts[0][1]
    found = {(r.dataset_name, r.dataset_split, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert found == {
        (title_of(metrics), metrics["split"], title): metrics[key]
        for metrics in (test, validation)
        for key, (_, title) in SCORES.items()
    }
    assert card.data.model_name == "fer"
    assert {r.task_type for r in card.data.eval_results} == {"image-classification"}


def test_the_training_tables(project, checkpoint):
    home = save_run(project, checkpoint, batch_size=64, learning_rate=0.00025, seed=11, resume="auto")
    environment = {
        "processes": 2,
        "peak_memory_mib": None,
        "device": "a | b",
        "since_step": 0,
        "steps": 30,
        "seconds": 91.2,
        "energy_kwh": None,
        "energy_kwh_estimated": 0.000304,
        "energy_source": "estimate: 12 W",
        "versions": {"torch": "2.13.0"},
    }
    write_json(home / "environment.json", environment)
    found = tables(make_card(read_facts(home)).text)
    arguments = json.loads((home / "arguments.json").read_text())
    hidden = {*PLACES, "tracker"}
    assert found["argument"][1:] == [(k, str(v)) for k, v in arguments.items() if k not in hidden]
    assert found["training"][1:] == [
        ("stage", "image"),
        ("method", "supervised"),
        ("steps", "30"),
        ("step of these weights, the best on validation", "20"),
        ("macro F1 on validation at that step", "0.412"),
    ]
    seconds = 20 * 64 / 100 + 10 * 64 / 50
    steps = f"{seconds:.1f}"
    assert found["stage of training"][1:] == [
        ("image", "30", "a / b", "91.2", steps, "0.000304", "estimate: 12 W"),
    ]
    assert found["environment"][1:] == [
        ("processes", "2"),
        ("peak memory (MiB)", "not recorded"),
        ("torch", "2.13.0"),
    ]
    write_json(home / "environment.json", {**environment, "since_step": 20, "energy_kwh": 0.5})
    row = tables(make_card(read_facts(home)).text)["stage of training"][1]
    assert row[3:6] == ("91.2, since step 20", steps, "0.5 + 0.000304")
    (home / "environment.json").unlink()
    text = make_card(read_facts(home)).text
    nothing = ("not recorded",) * 2
    assert tables(text)["stage of training"][1] == ("image", "30", *nothing, steps, *nothing)
    assert "Machine and versions: not recorded" in text


def test_every_stage_of_training_is_accounted_for(project, checkpoint):
    save_run(project, checkpoint, "first", data="unlabelled=data/faces", stage="pretrain")
    shutil.rmtree(project / "runs/first/logs", ignore_errors=True)
    (project / "runs/first/history.jsonl").unlink()
    home = save_run(project, checkpoint, "second", encoder="runs/first/model")
    took = {"seconds": 7.5, "device": "cpu", "energy_kwh": 0.25, "energy_source": "a counter"}
    write_json(project / "runs/first/environment.json", took)
    rows = tables(make_card(read_facts(home)).text)["stage of training"][1:]
    assert [row[0] for row in rows] == ["image", "pretrain, of its encoder"]
    none = "not recorded"
    assert rows[1][1:] == (none, "cpu", "7.5", none, "0.25", "a counter")


def test_what_is_not_recorded_is_called_so(checkpoint):
    text = make_card(read_facts(checkpoint)).text
    for title, words in {
        "## Evaluation": "Not evaluated",
        "## Training data": "Unknown: the run that made this model left no arguments.json",
        "## Training": "Unknown.",
        "## Environment, time and energy": "Machine and versions: not recorded",
        "## Limits": "Groups of people (by age, gender, skin colour, origin): not evaluated.",
    }.items():
        assert words in section(text, title)
    assert not re.search(r"\d", section(text, "## Evaluation"))
    assert set(tables(text)) == {"id"}
    data = make_card(read_facts(checkpoint)).data
    assert data.get("eval_results") is None
    assert data.get("metrics") is None
    assert data.license == UNKNOWN


def test_intervals_of_classes_and_groups_where_the_metrics_have_them(project, checkpoint):
    home = save_run(project, checkpoint)
    metrics = evaluate(home)
    for name, row in metrics["per_class"].items():
        for key in [key for key in row if key.endswith("_interval")]:
            del row[key]
        if name == "Fear":
            row["f1_interval"] = [0.1111, 0.2222]
    group = compute_metrics([0, 1, 1], [0, 1, 0], bootstrap_samples=10)
    bare_group = compute_metrics([0, 1, 1], [0, 0, 0], bootstrap_samples=0)
    metrics["per_group"] = {"age": {"under 40": group, "40 | over": bare_group}}
    write_json(home / "test/metrics.json", metrics)
    text = make_card(read_facts(home)).text
    found = tables(section(text, "## Evaluation"))
    column = found["class"][0].index("F1")
    assert {row[0]: row[column] for row in found["class"][1:]} == {
        name: shown(row["f1"]) + (" (0.111 to 0.222)" if name == "Fear" else "")
        for name, row in metrics["per_class"].items()
    }
    assert found["age"][1:] == [
        (
            "under 40",
            "3",
            shown(group["macro_f1_present"]),
            between(group["interval"]["macro_f1_present"]),
            shown(group["accuracy"]),
            between(group["interval"]["accuracy"]),
        ),
        ("40 / over", "3", shown(bare_group["macro_f1_present"]), "-", shown(bare_group["accuracy"]), "-"),
    ]
    assert "\n- Scores by age are given below. Other groups of people: not eval" in section(text, "## Limits")


def test_cross_validation_and_post_processing(project, video_checkpoints):
    home = save_run(project, video_checkpoints[True], stage="video", encoder="runs/gone/model")
    names = ("macro_f1", "macro_f1_present", "accuracy")
    rows = [{name: i / 7 + j / 100 for i, name in enumerate(names)} for j in range(5)]
    crossed = {"folds": rows[:2], "mean": rows[2], "spread": rows[3], "pooled": rows[4]}
    write_json(home / "folds/cross_validation.json", crossed)
    text = section(make_card(read_facts(home)).text, "## Evaluation")
    assert tables(section(text, "### Cross-validation"))["score"][1:] == [
        (SCORES[name][1], *(shown(crossed[part][name]) for part in ("mean", "spread", "pooled")))
        for name in names
    ]
    assert "one of 2 parts" in text
    assert "temperature 2.000, smoothing box over 2 frames to each side" in text
    write_json(home / "again/cross_validation.json", crossed)
    with pytest.raises(ValueError, match=r"again.*folds.*keep the one that counts"):
        read_facts(home)


# -- classes ----------------------------------------------------------------------------------------


def test_what_calibration_changed_is_told(project, checkpoint):
    home = save_run(project, checkpoint)
    assert "### Calibration" not in str(make_card(read_facts(home)))
    sides = {"before": {"ece": 0.1234, "nll": 2.1}, "cross_fitted": {"ece": 0.0123, "nll": 1.9}}
    fitted = {"data": "faces", "split": "validation", "faces": 321, "temperature": 1.3456}
    write_json(home / "calibration.json", {**fitted, **sides})
    text = section(make_card(read_facts(home)).text, "### Calibration")
    assert "A temperature of 1.346, fitted on 321 faces of the validation split of faces" in text
    rows = [(SCORES[key][1], *(shown(side[key]) for side in sides.values())) for key in ("ece", "nll")]
    assert tables(text)["measure"] == [("measure", "before", "after"), *rows]
    evaluate(home, "test")
    assert "fitted on this split" not in str(make_card(read_facts(home)))
    evaluate(home, "validation")
    text = str(make_card(read_facts(home)))
    assert "fitted on this split" in section(text, "### The validation split of faces")
    assert text.count("fitted on this split") == 1


def test_the_crop_is_named_where_the_model_states_it(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((checkpoint / "config.json").read_text())
    for crop, words in (
        (None, None),
        ({"name": "box", "margin": 0.0}, "The crop is `box` without a margin, as"),
        (
            {"name": "arcface112", "margin": 0.125},
            "The crop is `arcface112` with a margin of 0.125 of its side",
        ),
    ):
        write_json(tmp_path / "model/config.json", {**config, "crop": crop})
        text = section(make_card(read_facts(tmp_path / "model")).text, "## Intended use")
        assert words in text if words else "The crop is" not in text


def test_classes_in_the_order_of_the_logits_with_their_rows(project, make_model, checkpoint):
    present = [name for name in CLASSES if name not in ("Disgust", "Other")]
    make_model(id2label=dict(enumerate(present))).save_pretrained(project / "model")
    counts = report(project / "data/more", splits=("pseudo",))["pseudo"]
    labels = json.loads((project / "data/faces/report.json").read_text())["counts"]["train"]
    home = save_run(project, project / "model", data="data/faces,pseudo=data/more,unlabelled=data/faces")
    text = make_card(read_facts(home)).text
    assert tables(section(text, "## Classes"))["id"] == [
        ("id", "class", "training"),
        *((str(i), name, str(labels[name] + counts[name])) for i, name in enumerate(present)),
    ]
    assert "these 6 of the 8 Aff-Wild2 classes and never answers Disgust, Other." in text

    whole = make_card(read_facts(checkpoint)).text
    assert tables(section(whole, "## Classes"))["id"][1:] == [(str(i), n) for i, n in enumerate(CLASSES)]
    assert "never answers" not in whole


def test_the_bias_of_each_class(video_checkpoints):
    bias = [0.25, *[0.0] * 6, -0.5]
    assert tables(make_card(read_facts(video_checkpoints[True])).text)["id"][1:] == [
        (str(i), name, shown(b)) for i, (name, b) in enumerate(zip(CLASSES, bias, strict=True))
    ]


# -- data, licence, origin --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sources", "licence", "tags", "words"),
    [
        (["synthetic"], OURS, None, "It has seen drawn faces only"),
        (["synthetic", "fer2013"], RESEARCH, ["fer2013"], "research only"),
        (["folder", "aff_wild2"], RESEARCH, ["aff-wild2"], "under an agreement"),
        (["synthetic", "folder"], UNKNOWN, None, "unknown: ask who published them"),
        (["synthetic", "pseudo-labels"], UNKNOWN, None, "labelled by a model, not by people"),
        (["synthetic", None], UNKNOWN, None, "unknown: no report.json at hand"),
    ],
)
def test_terms_of_the_data_decide_the_licence(sources, licence, tags, words, checkpoint, tmp_path):
    for i, source in enumerate(sources):
        if source:
            report(tmp_path / f"data/set{i}", source)
    data = ",".join(f"labelled=data/set{i}" for i in range(len(sources)))
    home = save_run(tmp_path, checkpoint, data=data)
    card = ModelCard(str(make_card(read_facts(home))))
    assert words in card.text
    assert ("drawn faces only" in card.text) is (sources == ["synthetic"])
    assert f"Licence of the weights: {licence}" in card.text
    wanted = ("other", RESEARCH, "README.md") if licence == RESEARCH else (licence, None, None)
    assert (card.data.license, card.data.license_name, card.data.license_link) == wanted
    assert card.data.datasets == tags
    asked = make_card(read_facts(home), licence="cc-by-nc-4.0")
    assert asked.data.license == "cc-by-nc-4.0"
    rows = tables(section(card.text, "## Training data"))["learnt by"][1:]
    assert [row[2:4] for row in rows] == [
        (f"set{i}", "train 835, validation 1635" if source else "unknown") for i, source in enumerate(sources)
    ]


def test_ferplus_votes_and_warnings_are_named(checkpoint, tmp_path):
    report(tmp_path / "data/faces", "fer2013", ferplus="fer2013new.csv", rule="majority")
    report(tmp_path / "data/own", "fer2013", ferplus="fer2013new.csv", rule="fer2013")
    text = make_card(read_facts(save_run(tmp_path, checkpoint, data="data/faces,data/own"))).text
    rows = tables(section(text, "## Training data"))["learnt by"][1:]
    assert [row[4] for row in rows] == ["FER2013 with FER+ votes", "FER2013"]
    assert "\n- faces: 3 train rows are images of validation too" in text


def test_the_encoders_before_are_told_from_their_runs(project, checkpoint):
    report(project / "data/web", "fer2013")
    save_run(project, checkpoint, "first", data="unlabelled=data/web", stage="pretrain")
    save_run(project, checkpoint, "second", data="data/faces", encoder="runs/first/model")
    home = save_run(project, checkpoint, "third", data="data/faces", encoder="runs/second/model")
    card = make_card(read_facts(home))
    rows = tables(section(card.text, "## Training data"))["learnt by"][1:]
    before = "its encoder"
    assert [row[:3] for row in rows] == [
        ("this model", "labelled", "faces"),
        (before, "labelled", "faces"),
        (before, "unlabelled", "web"),
    ]
    assert "started from random weights" in card.text
    assert card.data.license_name == RESEARCH  # of what its first encoder learnt from
    assert card.data.base_model is None


def test_a_teacher_is_told_from_its_run_or_its_own_facts(project, checkpoint):
    """What a student may be used for, its teacher's faces decide, too."""
    report(project / "data/web", "fer2013")
    first = save_run(project, checkpoint, "first", data="data/web")
    write_card(first)
    shutil.copytree(first / "model", project / "released")
    for number, teacher in enumerate(("runs/first/model", str(project / "released"), "org/elsewhere")):
        home = save_run(
            project, checkpoint, f"student {number}", data="data/faces", teacher=teacher, distillation=0.5
        )
        card = make_card(read_facts(home))
        rows = tables(section(card.text, "## Training data"))["learnt by"][1:]
        known = teacher != "org/elsewhere"
        before = (
            "its teacher",
            *(("labelled", "web") if known else ("weights", "org/elsewhere")),
        )
        assert [row[:3] for row in rows] == [("this model", "labelled", "faces"), before]
        assert (card.data.license_name == RESEARCH) == known
        assert known or card.data.license == UNKNOWN
        assert "to a share of 0.5, from the probabilities that another model gave" in card.text
        assert str(project) not in card.text


def test_a_teacher_that_it_started_from_is_told_once(project, checkpoint):
    report(project / "data/web", "fer2013")
    save_run(project, checkpoint, "first", data="data/web")
    both = dict.fromkeys(("encoder", "teacher"), "runs/first/model")
    given = {"data": "data/faces", "distillation": 0.5, **both}
    facts = read_facts(save_run(project, checkpoint, "second", **given))
    assert [(one.learner, one.name) for one in facts.data] == [
        ("this model", "faces"),
        ("its encoder", "web"),
    ]
    assert len(facts.stages) == 2
    card = make_card(facts)
    assert "from the probabilities that the model it started from gave to the same views." in card.text
    noisy = make_card(read_facts(save_run(project, checkpoint, "noisy", noise=0.25, **given)))
    assert "gave to the same views, before some of them were darkened and made noisy." in noisy.text
    assert "With `mirror=True` in `from_pretrained` it looks at" in noisy.text
    del given["teacher"], given["distillation"]
    alone = make_card(read_facts(save_run(project, checkpoint, "alone", noise=0.25, **given)))
    assert "Some of the faces that it learnt from were darkened and made noisy." in alone.text
    home = save_run(project, checkpoint, "mirrored", **given)
    config = json.loads((home / "model/config.json").read_text()) | {"mirror": True}
    write_json(home / "model/config.json", config)
    evaluate(home, "validation", mirror=True)
    told = write_card(home, "org/fer").read_text()
    assert "It looks at each face and its mirror image" in told
    assert "validation split of faces, each face with its mirror image" in told
    assert card.data.license_name == RESEARCH


@pytest.mark.parametrize("encoders", [("runs/one/model",), ("runs/two/model", "runs/one/model")])
def test_runs_that_start_from_each_other_are_told_once(encoders, project, checkpoint):
    for name, encoder in zip(("one", "two"), encoders, strict=False):
        save_run(project, checkpoint, name, encoder=encoder)
    facts = read_facts(project / "runs/one")
    assert len(facts.stages) == len(facts.data) == len(encoders)
    assert (facts.origin, facts.licence) == ("one/model", UNKNOWN)


def test_an_encoder_away_from_its_run_is_told_by_its_own_facts(project, checkpoint, tmp_path):
    report(project / "data/web", "fer2013")
    first = save_run(project, checkpoint, "first", data="data/web", encoder="google/vit-base")
    second = save_run(project, checkpoint, "second", encoder="runs/first/model")
    here = make_card(read_facts(second))
    write_card(first)
    shutil.copytree(first / "model", project / "released")
    shutil.move(project / "data/web", project / "gone")
    home = save_run(project, checkpoint, "third", encoder=str(project / "released"))
    facts = read_facts(home)
    assert (facts.base_model, facts.origin) == ("google/vit-base", "google/vit-base")
    for title in ("## Training data", "## Environment, time and energy"):
        assert section(make_card(facts).text, title) == section(here.text, title)


@pytest.mark.parametrize(
    ("encoder", "base_model", "words"),
    [
        ("google/vit-base", "google/vit-base", "[google/vit-base](https://huggingface.co/google/vit-base)"),
        ("runs/gone", None, "the folder `runs/gone`; what that learnt from is unknown"),
        ("/elsewhere/gone/model", None, "the folder `gone/model`; what that learnt from is unknown"),
        ("../up/model", None, "the folder `up/model`; what that learnt from is unknown"),
        ("here", None, "/here`; what that learnt from is unknown"),
    ],
)
def test_an_encoder_from_elsewhere(encoder, base_model, words, project, checkpoint):
    (project / "here").mkdir()
    card = ModelCard(str(make_card(read_facts(save_run(project, checkpoint, encoder=encoder)))))
    assert words in card.text
    assert card.data.base_model == base_model
    assert card.data.license == UNKNOWN


def test_a_stream_from_the_hub_is_named(project, checkpoint):
    home = save_run(project, checkpoint, method="fixmatch", stream="org/faces")
    card = ModelCard(str(make_card(read_facts(home))))
    assert "[org/faces](https://huggingface.co/datasets/org/faces)" in card.text
    assert card.data.datasets == ["org/faces"]


# -- files ------------------------------------------------------------------------------------------


def test_the_folder_can_be_published_as_it_is(project, checkpoint):
    home = save_run(project, checkpoint, data=str(project / "data/faces"), cache_dir=str(project / "scratch"))
    rng = np.random.default_rng(0)
    about = {"model": str(home / "model"), "data": str(project / "data/faces"), "split": "test"}
    write_report(home / "eval", rng.integers(0, 8, 40), rng.dirichlet(np.ones(8), 40), about=about)
    before = {path.name: path.read_bytes() for path in (home / "model").iterdir()}
    card = write_card(home, "org/fer")
    assert card == home / "model/README.md"
    text = card.read_text()
    links = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert links == ["confusion_matrix.png", "reliability.png", "risk_coverage.png", "learning_curve.png"]
    added = {"README.md", "metrics.json", "arguments.json", FACTS, *links}
    after = {path.name: path.read_bytes() for path in (home / "model").iterdir()}
    assert after.keys() - before.keys() == added
    assert {name: after[name] for name in before} == before
    for name in added - {"README.md", FACTS, "learning_curve.png", "arguments.json", "metrics.json"}:
        assert after[name] == (home / "eval" / name).read_bytes()
    told = {name: json.loads((folder / name).read_text()) for folder, name in (
        (home, "arguments.json"), (home / "eval", "metrics.json")
    )}  # fmt: skip
    assert json.loads(after["arguments.json"]) == {
        **told["arguments.json"], "data": "faces", "output_dir": "best", "cache_dir": "scratch"
    }  # fmt: skip
    assert json.loads(after["metrics.json"]) == {
        **told["metrics.json"],
        "model": ".../best/model",
        "data": "faces",
    }
    for name, content in after.items():
        assert str(project).encode() not in content, f"{name}: where it was made concerns nobody"
    assert write_card(home / "model", "org/fer").read_text() == text  # again, and by its other name


def test_a_folder_away_from_its_run_has_the_same_card(project, checkpoint, tmp_path, monkeypatch):
    report(project / "data/web", "fer2013", ferplus=str(project / "votes.csv"), rule="majority")
    save_run(project, checkpoint, "first", data="unlabelled=data/web", stage="pretrain")
    home = save_run(project, checkpoint, "second", encoder="runs/first/model", precision="no")
    evaluate(home, "test", data=str(project / "data/faces"))
    evaluate(home, "validation")
    rows = [{"macro_f1": 0.25, "macro_f1_present": 0.5, "accuracy": 0.75}] * 2
    told = {
        "folds": rows,
        "mean": rows[0],
        "spread": rows[0],
        "pooled": rows[0],
        "tuning": {"long": [1] * 99},
    }
    write_json(home / "folds/cross_validation.json", told)
    write_json(home / "environment.json", {"seconds": 4.5, "energy_kwh": 0.125})
    picture(4, 5).save(project / "smile.png")
    text = write_card(home, "org/fer", examples=[project / "smile.png"], licence="cc-by-4.0").read_text()
    stored = (home / "model" / FACTS).read_text()
    assert str(project) not in stored
    assert "tuning" not in stored

    moved = tmp_path / "elsewhere" / "fer"
    shutil.copytree(home / "model", moved)
    shutil.move(project / "runs", project / "gone")
    shutil.move(project / "data", project / "gone too")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert f"{make_card(read_facts(moved))}" == text
    assert write_card(moved).read_text() == text
    assert write_card(moved, "org/other").read_text() == text.replace("org/fer", "org/other").replace(
        "# fer\n", "# other\n"
    ).replace("name: fer\n", "name: other\n")
    (moved / "learning_curve.png").unlink()
    assert "learning_curve.png" not in str(make_card(read_facts(moved)))


def test_an_evaluation_of_other_weights_is_refused(project, checkpoint, make_model):
    home = save_run(project, checkpoint)
    evaluate(home)
    write_card(home, "org/fer")
    moved = project / "moved"
    shutil.copytree(home / "model", moved)
    make_model(seed=5).save_pretrained(home / "model")
    remedy = r"fer eval --model .* --out OUT` and name it with --eval OUT, or delete"
    for folder, asked in ((home, ()), (home, [home / "test"])):
        with pytest.raises(
            ValueError, match=rf"test/metrics\.json is of other weights than .*/model: .*{remedy}"
        ):
            write_card(folder, evaluations=asked)
    make_model(seed=6).save_pretrained(moved)
    with pytest.raises(
        ValueError, match=rf"moved/metrics\.json is of other weights than .*/moved: .*{remedy}"
    ):
        read_facts(moved)
    metrics = json.loads((home / "test/metrics.json").read_text())
    write_json(home / "test/metrics.json", {**metrics, "weights": weights_digest(home / "model")})
    assert len(read_facts(home).evaluations) == 1
    config = json.loads((home / "model/config.json").read_text())
    write_json(home / "model/config.json", {**config, "postprocess": {"smoothing": "box"}})
    with pytest.raises(ValueError, match=rf"test/metrics\.json is of other post-processing than .*{remedy}"):
        read_facts(home)
    del metrics["weights"]
    write_json(home / "test/metrics.json", metrics)
    with pytest.raises(ValueError, match=r"test/metrics\.json does not say that it is of the weights in"):
        read_facts(home)


def test_a_new_evaluation_takes_the_place_of_the_old(project, checkpoint):
    """As where weights are rounded for a release, and evaluated again."""
    home = save_run(project, checkpoint)
    rng = np.random.default_rng(0)
    about = {"model": str(home / "model"), "data": "data/faces", "split": "test"}
    scored = (rng.integers(0, 8, 40), rng.dirichlet(np.ones(8), 40))
    write_report(home / "test", *scored, about=about)
    write_card(home)
    released = project / "released"
    shutil.copytree(home / "model", released)
    tensors = {name: value.half() for name, value in load_file(released / "model.safetensors").items()}
    save_file(tensors, released / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="of other weights"):
        write_card(released)
    metrics = write_report(project / "again", *scored, about={**about, "model": str(released)})
    (project / "again/reliability.png").unlink()
    text = write_card(released, evaluations=[project / "again"]).read_text()
    assert "confusion_matrix.png" in text
    assert "reliability.png" not in text
    assert not (released / "reliability.png").exists(), "it would be of the weights before"
    assert weights_digest(released) in text
    assert tables(section(text, "## Evaluation")) == expected_tables(metrics)
    assert str(make_card(read_facts(released))) == text


def test_a_report_that_training_wrote_says_that_the_split_chose_the_step(project, checkpoint):
    """Also where its data sets are several, so that their name is no name of theirs."""
    home = save_run(project, checkpoint, data="data/faces,data/faces")
    evaluate(home, "validation", data="faces and faces", chose="the training step")
    text = section(make_card(read_facts(home)).text, "## Evaluation")
    assert "### The validation split of faces and faces\n" in text
    assert "The training step was chosen on" in text
    config = json.loads((home / "model/config.json").read_text())
    write_json(home / "model/config.json", {**config, "postprocess": {"smoothing": "box"}})
    text = make_card(read_facts(home)).text  # as `cross_validate.py --model` leaves it: nobody asked for that
    assert "Not evaluated" in section(text, "## Evaluation")
    with pytest.raises(ValueError, match="is of other post-processing"):
        read_facts(home, [home / "validation"])


def test_a_picture_that_is_not_there_is_not_shown(project, checkpoint):
    home = save_run(project, checkpoint)
    evaluate(home)
    (home / "learning_curve.png").unlink()
    assert "![" not in write_card(home).read_text()


def test_examples_for_the_widget(project, checkpoint):
    home = save_run(project, checkpoint)
    picture(4, 5).save(project / "smile.png")
    card = ModelCard.load(write_card(home, examples=[project / "smile.png"]))
    classify = pipeline("image-classification", model=str(checkpoint), top_k=8)
    expected = [{**one, "score": round(one["score"], 4)} for one in classify(picture(4, 5))]
    assert card.data.widget == [
        {"src": "example_smile.png", "example_title": "smile", "output": expected},
    ]
    assert (home / "model/example_smile.png").read_bytes() == (project / "smile.png").read_bytes()
    with pytest.raises(FileNotFoundError, match=r"no such example: gone\.png"):
        write_card(home, examples=["gone.png"])


def test_what_cannot_have_a_card(project, checkpoint):
    home = save_run(project, checkpoint)
    for match, folder, evaluations in [
        (r"nowhere holds no model .*pass a run folder", project / "nowhere", ()),
        (r"data has no metrics\.json: pass what `fer eval", home, [project / "data"]),
    ]:
        with pytest.raises(FileNotFoundError, match=match):
            write_card(folder, evaluations=evaluations)
    write_json(project / "vit/config.json", {"architectures": ["ViTModel"]})
    write_json(project / "eval/metrics.json", {"model": "runs/other/model", "split": "test", "data": "d"})
    evaluate(home)
    shutil.copytree(home / "test", home / "twice")
    for match, folder, evaluations in [
        (r"config\.json is of ViTModel; cards are for FerFor", project / "vit", ()),
        (
            r"eval/metrics\.json does not say that it is of the weights in .*fer eval",
            home,
            [project / "eval"],
        ),
        (r"test and .*twice are both of the test split of faces: name those to show", home, ()),
    ]:
        with pytest.raises(ValueError, match=match):
            write_card(folder, evaluations=evaluations)
    with pytest.raises(ValueError, match="Repo id must use"):
        write_card(home, "not a name", evaluations=[home / "test"])
    (home / "test/metrics.json").write_text('{"macro')
    with pytest.raises(ValueError, match=r"test/metrics\.json is damaged .*write it again"):
        write_card(home)
    shutil.rmtree(home / "test")
    shutil.rmtree(home / "twice")
    write_json(home / "model/metrics.json", {"accuracy": 1})
    with pytest.raises(ValueError, match=r"model/metrics\.json does not say of which data it is"):
        write_card(home)
    assert not (home / "model/README.md").exists()


# -- text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "causal", "whole"])
def test_head_and_limits(kind, checkpoint, video_checkpoints):
    folder = {"image": checkpoint, "causal": video_checkpoints[True], "whole": video_checkpoints[False]}[kind]
    card = ModelCard(str(make_card(read_facts(folder), "org/fer")))
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == ("image" if kind == "image" else "video") + "-classification"
    assert "facial-expression-recognition" in card.data.tags
    limits = section(card.text, "## Limits")
    for words in ("perceived, not what a person felt", "Posed", "spontaneous", "groups", "Art. 5(1)(f)"):
        assert words in limits
    assert "\n\n\n" not in card.text
    assert ("follows live streams" in card.text) is (kind == "causal")
    assert ("init_stream" in card.text) is (kind == "causal")


def test_the_citation_is_that_of_the_package(checkpoint):
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    text = section(make_card(read_facts(checkpoint)).text, "## Citation")
    paper = cited["references"][0]
    authors = " and ".join(f"{one['family-names']}, {one['given-names']}" for one in paper["authors"])
    for words in (paper["title"], authors, paper["identifiers"][0]["value"], paper["url"]):
        assert f"{{{words}}}" in text.replace("{arXiv preprint ", "{")
    assert f"year = {{{paper['year']}}}" in text
    assert f"title = {{{cited['title']}}}" in text
    assert f"author = {{{{{cited['authors'][0]['name']}}}}}" in text
    assert f"license = {{{cited['license']}}}" in text


# -- snippets ---------------------------------------------------------------------------------------

RUN_SNIPPETS = """
import json
import sys
import transformers
transformers.utils.logging.set_verbosity_error()
for snippet in json.loads(open(sys.argv[1]).read()):
    print("==")
    exec(compile(snippet, "snippet", "exec"), {"__name__": "__main__"})
"""


def snippets(folder):
    text = str(make_card(read_facts(folder), "org/fer"))
    found = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len(found) == 3
    assert all(code.count('"org/fer"') == 1 for code in found)
    return [code.replace('"org/fer"', repr(str(folder))) for code in found]


def said(work, prelude, codes):
    """What each snippet prints in one clean process: lines of a name and a number."""
    (work / "snippets.json").write_text(json.dumps(codes))
    printed = run(prelude + RUN_SNIPPETS, work, work / "snippets.json").split("==\n")[1:]
    return [re.findall(r"^(?:(.*?) s: )?(\w+):? ([\d.]+)$", one, re.M) for one in printed]


def test_the_snippets_run_with_the_package_and_without(checkpoint, video_checkpoints, tmp_path):
    image, causal, whole = (
        snippets(f) for f in (checkpoint, video_checkpoints[True], video_checkpoints[False])
    )
    face = picture(4, 5, size=32)
    face.save(tmp_path / "face.png")
    with av.open(str(tmp_path / "faces.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, width=32, height=32, pix_fmt="yuv420p")
        for i in range(10):
            array = np.asarray(picture(i % 8, 7, size=32))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array)))
        container.mux(stream.encode())
    with_package = said(tmp_path, "", [image[0], causal[0], whole[0]])
    alone = said(tmp_path, WITHOUT_THE_PACKAGE, [image[1], image[2], causal[1], whole[1], whole[2]])

    model, processor = load_classifier(checkpoint)
    with torch.no_grad():
        scores = model(processor(face, return_tensors="pt")["pixel_values"]).logits[0].softmax(-1).tolist()
    for found in (with_package[0], alone[0]):
        assert [name for _, name, _ in found] == list(CLASSES)
        assert [float(score) for _, _, score in found] == pytest.approx(scores, abs=2e-4)
    best = sorted(zip(scores, CLASSES, strict=True), reverse=True)[:5]  # the pipeline's own choice
    assert [name for _, name, _ in alone[1]] == [name for _, name in best]
    assert [float(score) for _, _, score in alone[1]] == pytest.approx([s for s, _ in best], abs=2e-4)

    with av.open(str(tmp_path / "faces.mp4")) as container:
        decoded = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    seconds = torch.tensor([[time for time, _ in decoded]], dtype=torch.float64)
    for causal_model, found in (
        (True, with_package[1]),
        (True, alone[2]),
        (False, with_package[2]),
        (False, alone[3]),
    ):
        model, processor = load_model(video_checkpoints[causal_model])
        with torch.no_grad():
            pixels = [processor(array, return_tensors="pt")["pixel_values"] for _, array in decoded]
            features = torch.stack([model.fer(one).pooler_output[0] for one in pixels])[None]
            logits = model(frame_features=features, frame_times=seconds).frame_logits
            rows = model.postprocess(logits, positions=seconds * model.config.frame_rate)[0]
        assert [time for time, _, _ in found] == [f"{time:.2f}" for time, _ in decoded]
        assert [name for _, name, _ in found] == [CLASSES[int(row.argmax())] for row in rows]
        assert [float(score) for _, _, score in found] == pytest.approx(
            rows.max(-1).values.tolist(), abs=2e-4
        )
    with torch.no_grad():
        logits = model(torch.cat(pixels[:6])).logits[0]
    assert alone[4][0][1] == CLASSES[int(logits.argmax())]
    assert float(alone[4][0][2]) == pytest.approx(float(logits.softmax(-1).max()), abs=2e-4)
