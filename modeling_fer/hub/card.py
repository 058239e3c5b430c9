"""Model cards: what a model is, what it learnt from and how it scores, told from the files of its run.

Nothing is told that no file says: what is missing is called unknown, or not evaluated. The facts are read in
`facts.py`; the words and tables are in `card_template.md`.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from transformers import pipeline

from modeling_fer.evaluation.metrics import write_whole
from modeling_fer.hub.facts import EXAMPLE, RESEARCH, Facts, conditions_of, public, read_facts, title_of
from modeling_fer.hub.runs import run_of
from modeling_fer.labels import CLASSES

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,  # a name that is mistyped is an error, not a gap
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["number"] = lambda value: f"{value:.3f}"
TEMPLATES.filters["cell"] = lambda value: str(value).replace("|", "/").replace("\n", " ")
# Of a run folder, and of its main evaluation: what goes beside the card.
KEPT = ("arguments.json", "calibration.json", "environment.json", "learning_curve.png")
KEPT_OF_EVALUATION = ("metrics.json", "confusion_matrix.png", "reliability.png", "risk_coverage.png")
PRIVATE = (
    "data", "output_dir", "cache_dir", "encoder", "encoder_config", "teacher", "stream", "resume", "tracker",
)  # fmt: skip # paths and habits

# Key in metrics.json -> the Hub's name of the metric, and ours.
SCORES = {
    "macro_f1": ("f1", "Macro F1, all classes"),
    "macro_f1_present": ("f1", "Macro F1, classes present"),
    "accuracy": ("accuracy", "Accuracy"),
    "balanced_accuracy": ("balanced_accuracy", "Balanced accuracy"),
    "ece": ("ece", "Expected calibration error"),
    "nll": ("nll", "Negative log-likelihood (nats)"),
}
TAGS = {"fer2013": "fer2013", "aff_wild2": "aff-wild2"}  # what the Hub calls a source


def metadata(facts: Facts) -> ModelCardData:
    """The card's head, which the Hub reads."""
    results = [
        EvalResult(
            task_type=facts.task,
            dataset_type=Path(metrics["data"]).name,
            dataset_name=title_of(metrics),
            dataset_config=", ".join(conditions_of(metrics)) or None,
            dataset_split=metrics["split"],
            metric_type=kind,
            metric_name=title,
            metric_value=metrics[key],
        )
        for _, metrics in facts.evaluations
        for key, (kind, title) in SCORES.items()
        if key in metrics
    ]
    tags = [TAGS.get(one.source, one.hub_id) for one in facts.data]
    own_terms: dict[str, Any] = {}
    if facts.licence == RESEARCH:  # not a licence that the Hub knows
        own_terms = {"license_name": RESEARCH, "license_link": "README.md"}
    return ModelCardData(
        license="other" if own_terms else facts.licence,
        **own_terms,
        library_name="transformers",
        pipeline_tag=facts.task,
        tags=["facial-expression-recognition", "affective-computing"],
        datasets=list(dict.fromkeys(filter(None, tags))) or None,
        base_model=facts.base_model,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        eval_results=results or None,
        model_name=facts.name if results else None,
        widget=facts.widget or None,
    )


def make_card(facts: Facts, repo_id: str | None = None, licence: str | None = None) -> ModelCard:
    """The card of a model; the same facts always make the same card.

    Args:
        facts: what `read_facts` found.
        repo_id: where the model is, or will be, on the Hub; the snippets load it from there. None: as in the
            facts.
        licence: of the weights, as the Hub calls it. None: as in the facts, or what the terms of the training
            data leave.
    """
    facts = addressed(facts, repo_id, licence)
    text = TEMPLATES.get_template("card_template.md").render(
        facts=facts,
        source=facts.repo_id or "path/of/this/folder",
        scores=SCORES,
        title_of=title_of,
        companions={path.name for path in companions(facts)},
        private=PRIVATE,
        all_classes=CLASSES,
    )
    text = re.sub(r"\n{3,}", "\n\n", text)  # what the template left out
    return ModelCard(f"---\n{metadata(facts).to_yaml()}\n---\n\n{text}\n")


def addressed(facts: Facts, repo_id: str | None, licence: str | None) -> Facts:
    """The facts with the model's place on the Hub and its licence, where these are given."""
    if repo_id:
        validate_repo_id(repo_id)
        facts = dataclasses.replace(facts, repo_id=repo_id, name=repo_id.split("/")[-1])
    return dataclasses.replace(facts, licence_given=licence or facts.licence_given)


def companions(facts: Facts) -> list[Path]:
    """Files that belong beside the card: of the run, and of the main evaluation."""
    found = [(run_of(facts.model) or facts.model) / name for name in KEPT]
    found += [facts.evaluations[0][0] / name for name in KEPT_OF_EVALUATION] if facts.evaluations else []
    return [path for path in found if path.is_file()]


def show_example(path: Path, facts: Facts) -> dict[str, Any]:
    """What the Hub's widget shows of a file, put beside the model: all classes, the likeliest first."""
    classify: Any = pipeline(facts.task, model=str(facts.model), top_k=len(facts.classes))  # type: ignore
    found = [{"label": one["label"], "score": round(one["score"], 4)} for one in classify(str(path))]
    name = path.name.removeprefix(EXAMPLE)  # it may lie there already
    return {"src": f"{EXAMPLE}{name}", "example_title": Path(name).stem, "output": found}


def write_card(
    folder: str | Path,
    repo_id: str | None = None,
    evaluations: Sequence[str | Path] = (),
    examples: Sequence[str | Path] = (),
    licence: str | None = None,
) -> Path:
    """Write README.md into a model's folder, in place of an older one, and beside it what it shows.

    That is: `card_facts.json`, the run's arguments, environment, metrics, pictures, the like, and examples,
    so that the folder can be published as it is and has the same card anywhere, by `make_card(read_facts())`.
    Of paths in them only the ends are kept (`public`). Pictures of an earlier evaluation go; nothing else in
    it is changed.

    Args:
        folder, evaluations: as in `read_facts`.
        repo_id, licence: as in `make_card`.
        examples: images of one face, or videos for a model of videos; the model is run on them. None: those
            that the folder came with.

    Raises:
        FileNotFoundError, ValueError: as `read_facts`; also an example that is not there.
    """
    facts = read_facts(folder, evaluations)
    name = facts.repo_id.split("/")[-1] if facts.repo_id else (run_of(facts.model) or facts.model).name
    facts = addressed(dataclasses.replace(facts, name=name), repo_id, licence)
    shown = [Path(path) for path in examples] or [facts.model / one["src"] for one in facts.widget]
    if missing := [str(path) for path in shown if not path.is_file()]:
        raise FileNotFoundError(f"no such example: {', '.join(missing)}")
    facts = dataclasses.replace(facts, widget=[show_example(path, facts) for path in shown])
    card = make_card(facts)
    copies = {path: path.name for path in companions(facts)}
    copies |= {path: one["src"] for path, one in zip(shown, facts.widget, strict=True)}
    for outdated in set(KEPT_OF_EVALUATION) - set(copies.values()):
        (facts.model / outdated).unlink(missing_ok=True)
    for path, kept in copies.items():
        if path.absolute() != facts.model / kept:
            write_whole(facts.model / kept, public(path))
    facts.save()
    write_whole(facts.model / "README.md", str(card).encode())
    return facts.model / "README.md"
