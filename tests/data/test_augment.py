import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from transformers import ViTImageProcessor

from modeling_fer.data.augment import AUGMENTATIONS, Normalize, View, weak_augmentation

MEAN, STD = [0.5, 0.4, 0.6], [0.5, 0.3, 0.4]


def images(count=3, size=16, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return torch.from_numpy(values)


def smooth_face(count):
    """The same image `count` times: bright on the left, dark at the bottom."""
    ramp = torch.linspace(0, 255, 16)
    one = torch.stack([ramp.expand(16, 16), ramp.flip(0).expand(16, 16).T, torch.full((16, 16), 90.0)])
    return one.to(torch.uint8).expand(count, -1, -1, -1)


shares = st.floats(0.05, 0.95)


@settings(max_examples=20, deadline=None)
@given(st.lists(shares, min_size=3, max_size=3), st.lists(shares, min_size=3, max_size=3), st.integers(0, 99))
def test_normalize_is_what_the_stock_processor_does(mean, std, seed):
    batch = images(seed=seed)
    stock = ViTImageProcessor(do_resize=False, image_mean=mean, image_std=std)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in batch]
    expected = stock(pictures, return_tensors="pt")["pixel_values"]
    found = Normalize(mean, std)(batch)
    assert found.dtype == torch.float32
    # Relative to the largest value: a small std makes large ones.
    assert (found - expected).abs().max() <= 1e-6 * max(1, expected.abs().max().item())


def test_normalize_ends_at_the_range_of_the_usual_half():
    extremes = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    found = Normalize([0.5] * 3, [0.5] * 3)(extremes)
    assert torch.allclose(found[0], torch.tensor(-1.0), atol=1e-6)
    assert torch.allclose(found[1], torch.tensor(1.0), atol=1e-6)


def test_normalize_adds_nothing_to_a_checkpoint():
    assert Normalize(MEAN, STD).state_dict() == {}


@pytest.mark.parametrize("erasing", [0.0, 1.0])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_views_have_the_shape_and_range_of_the_model_input(name, erasing):
    batch = images(5, size=24)
    before = batch.clone()
    view = View(AUGMENTATIONS[name](erasing), MEAN, STD)
    torch.manual_seed(0)
    found = view(batch)
    assert (found.shape, found.dtype, found.requires_grad) == (batch.shape, torch.float32, False)
    assert torch.isfinite(found).all()
    low, high = (Normalize(MEAN, STD)(torch.full((1, 3, 1, 1), v, dtype=torch.uint8)) for v in (0, 255))
    assert (found >= low - 1e-5).all()
    assert (found <= high + 1e-5).all()
    assert torch.equal(batch, before)


def test_no_augmentation_is_normalize():
    assert torch.equal(View(AUGMENTATIONS["none"](), MEAN, STD)(images()), Normalize(MEAN, STD)(images()))


def test_the_scale_is_kept_on_the_way_through_an_augmentation():
    """A view that changes nothing, but is not skipped, gives the normalised image."""
    unchanged = nn.Sequential()
    assert torch.allclose(View(unchanged, MEAN, STD)(images()), Normalize(MEAN, STD)(images()), atol=1e-5)


@pytest.mark.parametrize("erasing", [0.0, 0.5])
def test_a_seed_decides_the_view(erasing):
    view = View(weak_augmentation(erasing), MEAN, STD)

    def draw(seed):
        torch.manual_seed(seed)
        return view(images())

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    torch.manual_seed(1)
    assert not torch.equal(view(images()), view(images()))


def test_each_image_is_seen_its_own_way():
    torch.manual_seed(0)
    found = View(weak_augmentation(), MEAN, STD)(smooth_face(8))
    for i in range(8):
        for j in range(i):
            assert (found[i] - found[j]).abs().max() > 0.05


def test_about_half_the_images_are_mirrored():
    torch.manual_seed(0)
    found = View(weak_augmentation(), MEAN, STD)(smooth_face(200))
    mirrored = found[:, 0, :, :8].mean((1, 2)) > found[:, 0, :, 8:].mean((1, 2))
    assert 70 < mirrored.sum() < 130
    upside_down = found[:, 1, :8].mean((1, 2)) < found[:, 1, 8:].mean((1, 2))
    assert not upside_down.any()


def test_erasing_blanks_part_of_an_image():
    whole = torch.zeros(20, 3, 16, 16, dtype=torch.uint8)  # black stays black under all else
    torch.manual_seed(0)
    plain = View(weak_augmentation(), [0.0] * 3, [1.0] * 3)(whole)
    torch.manual_seed(0)
    erased = View(weak_augmentation(1.0), [0.0] * 3, [1.0] * 3)(whole)
    blank = (erased[:, 0] > 0.4).float().mean((1, 2))
    assert (plain > 0.4).float().mean() < 0.01
    assert (blank > 0.01).all()
    assert (blank < 0.35).all()
