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
from conftest import picture
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loading import WITHOUT_THE_PACKAGE, run
from transformers import pipeline

from modeling_fer import FerConfig, FerForVideoClassification
from modeling_fer.data.report import Report
from modeling_fer.evaluation.metrics import compute_metrics
from modeling_fer.evaluation.report import write_report
from modeling_fer.hub.card import OURS, RESEARCH, SCORES, UNKNOWN, make_card, read_facts, title_of, write_card
from modeling_fer.labels import CLASSES
from modeling_fer.learning.arguments import FerTrainingArguments
from modeling_fer.learning.inference import load_classifier, load_model

ROOT = Path(__file__).parents[2]
HISTORY = [
    {"step": 20, "epoch": 0, "loss": 1.5, "images_per_second": 100.0},
    {"step": 20, "validation/macro_f1": 0.4125, "validation/accuracy": 0.5},
    {"step": 30, "epoch": 1, "loss": 1.0, "images_per_second": 50.0},
    {"step": 30, "validation/macro_f1": 0.3975, "validation/accuracy": 0.6},
]


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def report(folder, source="synthetic", splits=("train", "validation"), **options):
    """Write what `fer data prepare` reports, with other counts for every class and split."""
    counts = {
        split: {**{name: 100 * j + i for i, name in enumerate(CLASSES)}, "no label": 7}
        for j, split in enumerate(splits, start=1)
    }
    repeats = {a: {b: 3 if (a, b) == ("train", "validation") else 0 for b in splits} for a in splits}
    folder.mkdir(parents=True)
    Report(source, options, counts, repeats, {}, {}, {}, {}, {}, {}, 0, [], []).save(folder / "report.json")
    return counts


def save_run(project, model, name="best", data="data/faces", **arguments):
    """Lay a model folder into a run folder as `train.py` leaves it."""
    home = project / "runs" / name
    shutil.copytree(model, home / "model")
    FerTrainingArguments(data=data, output_dir=f"runs/{name}", **arguments).save(home / "arguments.json")
    (home / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HISTORY) + '{"step": 4')
    (home / "learning_curve.png").write_bytes(b"curve")
    return home


def evaluate(home, split="test", data="data/faces", seed=0, absent=(), **more):
    """Write an evaluation of a run's model as `fer eval` does, without its pictures."""
    rng = np.random.default_rng(seed)
    kept = [i for i, name in enumerate(CLASSES) if name not in absent]
    references = rng.choice(kept, 50)
    probabilities = rng.dirichlet(np.ones(8), 50)
    scores = compute_metrics(references, probabilities.argmax(1), probabilities, bootstrap_samples=50)
    scores["bootstrap"]["unit"] = "images"
    about = {"model": f"runs/{home.name}/model", "data": data, "split": split}
    write_json(home / split / "metrics.json", {**about, **scores, **more})
    return json.loads((home / split / "metrics.json").read_text())


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


def section(text, title):
    """Text below a heading, up to the next one of its level."""
    level = title.split(" ")[0]
    found = re.search(rf"^{re.escape(title)}\n(.*?)(?=^{level} |\Z)", text, re.M | re.S)
    assert found, f"no section {title}"
    return found[1]


def tables(text):
    """Tables in Markdown, by the name of their first column: header and rows, each a tuple of cells."""
    found = {}
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        lines = [tuple(cell.strip() for cell in line[1:-1].split("|")) for line in block.splitlines()]
        assert set(lines[1]) == {"---"}
        assert {len(line) for line in lines} == {len(lines[0])}, block
        assert lines[0][0] not in found
        found[lines[0][0]] = lines[:1] + lines[2:]
    return found


def shown(value):
    return f"{value:.3f}"


def between(bounds):
    return f"{bounds[0]:.3f} to {bounds[1]:.3f}"


def expected_tables(metrics):
    """The tables of an evaluation, straight from its JSON."""
    overall = ["macro_f1", "macro_f1_present", "accuracy", "balanced_accuracy"]
    return {
        "score": [
            ("score", "value", "95 % interval"),
            *((SCORES[key][1], shown(metrics[key]), between(metrics["interval"][key])) for key in overall),
        ],
        "class": [
            ("class", "precision", "recall", "F1", "labelled"),
            *(
                (name, shown(row["precision"]), shown(row["recall"]), shown(row["f1"]), str(row["support"]))
                for name, row in metrics["per_class"].items()
            ),
        ],
        "calibration": [
            ("calibration", "value"),
            *((SCORES[key][1], shown(metrics[key])) for key in ("ece", "nll")),
        ],
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


def test_evaluations_of_a_run_the_test_split_first(project, checkpoint):
    home = save_run(project, checkpoint)
    validation = evaluate(home, "validation", seed=1, absent=["Anger", "Other"])
    test = evaluate(home, "test", seed=2)
    evaluate(home, "other")
    write_json(home / "other/metrics.json", {"model": "runs/another/model", "macro_f1": 0.999})
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
    environment = {"versions": {"torch": "2.13.0"}, "device": "cpu", "processes": 2, "seconds": 91.25}
    write_json(home / "environment.json", environment)
    found = tables(make_card(read_facts(home)).text)
    arguments = json.loads((home / "arguments.json").read_text())
    hidden = {"data", "output_dir", "cache_dir", "encoder", "stream", "resume", "tracker"}
    assert found["argument"][1:] == [(k, str(v)) for k, v in arguments.items() if k not in hidden]
    assert found["training"][1:] == [
        ("stage", "image"),
        ("method", "supervised"),
        ("steps", "30"),
        ("step of these weights, the best on validation", "20"),
        ("macro F1 on validation at that step", "0.412"),
    ]
    seconds = 20 * 64 / 100 + 10 * 64 / 50
    assert found["environment"][1:] == [
        ("device", "cpu"),
        ("processes", "2"),
        ("seconds", "91.2"),
        ("torch", "2.13.0"),
        ("seconds of training steps, by the speeds of history.jsonl", f"{seconds:.1f}"),
    ]


def test_what_is_not_recorded_is_called_so(checkpoint):
    text = make_card(read_facts(checkpoint)).text
    for title, words in {
        "## Evaluation": "Not evaluated",
        "## Training data": "Unknown: the run that made this model left no arguments.json",
        "## Training": "Unknown.",
        "## Environment and time": "Machine, versions and energy: not recorded",
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
    metrics["per_class"]["Fear"]["f1_interval"] = [0.1111, 0.2222]
    group = compute_metrics([0, 1, 1], [0, 1, 0], bootstrap_samples=10)
    bare_group = compute_metrics([0, 1, 1], [0, 0, 0], bootstrap_samples=0)
    metrics["per_group"] = {"age": {"under 40": group, "40 | over": bare_group}}
    write_json(home / "test/metrics.json", metrics)
    text = make_card(read_facts(home)).text
    found = tables(section(text, "## Evaluation"))
    column = found["class"][0].index("95 % interval of F1")
    assert {row[0]: row[column] for row in found["class"][1:]} == {
        name: "0.111 to 0.222" if name == "Fear" else "-" for name in CLASSES
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
    assert "Scores by group of people are given below" in section(text, "## Limits")


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
    before = "its encoder, before"
    assert [row[:3] for row in rows] == [
        ("this model", "labelled", "faces"),
        (before, "labelled", "faces"),
        (before, "unlabelled", "web"),
    ]
    assert "started from random weights" in card.text
    assert card.data.license_name == RESEARCH  # of what its first encoder learnt from
    assert card.data.base_model is None


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
    home = save_run(project, checkpoint)
    rng = np.random.default_rng(0)
    about = {"model": str(home / "model"), "data": "data/faces", "split": "test"}
    write_report(home / "eval", rng.integers(0, 8, 40), rng.dirichlet(np.ones(8), 40), about=about)
    before = {path.name: path.read_bytes() for path in (home / "model").iterdir()}
    card = write_card(home, "org/fer")
    assert card == home / "model/README.md"
    text = card.read_text()
    links = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert links == ["confusion_matrix.png", "reliability.png", "learning_curve.png"]
    added = {"README.md", "metrics.json", "arguments.json", *links}
    after = {path.name: path.read_bytes() for path in (home / "model").iterdir()}
    assert after.keys() - before.keys() == added
    assert {name: after[name] for name in before} == before
    for name in added - {"README.md", "learning_curve.png", "arguments.json"}:
        assert after[name] == (home / "eval" / name).read_bytes()
    assert str(project) not in text  # where it was made concerns nobody
    assert write_card(home / "model", "org/fer").read_text() == text  # again, and by its other name

    moved = project / "moved"
    shutil.copytree(home / "model", moved)
    again = write_card(moved, "org/fer").read_text()
    assert section(again, "## Evaluation") == section(text, "## Evaluation")
    assert tables(again)["argument"] == tables(text)["argument"]


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
        (r"eval/metrics\.json is of runs/other/model, not of .*fer eval --model", home, [project / "eval"]),
        (r"test and .*twice are both of the test split of faces: name those to show", home, ()),
    ]:
        with pytest.raises(ValueError, match=match):
            write_card(folder, evaluations=evaluations)
    with pytest.raises(ValueError, match="Repo id must use"):
        write_card(home, "not a name", evaluations=[home / "test"])
    (home / "test/metrics.json").write_text('{"macro')
    with pytest.raises(ValueError, match=r"test/metrics\.json is damaged .*write it again"):
        write_card(home)
    write_json(home / "model/metrics.json", {"accuracy": 1})
    shutil.rmtree(home / "test")
    shutil.rmtree(home / "twice")
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
