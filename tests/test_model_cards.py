"""The cards in `model_cards/` are those of the released checkpoints, and say what the files there say."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cards import number_faults, report, save_run, sums, write_json
from conftest import picture
from huggingface_hub import ModelCard

from modeling_fer.evaluation.report import write_report
from modeling_fer.hub.card import make_card, write_card
from modeling_fer.hub.facts import read_facts
from modeling_fer.hub.runs import FACTS, THIS

ROOT = Path(__file__).parents[1]
CHECKPOINTS, CARDS = ROOT / "checkpoints", ROOT / "model_cards"


def released(folder: Path) -> list[Path]:
    """The checkpoints in a folder."""
    return sorted(path.parent for path in folder.glob("*/config.json"))


def card_faults(checkpoint: Path, page: Path) -> list[str]:
    """Where a checkpoint's card is not what its files make, or says a number that they do not hold."""
    facts = read_facts(checkpoint)
    card = str(make_card(facts))
    faults = [
        f"{path} is not the card that {checkpoint} makes: write it with `fer card {checkpoint}`"
        for path in (checkpoint / "README.md", page)
        if not path.is_file() or path.read_text() != card
    ]
    counts = [(one.learner, one.counts) for one in facts.data if one.counts]
    added = sums([found for who, found in counts if who == THIS]) + sums([found for _, found in counts])
    faults += number_faults(card, sorted(checkpoint.glob("*.json")), added)
    parsed = ModelCard(card)
    faults += [f"no {key}" for key in ("license", "library_name", "pipeline_tag") if not parsed.data.get(key)]
    shown = [*parsed.data.get("widget", [])] if parsed.data.get("widget") else []
    return faults + [f"no {one['src']}" for one in shown if not (checkpoint / one["src"]).is_file()]


@pytest.mark.parametrize("checkpoint", released(CHECKPOINTS), ids=lambda path: path.name)
def test_the_card_of_each_checkpoint_is_made_anew(checkpoint):
    assert card_faults(checkpoint, CARDS / f"{checkpoint.name}.md") == []


def test_every_card_has_its_checkpoint():
    pages = {path.stem for path in CARDS.glob("*.md")} - {"README"}
    assert pages == {path.name for path in released(CHECKPOINTS)}


@pytest.fixture
def release(checkpoint, tmp_path):
    """A checkpoint and its card, taken out of a run as a release does."""
    report(tmp_path / "data/faces", "fer2013")
    home = save_run(tmp_path, checkpoint, batch_size=64)
    write_json(home / "environment.json", {"seconds": 41.5, "threads": 2, "versions": {"torch": "2.13.0"}})
    rng = np.random.default_rng(0)
    about = {"model": str(home / "model"), "data": "data/faces", "split": "test"}
    write_report(home / "test", rng.integers(0, 8, 40), rng.dirichlet(np.ones(8), 40), about=about)
    picture(4, 5).save(tmp_path / "smile.png")
    write_card(home, "org/tiny", examples=[tmp_path / "smile.png"])
    out, page = tmp_path / "checkpoints/tiny", tmp_path / "model_cards/tiny.md"
    shutil.copytree(home / "model", out)
    page.parent.mkdir()
    shutil.copy(out / "README.md", page)
    shutil.rmtree(home)
    return out, page


def test_the_card_of_a_release_is_good(release):
    assert released(release[0].parent) == [release[0]]
    assert card_faults(*release) == []


@pytest.mark.parametrize("what", ["page", "readme", "numbers", "run", "example", "nothing"])
def test_the_check_can_fail(release, what):
    out, page = release
    metrics = json.loads((out / "metrics.json").read_text())
    if what == "page":
        page.write_text(page.read_text().replace("0.", "1.", 1))
        assert len(card_faults(out, page)) == 1
    elif what == "readme":
        (out / "README.md").unlink()
        assert len(card_faults(out, page)) == 1
    elif what == "numbers":
        write_json(out / "metrics.json", {**metrics, "accuracy": metrics["accuracy"] + 0.01})
        assert len(card_faults(out, page)) == 2
    elif what == "run":
        stored = json.loads((out / FACTS).read_text())
        stored["data"][0]["counts"]["train"]["Fear"] += 1
        write_json(out / FACTS, stored)
        assert len(card_faults(out, page)) == 2
    elif what == "example":
        (out / "example_smile.png").unlink()
        assert card_faults(out, page) == ["no example_smile.png"]
    else:
        page.unlink()
        assert "is not the card that" in card_faults(out, page)[0]
