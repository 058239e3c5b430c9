"""Prepared folders by role."""

import numpy as np
import pytest
from datasets import DatasetDict

from modeling_fer.data import collection, schema
from modeling_fer.data.collection import Collection, expressions_of, parse_roles


@pytest.fixture
def folders(prepared, monkeypatch):
    """Return a dict of loaded data sets by folder name, `A` the prepared one, to add to."""
    data = {"A": schema.load(prepared)}
    monkeypatch.setattr(collection.schema, "load", data.__getitem__)
    return data


def unlabel(rows, keep):
    return rows.map(
        lambda row, i: {**row, "expression": row["expression"] if keep(i) else -1}, with_indices=True
    )


def test_roles_of_folders():
    assert parse_roles("A") == {"labelled": ["A"], "pseudo": [], "unlabelled": []}
    text = "labelled=A,unlabelled=B,pseudo=C,unlabelled=/d/e=f"
    assert parse_roles(text) == {"labelled": ["A"], "pseudo": ["C"], "unlabelled": ["B", "/d/e=f"]}
    for wrong in ("", "test=A", "labelled=", ","):
        with pytest.raises(ValueError, match="--data"):
            parse_roles(wrong)


def test_rows_with_a_label(folders):
    assert len(Collection("A").labelled("train")) == 24
    folders["A"] = DatasetDict(folders["A"])
    folders["A"]["train"] = unlabel(folders["A"]["train"], lambda i: i % 2 == 0)
    kept = Collection("A").labelled("train")
    assert kept["expression"][:] == folders["A"]["train"]["expression"][::2]
    with pytest.raises(ValueError, match=r"A has no test split \(A has train, validation, unlabeled\)"):
        Collection("A").labelled("test")
    with pytest.raises(ValueError, match="A: no row of the unlabeled split has a label"):
        Collection("A").labelled("unlabeled")


def test_pseudo_labels_join_the_training_rows_only(folders):
    folders["P"] = DatasetDict({"pseudo": folders["A"]["validation"]})
    both = Collection("A,pseudo=P")
    train = [*folders["A"]["train"]["expression"][:], *folders["A"]["validation"]["expression"][:]]
    assert expressions_of(both.labelled("train")).tolist() == train
    assert len(both.labelled("validation")) == len(folders["A"]["validation"])
    with pytest.raises(ValueError, match=r"A has no pseudo split .*pseudo_label.py select"):
        Collection("A,pseudo=A").labelled("train")


def test_unlabelled_faces_of_every_folder_but_none_held_out(folders):
    sizes = {split: len(rows) for split, rows in folders["A"].items()}
    folders["U"] = DatasetDict({split: folders["A"][split] for split in ("train", "validation")})
    assert len(Collection("A").unlabelled()) == sizes["unlabeled"]
    both = Collection("A,unlabelled=U")
    assert len(both.unlabelled()) == sizes["unlabeled"] + sizes["train"]
    assert len(both.faces()) == sizes["unlabeled"] + 2 * sizes["train"]
    assert Collection("labelled=U").unlabelled() is None
    assert np.array_equal(expressions_of(Collection("U").faces()), expressions_of(folders["U"]["train"]))
