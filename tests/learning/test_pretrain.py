"""Masked autoencoding: the model, how it is judged and saved, and which faces it may see."""

import contextlib
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTImageProcessor

from modeling_fer import FerForImageClassification
from modeling_fer.data import collection, schema
from modeling_fer.data.augment import AUGMENTATIONS, Normalize, View
from modeling_fer.data.pixels import open_image
from modeling_fer.data.sources.synthetic import SyntheticOptions, examples
from modeling_fer.learning import pretrain
from modeling_fer.learning.arguments import FerTrainingArguments
from modeling_fer.learning.image import sincos_positions
from modeling_fer.learning.optimization import build_optimizer, build_schedule
from modeling_fer.learning.pretrain import (
    MEAN,
    PICTURED,
    STD,
    ReconstructionStep,
    as_encoder,
    build_autoencoder,
    features,
    knn_accuracy,
    linear_accuracy,
    pretrain_stage,
    reconstruct,
)

TINY = {
    "stage": "pretrain",
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_hidden_size": 16,
    "decoder_layers": 1,
    "batch_size": 4,
}
NORMALIZE = Normalize(MEAN, STD)
ALONE = SimpleNamespace(  # what a stage asks of an accelerator
    device=torch.device("cpu"),
    process_index=0,
    num_processes=1,
    is_main_process=False,
    main_process_first=contextlib.nullcontext,
)


def arguments(**options):
    return FerTrainingArguments(**{"data": "A", "output_dir": "o", **TINY, **options})


def autoencoder(seed=0, **options):
    torch.manual_seed(seed)
    return build_autoencoder(arguments(**options)).eval()


def noise_images(count=5, seed=1):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def folders(prepared, monkeypatch, tmp_path):
    """Return a dict of loaded data sets by folder name, `A` the prepared one, to add to."""
    data = {"A": DatasetDict(schema.load(prepared))}
    monkeypatch.setattr(collection.schema, "load", data.__getitem__)
    monkeypatch.chdir(tmp_path)  # where the folders' caches go
    return data


def unlabel(rows):
    return rows.map(lambda row: {**row, "expression": -1})


def pixels_of(rows, side=32):
    """Decoded another way than the stage does."""
    faces = [np.asarray(row["image"].convert("RGB").resize((side, side), 2)) for row in rows]
    return np.stack(faces).transpose(0, 3, 1, 2)


def test_positions_are_waves_and_tokens_are_set():
    model = autoencoder()
    tables = {32: model.vit.embeddings.position_embeddings, 16: model.decoder.decoder_pos_embed}
    for width, table in tables.items():
        assert torch.equal(table[0, 1:], sincos_positions(4, width))
        assert not table[0, 0].any()
        assert not table.requires_grad
        assert torch.cdist(table[0, 1:], table[0, 1:]).add(torch.eye(16) * 9).min() > 0.1
    for token in (model.vit.embeddings.cls_token, model.decoder.mask_token):
        assert 0.01 < token.std() < 0.04
        assert token.requires_grad


def test_a_decoder_that_has_no_positions_is_told_by_its_option():
    with pytest.raises(ValueError, match="--decoder_hidden_size 18 must be a multiple of 4"):
        autoencoder(decoder_hidden_size=18)


def test_it_learns_and_only_by_knowing_where_a_patch_is():
    options = SyntheticOptions(image_size=32, subjects=4, train=64, validation=0, test=0, unlabeled=0)
    drawn = [open_image(example.image) for example in examples(options)]
    faces = torch.from_numpy(np.stack([np.asarray(image).transpose(2, 0, 1) for image in drawn]))
    view = View(AUGMENTATIONS["none"](0.0), MEAN, STD)

    def last_loss(knows_places, steps=120):
        model = autoencoder(hidden_size=64, decoder_hidden_size=64).train()
        if not knows_places:
            model.vit.embeddings.position_embeddings.zero_()
            model.decoder.decoder_pos_embed.zero_()
        optimizer = build_optimizer(model, 5e-3, 0.05)
        schedule = build_schedule(optimizer, 0.1, steps)
        step = ReconstructionStep(model, view, contextlib.nullcontext)
        torch.manual_seed(0)
        losses = []
        for _ in range(steps):
            batch = {"pixels": faces[torch.randint(len(faces), (32,))]}
            losses.append(step(batch, torch.Tensor.backward)["loss"].item())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return np.mean(losses[-10:])

    # A model that answers 0 has 0.995, one that answers with the mean of all patches about 0.59.
    assert last_loss(knows_places=True) < 0.5
    assert last_loss(knows_places=False) > 0.55


def test_masks_are_those_of_the_seed_and_of_nothing_else():
    model, images = autoencoder(), noise_images()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = reconstruct(model, images, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert all(torch.equal(a, b) for a, b in zip(first, reconstruct(model, images, 3), strict=True))
    assert not torch.equal(first[1], reconstruct(model, images, 4)[1])
    hidden = model.patchify(first[1]).eq(0).all(-1)
    assert len({tuple(row) for row in hidden.tolist()}) > 1, "every face has its own mask"


@pytest.mark.parametrize(("ratio", "count"), [(0.25, 4), (0.75, 12), (1.0, 16)])
def test_reconstructions_keep_what_was_seen_and_the_loss_is_the_model_s(ratio, count):
    model, images = autoencoder(mask_ratio=ratio), noise_images()
    loss, blank, whole = reconstruct(model, images, 7)
    noise = torch.rand(5, 16, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        output = model(pixel_values=images, noise=noise)
    hidden = output.mask.bool()
    assert hidden.sum(1).tolist() == [count] * 5
    assert torch.equal(loss, output.loss)
    patches, blank, whole = (model.patchify(each) for each in (images, blank, whole))
    for shown in (blank, whole):
        assert torch.equal(shown[~hidden], patches[~hidden])
    assert not blank[hidden].any()
    deviation = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    filled = (whole - patches.mean(-1, keepdim=True)) / deviation
    assert torch.allclose(filled[hidden], output.logits[hidden], atol=1e-4)


def test_answering_nothing_explains_nothing_and_paints_each_patch_in_its_mean():
    model, images = autoencoder(), noise_images() * 0.3 + 0.2
    with torch.no_grad():
        model.decoder.decoder_pred.weight.zero_()
        model.decoder.decoder_pred.bias.zero_()
    loss, blank, whole = reconstruct(model, images)
    n = 3 * 8 * 8  # the model divides by a deviation of n - 1 degrees of freedom
    assert 1 - loss.item() == pytest.approx(1 / n, abs=1e-4)
    patches, whole = model.patchify(images), model.patchify(whole)
    hidden = model.patchify(blank).eq(0).all(-1)
    means = patches.mean(-1, keepdim=True).expand_as(patches)
    assert torch.allclose(whole[hidden], means[hidden], atol=1e-6)


def test_the_encoder_alone_sees_what_the_autoencoder_s_would_without_a_mask():
    model, images = autoencoder(), noise_images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    encoder = as_encoder(model).eval()
    model.config.mask_ratio = 0.0
    with torch.no_grad():
        theirs = model.vit(images, noise=torch.rand(5, 16))
        ours = encoder(images).last_hidden_state
        assert torch.equal(ours, encoder(images).last_hidden_state)
    places = theirs.ids_restore[..., None].expand(-1, -1, 32)
    patches = theirs.last_hidden_state[:, 1:].gather(1, places)
    assert torch.allclose(ours[:, 1:], patches, atol=1e-5)
    assert torch.allclose(ours[:, :1], theirs.last_hidden_state[:, :1], atol=1e-5)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "a copy"


def test_features_are_mean_patch_tokens_in_pieces_of_any_size():
    encoder = as_encoder(autoencoder()).eval()
    pixels = np.random.default_rng([0]).integers(0, 256, (7, 3, 32, 32), dtype=np.uint8)
    found = features(encoder, pixels, NORMALIZE, torch.device("cpu"), size=3)
    with torch.no_grad():
        tokens = encoder(NORMALIZE(torch.from_numpy(pixels))).last_hidden_state
    assert np.allclose(found, tokens[:, 1:].mean(1).numpy(), atol=1e-5)


def clusters(rng, count, width=16, spread=0.1):
    """Faces of 8 classes, each near its own axis."""
    labels = np.arange(count) % 8
    return (np.eye(8, width)[labels] + spread * rng.normal(size=(count, width))).astype(np.float32), labels


@pytest.mark.parametrize("probe", [knn_accuracy, linear_accuracy])
def test_probes_find_classes_that_are_there_and_none_where_there_are_none(probe):
    rng = np.random.default_rng([0])
    known, asked = clusters(rng, 160), clusters(rng, 80)
    assert probe(*known, *asked) > 0.97
    assert probe(*known, asked[0], (asked[1] + 1) % 8) < 0.03
    scattered = [(rng.normal(size=(n, 16)).astype(np.float32), rng.integers(0, 8, n)) for n in (400, 400)]
    assert abs(probe(*scattered[0], *scattered[1]) - 1 / 8) < 0.06


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 30))
def test_neighbours_vote_by_similarity(seed, count, k):
    rng = np.random.default_rng([seed])
    known, asked = (rng.normal(size=(n, 6)).astype(np.float32) for n in (count, 12))
    labels, answers = rng.integers(0, 8, count), rng.integers(0, 8, 12)
    centre, right = known.mean(0), 0
    for face, answer in zip(asked - centre, answers, strict=True):
        others = known - centre
        norms = np.linalg.norm(others, axis=1) * np.linalg.norm(face)
        similarity = others @ face / np.maximum(norms, 1e-12)
        votes = np.zeros(8)
        for i in np.argsort(-similarity)[:k]:
            votes[labels[i]] += np.exp(similarity[i] / 0.07)
        right += votes.argmax() == answer
    if count > 1:  # of one face the mean is itself: nothing is left
        assert knn_accuracy(known, labels, asked, answers, k) == pytest.approx(right / 12)


def test_probes_on_faces_that_are_all_alike():
    alike = np.ones((3, 4), np.float32)
    asked, answers = alike[:2], np.array([2, 1])
    assert knn_accuracy(alike, np.array([2, 2, 1]), asked, answers, k=20) == 0.5
    assert knn_accuracy(alike[:2], np.array([3, 1]), asked, answers) == 0.5, "the lower class of a tie"
    assert linear_accuracy(alike, np.array([2, 2, 1]), asked, answers) == 0.5
    assert knn_accuracy(alike[:1], np.array([5]), asked, answers) == 0


def test_linear_probe_is_told_nothing_by_the_scale_of_a_feature():
    rng = np.random.default_rng([1])
    known, asked = clusters(rng, 64, spread=0.4), clusters(rng, 64, spread=0.4)
    scale, shift = 10.0 ** rng.uniform(-2, 2, 16), rng.normal(size=16)
    plain = linear_accuracy(*known, *asked)
    assert 0.3 < plain < 1
    assert linear_accuracy(known[0] * scale + shift, known[1], asked[0] * scale + shift, asked[1]) == plain


def drawn(stage, rounds=40):
    """Pixels of every face that training gets in so many rounds."""
    rows = set()
    for _ in range(rounds):
        rows |= set(stage.labelled.sampler.global_order().tolist())
        stage.labelled.sampler.epoch += 1
    return {stage.labelled.dataset.pixels[i].tobytes() for i in rows}, rows


def test_training_sees_all_train_and_unlabelled_faces_and_none_that_measure(folders):
    folders["A"]["test"] = folders["A"]["validation"].select(range(8, 16))
    folders["A"]["validation"] = folders["A"]["validation"].select(range(8))
    folders["B"] = DatasetDict(train=folders["A"]["train"].select(range(20, 24)), test=folders["A"]["test"])
    folders["A"]["train"] = folders["A"]["train"].select(range(20))
    stage = pretrain_stage(arguments(data="A,unlabelled=B"), ALONE)
    faces, _ = drawn(stage)
    learnt = [folders["A"]["train"], folders["A"]["unlabeled"], folders["B"]["train"]]
    assert faces == {face.tobytes() for rows in learnt for face in pixels_of(rows)}
    measured = [folders["A"]["validation"], folders["A"]["test"]]
    assert not faces & {face.tobytes() for rows in measured for face in pixels_of(rows)}


def test_judged_by_the_validation_faces_of_every_labelled_folder(folders):
    rows = folders["A"]["validation"]
    folders["A"]["validation"] = rows.select(range(10))
    folders["B"] = DatasetDict(train=folders["A"]["train"], validation=rows.select(range(10, 16)))
    model = autoencoder()
    whole = reconstruct(model, NORMALIZE(torch.from_numpy(pixels_of(rows))), 0)[0].item()
    found = pretrain_stage(arguments(data="A,B"), ALONE).evaluate(model)
    assert found["explained_variance"] == pytest.approx(1 - whole, abs=1e-6)
    assert found.keys() == {"explained_variance", "linear_probe", "knn_probe"}
    assert found == pretrain_stage(arguments(data="A,B"), ALONE).evaluate(model)


def test_without_validation_faces_are_held_out_and_never_trained_on(folders):
    del folders["A"]["validation"]
    folders["B"] = DatasetDict(unlabeled=folders["A"]["train"])
    stage = pretrain_stage(arguments(data="A,unlabelled=B"), ALONE)
    _, rows = drawn(stage)
    every = stage.labelled.dataset.pixels
    held_out = [i for i in range(len(every)) if i not in rows]
    assert len(every) == 50
    assert len(held_out) == 2
    model = autoencoder()
    expected = reconstruct(model, NORMALIZE(torch.from_numpy(np.array(every[held_out]))), 0)[0].item()
    assert stage.evaluate(model)["explained_variance"] == pytest.approx(1 - expected, abs=1e-6)
    other = pretrain_stage(arguments(data="A,unlabelled=B", seed=3), ALONE)
    assert drawn(other)[1] != rows, "other seed, other faces"


def test_labels_have_no_say(folders):
    """The same faces, order, and judgement without any label; probes are left out."""
    folders["B"] = DatasetDict({split: unlabel(rows) for split, rows in folders["A"].items()})
    folders["C"] = DatasetDict(unlabeled=unlabel(folders["A"]["train"]))
    model = autoencoder()
    with_labels, without = (pretrain_stage(arguments(data=name), ALONE) for name in "AB")
    assert with_labels.criterion == without.criterion == "explained_variance"
    assert with_labels.labelled.sampler.global_order().tolist() == (
        without.labelled.sampler.global_order().tolist()
    )
    only = without.evaluate(model)
    assert only.keys() == {"explained_variance"}
    assert only["explained_variance"] == with_labels.evaluate(model)["explained_variance"]
    alone = pretrain_stage(arguments(data="unlabelled=C"), ALONE)
    assert alone.evaluate(model).keys() == {"explained_variance"}
    assert len(drawn(alone)[1]) == 23


@pytest.mark.parametrize("held_out", [False, True])
def test_probes_know_labelled_training_faces_and_are_asked_labelled_judging_ones(
    folders, monkeypatch, held_out
):
    def every_other_label(rows):
        labels = [label if i % 2 else -1 for i, label in enumerate(rows["expression"][:])]
        return rows.map(lambda row, i: {**row, "expression": labels[i]}, with_indices=True)

    folders["A"] = DatasetDict({split: every_other_label(rows) for split, rows in folders["A"].items()})
    if held_out:
        folders["A"]["unlabeled"] = folders["A"]["train"]
        del folders["A"]["validation"]
    asked = []
    monkeypatch.setattr(pretrain, "knn_accuracy", lambda *pairs: asked.append(pairs) or 0.5)
    stage = pretrain_stage(arguments(seed=1), ALONE)
    model = autoencoder()
    assert stage.evaluate(model)["knn_probe"] == 0.5
    [(known, labels, new, answers)] = asked
    data, order = stage.labelled.dataset, stage.labelled.sampler.members[0]
    rows = [i for i in order if data.labels[i] >= 0]
    encoder = as_encoder(model).eval()
    assert labels.tolist() == data.labels[rows].tolist()
    assert np.allclose(known, features(encoder, data.pixels[rows], NORMALIZE, ALONE.device), atol=1e-5)
    if held_out:
        hidden = sorted({*range(48)} - {*order.tolist()})
        expected = [(i, data.labels[i]) for i in hidden if data.labels[i] >= 0]
        pixels = data.pixels[[i for i, _ in expected]]
    else:
        rows = folders["A"]["validation"]
        expected = [(i, label) for i, label in enumerate(rows["expression"][:]) if label >= 0]
        pixels = pixels_of(rows.select([i for i, _ in expected]))
    assert answers.tolist() == [label for _, label in expected]
    assert np.allclose(new, features(encoder, pixels, NORMALIZE, ALONE.device), atol=1e-5)


def test_saved_model_is_an_encoder_with_a_processor_and_a_picture(folders, tmp_path):
    stage = pretrain_stage(arguments(), ALONE)
    folder = tmp_path / "model"
    folder.mkdir()
    stage.save(stage.model, folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json", "reconstructions.png"}
    saved = load_file(folder / "model.safetensors")
    ours = stage.model.vit.state_dict()
    assert len(saved) == len(ours)
    assert not [name for name in saved if "decoder" in name or "pooler" in name]

    classifier = FerForImageClassification.from_encoder_pretrained(folder).eval()
    encoder = classifier.fer.encoder.state_dict()
    assert encoder.keys() == ours.keys()
    assert all(torch.equal(encoder[name], value) for name, value in ours.items())
    assert classifier.config.image_size == 32
    rows = folders["A"]["validation"].select(range(3))
    processor = ViTImageProcessor.from_pretrained(folder)
    prepared = processor([row["image"].convert("RGB") for row in rows], return_tensors="pt")["pixel_values"]
    assert torch.allclose(prepared, NORMALIZE(torch.from_numpy(pixels_of(rows))), atol=1e-5)

    image = Image.open(io.BytesIO((folder / "reconstructions.png").read_bytes()))
    assert image.size == (round(150 * (1.1 * PICTURED + 1.2)), round(150 * 3.3))
    assert len(np.unique(np.asarray(image.convert("L")))) > 50
