"""Perceptual hashes: what they see through, what they tell apart, and the search against a plain loop."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from modeling_fer.data.pixels import open_image
from modeling_fer.data.schema import Example
from modeling_fer.data.similar import (
    BITS,
    BYTES,
    NEAR,
    SIDE,
    WAVES,
    mirrored,
    near_any,
    perceptual_hashes,
    thumbnail,
)
from modeling_fer.data.sources.synthetic import SyntheticOptions, examples


@pytest.fixture(scope="module")
def faces():
    options = SyntheticOptions(image_size=96, subjects=40, train=0, validation=0, test=0, unlabeled=120)
    return [open_image(item.image) for item in examples(options) if isinstance(item, Example)]


def hashes(images):
    return perceptual_hashes(np.stack([thumbnail(image) for image in images]))


def distances(a, b):
    return np.bitwise_count(a[:, None] ^ b[None]).sum(axis=2)


def jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return open_image(file.getvalue())


@pytest.mark.parametrize(
    "change",
    [
        lambda face: jpeg(face, 50),
        lambda face: face.resize((61, 61), Image.Resampling.BICUBIC),
        lambda face: face.resize((300, 300), Image.Resampling.LANCZOS),
        lambda face: ImageEnhance.Brightness(face).enhance(1.1),
        lambda face: ImageEnhance.Contrast(face).enhance(0.8),
        lambda face: jpeg(ImageEnhance.Brightness(face.resize((80, 80))).enhance(1.06), 75),
    ],
)
def test_changed_copies_are_near_and_other_faces_are_not(faces, change):
    before, after = hashes(faces), hashes([change(face) for face in faces])
    assert np.diagonal(distances(before, after)).max() <= NEAR
    assert near_any(after, before).all()
    # Half of the faces, changed, against the other half.
    assert not near_any(after[:60], before[60:]).any()


def test_mirror_images_are_near(faces):
    flipped = hashes([ImageOps.mirror(face) for face in faces])
    assert (mirrored(mirrored(flipped)) == flipped).all()
    assert np.diagonal(distances(mirrored(hashes(faces)), flipped)).max() <= 2
    assert near_any(flipped, hashes(faces), 2).all()


def test_bits_are_the_signs_of_the_cosine_transform():
    place = (np.arange(SIDE) + 0.5) / SIDE
    wave = np.outer(np.cos(3 * np.pi * place), np.cos(5 * np.pi * place))
    bits = np.unpackbits(perceptual_hashes(np.round(128 + 100 * wave)[None].astype(np.uint8)))
    assert bits.reshape(WAVES, WAVES)[2, 4] == 1
    bits = np.unpackbits(perceptual_hashes(np.round(128 - 100 * wave)[None].astype(np.uint8)))
    assert bits.reshape(WAVES, WAVES)[2, 4] == 0
    assert not perceptual_hashes(np.full((1, SIDE, SIDE), 77, np.uint8)).any(), "an even image has no waves"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_search_finds_what_a_loop_finds(distance, seed):
    rng = np.random.default_rng(seed)
    others = rng.integers(0, 256, (30, BYTES), np.uint8)
    queries = np.concatenate([others, mirrored(others), rng.integers(0, 256, (9, BYTES), np.uint8)])
    for query in queries[:-9]:  # a copy with up to 60 bits turned
        bits = np.unpackbits(query)
        bits[rng.permutation(BITS)[: rng.integers(0, 60)]] ^= 1
        query[:] = np.packbits(bits)
    found = near_any(queries, others, distance)
    both = np.minimum(distances(queries, others), distances(queries, mirrored(others)))
    assert (found == (both.min(axis=1) <= distance)).all()


def test_search_in_blocks_and_among_nothing(faces, monkeypatch):
    some = hashes(faces)
    whole = near_any(some, some[::7], 40)
    monkeypatch.setattr("modeling_fer.data.similar._QUERIES", 7)
    monkeypatch.setattr("modeling_fer.data.similar._CANDIDATES", 5)
    assert (near_any(some, some[::7], 40) == whole).all()
    nothing = np.empty((0, BYTES), np.uint8)
    assert not near_any(some, nothing).any()
    assert near_any(nothing, some).shape == (0,)
