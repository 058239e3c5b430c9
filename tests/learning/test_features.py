"""What a cache of features is keyed by."""

import pytest
import torch
import transformers

from modeling_fer.data.augment import Normalize
from modeling_fer.learning.features import model_digest

PLAIN = Normalize([0.5] * 3, [0.5] * 3)


@pytest.fixture
def model(make_model):
    """Return a model with batch norms, whose state has single numbers in it."""
    config = transformers.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4)
    return make_model(config, image_size=32).fer


def test_the_key_changes_with_all_that_changes_features(model):
    found = {model_digest(model, PLAIN, 32), model_digest(model, PLAIN, 48)}
    found.add(model_digest(model, Normalize([0.4] * 3, [0.5] * 3), 32))
    norm = model.encoder.embedder.embedder.normalization
    for values in (norm.running_mean, norm.weight.data, norm.num_batches_tracked):
        values += 1
        found.add(model_digest(model, PLAIN, 32))
    assert len(found) == 6
    assert model_digest(model, PLAIN, 32) == model_digest(model, PLAIN, 32)


def test_the_key_does_not_change_with_how_a_matrix_lies_in_memory(model):
    before = model_digest(model, PLAIN, 32)
    model.to(memory_format=torch.channels_last)
    assert model_digest(model, PLAIN, 32) == before
