import json
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import numpy as np
import pytest
import torch

from modeling_fer import CLASSES, FerForImageClassification
from modeling_fer.data.augment import Normalize
from modeling_fer.learning.inference import (
    class_names,
    load_classifier,
    over_all_classes,
    predict_probabilities,
)

NORMALIZE = Normalize([0.5, 0.4, 0.6], [0.5, 0.3, 0.4])


def faces(count):
    return np.random.default_rng(0).integers(0, 256, (count, 3, 16, 16), dtype=np.uint8)


@pytest.fixture
def copy(checkpoint, tmp_path):
    """Return a copy of the saved folder that a test may damage."""
    return shutil.copytree(checkpoint, tmp_path / "model")


def test_a_good_folder_gives_model_and_processor(checkpoint):
    for folder in (checkpoint, str(checkpoint)):
        model, processor = load_classifier(folder)
        assert type(model) is FerForImageClassification
        assert not model.training
        assert processor.size["height"] == model.config.image_size == 16
        assert list(processor.image_mean) == [0.5, 0.4, 0.6]
        assert class_names(model) == list(CLASSES)


def test_a_missing_folder(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no model folder .*absent; train one .* or pass --model DIR"
    ):
        load_classifier(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("config.json", "configuration"),
        ("model.safetensors", "weights"),
        ("preprocessor_config.json", "image processor"),
    ],
)
def test_a_folder_that_lacks_something(copy, name, what):
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{copy} holds no {what} \({re.escape(name)}"):
        load_classifier(copy)


def test_class_names_that_are_not_ours(copy):
    config = json.loads((copy / "config.json").read_text())
    config["id2label"]["7"] = "Contempt"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"config.json: id2label names \['Contempt'\] are not among our classes"
    ):
        load_classifier(copy)


def test_damaged_weights_are_named(copy):
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{copy}.*damaged"):
        load_classifier(copy)


def test_weights_that_are_not_all_there(copy, make_model):
    model = make_model()
    state = {name: value for name, value in model.state_dict().items() if "classifier" not in name}
    model.save_pretrained(copy, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks weights: classifier.bias, classifier.weight"):
        load_classifier(copy)


def test_probabilities_over_all_classes():
    found = over_all_classes(np.array([[0.1, 0.9], [0.7, 0.3]], np.float32), ["Surprise", "Anger"])
    assert found.dtype == np.float32
    expected = np.zeros((2, 8), np.float32)
    expected[:, CLASSES.index("Surprise")] = 0.1, 0.7
    expected[:, CLASSES.index("Anger")] = 0.9, 0.3
    assert np.array_equal(found, expected)
    same = np.random.default_rng(0).random((3, 8))
    assert np.array_equal(over_all_classes(same, list(CLASSES)), same)


def test_weights_that_do_not_fit(copy):
    config = json.loads((copy / "config.json").read_text())
    del config["id2label"]["7"], config["label2id"]["Other"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=rf"{copy}: the weights are damaged, or do not fit config.json: .*size"
    ):
        load_classifier(copy)


@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (7, 3), (8, 4), (5, 256), (5, 1)])
def test_batches_change_nothing(count, batch_size, make_model):
    model = make_model()
    pixels = faces(count)
    with torch.no_grad():
        expected = model(NORMALIZE(torch.from_numpy(pixels))).logits.softmax(-1).numpy()
    found = predict_probabilities(model, pixels, NORMALIZE, batch_size)
    assert (found.dtype, found.shape) == (np.float32, (count, 8))
    assert np.allclose(found, expected, atol=1e-6)
    assert np.allclose(found.sum(1), 1, atol=1e-6)
    assert len({row.tobytes() for row in found}) == count  # no face stands in for another


class Rank:
    """One of several processes, here threads, that gather at a barrier."""

    device = torch.device("cpu")
    is_main_process = False

    def __init__(self, rank, parts, barrier):
        self.process_index, self.num_processes = rank, len(parts)
        self.parts, self.barrier = parts, barrier

    def gather(self, tensor):
        self.parts[self.process_index] = tensor
        self.barrier.wait()
        gathered = list(self.parts)
        self.barrier.wait()  # nobody writes the next part before all have read this one
        assert len({len(part) for part in gathered}) == 1  # else gathering hangs
        return torch.cat(gathered)


@pytest.mark.parametrize(("count", "world"), [(7, 2), (6, 3), (1, 3), (2, 3), (8, 3)])
def test_several_processes_agree_with_one(count, world, make_model):
    model, pixels = make_model(), faces(count)
    alone = predict_probabilities(model, pixels, NORMALIZE, 2)
    parts: list = [None] * world
    barrier = threading.Barrier(world, timeout=60)
    ranks = [Rank(rank, parts, barrier) for rank in range(world)]
    models = [deepcopy(model) for _ in ranks]
    with ThreadPoolExecutor(world) as pool:
        found = list(
            pool.map(lambda m, rank: predict_probabilities(m, pixels, NORMALIZE, 2, rank), models, ranks)
        )
    for probabilities in found:  # the same everywhere
        assert np.allclose(probabilities, alone, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training, make_model):
    model = make_model(classifier_dropout=0.5).train(training)
    first, second = (predict_probabilities(model, faces(3), NORMALIZE) for _ in range(2))
    assert np.array_equal(first, second)  # dropout is off
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())


def test_output_that_is_not_finite(make_model):
    model = make_model()
    with torch.no_grad():
        model.classifier.bias[2] = float("nan")
    with pytest.raises(
        ValueError, match="output is not finite: its weights are damaged, or training diverged"
    ):
        predict_probabilities(model, faces(2), NORMALIZE)


def test_no_faces(make_model):
    with pytest.raises(ValueError, match="there are no faces to predict"):
        predict_probabilities(make_model(), faces(0), NORMALIZE)
