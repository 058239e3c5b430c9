import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from transformers import ViTImageProcessor

from modeling_fer.data.augment import (
    AUGMENTATIONS,
    STRONG,
    WEAK,
    CameraNoise,
    Crop,
    Distort,
    Erase,
    Normalize,
    View,
    strong_augmentation,
    weak_augmentation,
)
from modeling_fer.data.operations import NEUTRAL, PHOTOMETRY, distort, erase, warp

MEAN, STD = [0.5, 0.4, 0.6], [0.5, 0.3, 0.4]


def images(count=3, size=16, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return torch.from_numpy(values)


def smooth_face(count):
    """The same image `count` times: bright on the left, dark at the bottom."""
    ramp = torch.linspace(0, 255, 16)
    one = torch.stack([ramp.expand(16, 16), ramp.flip(0).expand(16, 16).T, torch.full((16, 16), 90.0)])
    return one.to(torch.uint8).expand(count, -1, -1, -1)


def done(name, strength, batch):
    """Every image of a batch with one operation at one strength."""
    return distort(batch, {name: torch.full((len(batch),), float(strength))})


def with_pillow(change, batch):
    pictures = [change(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in batch]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()


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


def test_normalize_leaves_float_images_alone_unless_told_to_overwrite():
    batch, normalize = images().float(), Normalize(MEAN, STD)
    found = normalize(batch)
    assert torch.equal(batch, images().float())
    assert torch.equal(found, normalize(images()))
    assert normalize.overwrite(batch) is batch
    assert torch.equal(batch, found)


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
@pytest.mark.parametrize("name", ["weak", "strong", "crop"])
def test_a_seed_decides_the_view(name, erasing):
    view = View(AUGMENTATIONS[name](erasing), MEAN, STD)

    def draw(seed):
        torch.manual_seed(seed)
        return view(images())

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    torch.manual_seed(1)
    assert not torch.equal(view(images()), view(images()))


@pytest.mark.parametrize("name", ["weak", "strong", "crop"])
def test_what_images_show_does_not_change_what_is_drawn(name):
    view = View(AUGMENTATIONS[name](0.5), MEAN, STD)

    def next_number(batch):
        torch.manual_seed(0)
        view(batch)
        return torch.rand(())

    assert next_number(images(8)) == next_number(torch.zeros(8, 3, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["weak", "strong", "crop"])
def test_each_image_is_seen_its_own_way(name):
    torch.manual_seed(0)
    found = View(AUGMENTATIONS[name](), MEAN, STD)(smooth_face(8))
    for i in range(8):
        for j in range(i):
            assert (found[i] - found[j]).abs().max() > 0.02


@pytest.mark.parametrize("name", ["weak", "crop"])
def test_about_half_the_images_are_mirrored(name):
    torch.manual_seed(0)
    found = View(AUGMENTATIONS[name](), MEAN, STD)(smooth_face(200))
    mirrored = found[:, 0, :, :8].mean((1, 2)) > found[:, 0, :, 8:].mean((1, 2))
    assert 70 < mirrored.sum() < 130
    upside_down = found[:, 1, :8].mean((1, 2)) < found[:, 1, 8:].mean((1, 2))
    assert not upside_down.any()


def test_a_strong_view_is_further_from_the_image_than_a_weak_one():
    batch = smooth_face(200)
    plain = Normalize(MEAN, STD)(batch)

    def distance(augmentation):
        torch.manual_seed(0)
        found = View(augmentation, MEAN, STD)(batch)
        apart = [(found - face).square().mean((1, 2, 3)) for face in (plain, plain.flip(3))]
        return torch.minimum(*apart).mean()

    assert distance(strong_augmentation()) > 1.3 * distance(weak_augmentation())


@pytest.mark.parametrize("ranges", [WEAK, STRONG])
def test_strengths_fill_their_ranges(ranges):
    torch.manual_seed(0)
    drawn = Distort(ranges).draw(500)
    assert set(drawn.pop("mirror").tolist()) == {1, -1}
    assert drawn.keys() == ranges.keys()
    for name, (low, high) in ranges.items():
        assert ((drawn[name] >= low) & (drawn[name] <= high)).all()
        assert drawn[name].mean() == pytest.approx((low + high) / 2, abs=0.06 * (high - low))
        assert drawn[name].std() == pytest.approx((high - low) / 12**0.5, rel=0.1)


@pytest.mark.parametrize("count", [0, 2, 5])
def test_each_image_gets_as_many_operations_as_asked_for(count):
    torch.manual_seed(0)
    drawn = Distort({}, STRONG, count).draw(500)
    changed = torch.stack([drawn[name] != NEUTRAL[name] for name in STRONG], 1)
    assert set(changed.sum(1).tolist()) <= {count, count - 1}  # one of them may be "identity"
    expected = 500 * count / len(STRONG)
    assert all(0.6 * expected <= changed[:, i].sum() <= 1.5 * expected for i in range(1, len(STRONG)))
    # No two of them always go together.
    together = changed.float().T @ changed.float()
    assert (together.fill_diagonal_(0) <= 0.8 * expected).all()


def test_a_drawn_operation_replaces_the_strength_that_all_have():
    torch.manual_seed(0)
    drawn = Distort({"rotate": (1, 2), "zoom": (1, 2)}, {"rotate": (3, 4), "posterize": (4, 5)}, 1).draw(100)
    turned = drawn["rotate"] >= 3
    assert 30 < turned.sum() < 70
    assert (drawn["rotate"][~turned] <= 2).all()
    assert torch.equal(drawn["posterize"] == 8, turned)
    assert drawn["zoom"].unique().numel() > 90


@pytest.mark.parametrize("side", [16, 32, 30])
def test_neutral_strengths_change_nothing(side):
    batch = images(size=side)
    every = {name: torch.full((3,), float(value)) for name, value in NEUTRAL.items()}
    for strengths in ({}, every):
        found = distort(batch, strengths)
        assert found.dtype == torch.float32
        # Pixel centres are exact where the side is a power of two, else they are rounded.
        assert (found - batch).abs().max() <= (0 if side != 30 else 2e-3)


def test_an_unknown_operation_is_named():
    with pytest.raises(ValueError, match=r"unknown operation blur: use .*rotate"):
        done("blur", 1, images())


@pytest.mark.parametrize(
    ("name", "strength", "expected"),
    [
        ("mirror", -1, lambda x: x.flip(3)),
        ("rotate", 90, lambda x: x.rot90(1, (2, 3))),
        ("rotate", -90, lambda x: x.rot90(-1, (2, 3))),
        ("rotate", 180, lambda x: x.rot90(2, (2, 3))),
        ("translate_x", 0.25, lambda x: torch.cat([x[..., :4].flip(3), x[..., :-4]], 3)),
        ("translate_y", -0.125, lambda x: torch.cat([x[:, :, 2:], x[:, :, -2:].flip(2)], 2)),
        ("zoom", 2, lambda x: nn.functional.interpolate(x, scale_factor=2, mode="bilinear")[..., 8:24, 8:24]),
    ],
)
def test_geometry_is_exact_where_pixels_meet(name, strength, expected):
    batch = images()
    assert (done(name, strength, batch) - expected(batch.float())).abs().max() < 0.01


@pytest.mark.parametrize(
    ("name", "strength", "change"),
    [
        ("rotate", 20, lambda x: x.rotate(20, Image.Resampling.BILINEAR)),
        # Pillow maps corners: the shift keeps the middle where it is.
        ("shear_x", 0.3, lambda x: x.transform(x.size, 0, (1, 0.3, -0.15 * 24, 0, 1, 0), 2)),
        ("shear_y", -0.2, lambda x: x.transform(x.size, 0, (1, 0, 0, -0.2, 1, 0.1 * 40), 2)),
    ],
)
def test_turns_and_shears_are_pillows_even_where_the_sides_differ(name, strength, change):
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(40.0), indexing="ij")
    smooth = torch.stack([127 + 100 * (x / 7).sin(), 127 + 100 * (y / 5).cos(), 3 * x + 4 * y])
    batch = smooth[None].to(torch.uint8)
    difference = (done(name, strength, batch) - with_pillow(change, batch)).abs()
    assert difference[..., 6:-6, 10:-10].max() < 1.5


def test_geometry_composes_in_the_order_of_the_table():
    """Mirrored, then turned, then shifted."""
    strengths = {"mirror": -1.0, "rotate": 90.0, "translate_x": 0.25}
    batch = images()
    found = distort(batch, {name: torch.full((3,), value) for name, value in strengths.items()})
    turned = batch.float().flip(3).rot90(1, (2, 3))
    assert (found - torch.cat([turned[..., :4].flip(3), turned[..., :-4]], 3)).abs().max() < 0.01


@settings(max_examples=20, deadline=None)
@given(st.floats(-0.9, 0.9), st.floats(0, 2))
def test_brightness_is_added_and_contrast_multiplied_each_clipped(brightness, contrast):
    batch = images()
    found = distort(
        batch, {"brightness": torch.full((3,), brightness), "contrast": torch.full((3,), contrast)}
    )
    expected = ((batch / 255 + brightness).clamp(0, 1) * contrast).clamp(0, 1) * 255
    assert (found - expected).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("name", "strength", "change", "tolerance"),
    [
        ("saturation", 0.3, lambda x: ImageEnhance.Color(x).enhance(0.3), 1.6),
        ("saturation", 1.8, lambda x: ImageEnhance.Color(x).enhance(1.8), 1.6),
        ("sharpness", 0.2, lambda x: ImageEnhance.Sharpness(x).enhance(0.2), 1.6),
        ("sharpness", 1.9, lambda x: ImageEnhance.Sharpness(x).enhance(1.9), 1.6),
        ("posterize", 4.7, lambda x: ImageOps.posterize(x, 4), 0),
        ("posterize", 7, lambda x: ImageOps.posterize(x, 7), 0),
        ("solarize", 0.5, lambda x: ImageOps.solarize(x, 128), 0),
        ("autocontrast", 1, ImageOps.autocontrast, 1.1),
        ("equalize", 1, ImageOps.equalize, 5),
    ],
)
def test_photometry_is_pillows(name, strength, change, tolerance):
    # Not the whole range, so that contrast can be gained; large, as Pillow equalizes small images coarsely.
    batch = (images(2, size=128).float() ** 2 / 400 + 40).to(torch.uint8)
    found = done(name, strength, batch)
    assert (found - with_pillow(change, batch)).abs().max() <= tolerance
    assert (found - batch).abs().max() > 5 or name == "posterize"


@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
@pytest.mark.parametrize("value", [0, 90, 255])
def test_flat_channels_stay(name, value):
    batch = torch.full((2, 3, 30, 30), value, dtype=torch.uint8)
    assert (done(name, 1, batch) - value).abs().max() <= 1


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(STRONG)), st.floats(0, 1), st.integers(0, 99))
def test_an_operation_reaches_only_the_images_that_drew_it(name, share, seed):
    low, high = STRONG[name]
    strength = torch.full((4,), float(NEUTRAL[name]))
    strength[1] = low + share * (high - low)
    batch = images(4, seed=seed)
    found = distort(batch, {name: strength})
    assert torch.equal(found[[0, 2, 3]], batch[[0, 2, 3]].float())
    assert ((found >= 0) & (found <= 255)).all()
    assert torch.isfinite(found).all()


def test_every_operation_of_a_table_is_known():
    assert set(WEAK) | set(STRONG) | set(PHOTOMETRY) <= set(NEUTRAL)


def test_erasing_blanks_part_of_an_image():
    whole = torch.zeros(20, 3, 16, 16, dtype=torch.uint8)
    torch.manual_seed(0)
    plain = View(weak_augmentation(), [0.0] * 3, [1.0] * 3)(whole)
    torch.manual_seed(0)
    erased = View(weak_augmentation(1.0), [0.0] * 3, [1.0] * 3)(whole)
    # The rest is what it was, and the blank part is the same in all channels.
    changed = erased != plain
    assert torch.equal(erased[changed], torch.full_like(erased[changed], 0.5))
    assert torch.equal(changed[:, 0], changed[:, 2])
    share = changed[:, 0].float().mean((1, 2))
    assert (share > 0.01).all()
    assert (share < 0.25).all()


def test_boxes_are_filled_and_all_else_is_kept():
    batch = images().float()
    boxes = torch.tensor([[2, 3, 7, 5], [4, 4, 4, 4], [0, 0, 16, 16]])
    expected = batch.clone()
    expected[0, :, 3:5, 2:7] = 127.5
    expected[2] = 127.5
    assert torch.equal(erase(batch, boxes), expected)


def test_erased_rectangles_have_the_stated_size_and_lie_anywhere():
    torch.manual_seed(0)
    found = Erase(0.7, area=(0.1, 0.2), ratio=2)(torch.zeros(1000, 1, 40, 60))[:, 0] > 0
    share = found.float().mean((1, 2))
    assert 630 < (share > 0).sum() < 770
    assert share[share > 0].min() == pytest.approx(0.1, abs=0.01)
    assert share.max() == pytest.approx(0.2, abs=0.01)
    height, width = found.any(2).sum(1), found.any(1).sum(1)
    assert torch.equal(height * width, found.sum((1, 2)))  # rectangles
    ratio = (height / width)[share > 0]
    assert ratio.max() == pytest.approx(2, abs=0.2)
    assert ratio.min() == pytest.approx(0.5, abs=0.05)
    reached = found.float().mean(0)
    assert min(reached[0].max(), reached[-1].max(), reached[:, 0].max(), reached[:, -1].max()) > 0
    assert (reached.flip(1) - reached).abs().max() < 0.1


@pytest.mark.parametrize("probability", [-0.1, 1.5])
def test_a_probability_of_erasing_that_is_none_is_refused(probability):
    with pytest.raises(ValueError, match="from 0 to 1"):
        weak_augmentation(probability)


def test_a_strong_view_always_has_a_blank_part_and_a_second_one_where_asked():
    torch.manual_seed(0)
    share = {
        erasing: (strong_augmentation(erasing)(torch.zeros(300, 3, 16, 16, dtype=torch.uint8)) == 127.5)
        .all(1)
        .float()
        .mean((1, 2))
        for erasing in (0.0, 1.0)
    }
    assert (share[0.0] > 0.01).all()
    assert share[1.0].mean() > 1.5 * share[0.0].mean()


def test_a_crop_shows_a_part_of_the_stated_area_from_anywhere():
    # Two channels that hold the place of each pixel tell which part is shown.
    place = torch.linspace(-1, 1, 65)[:-1] + 1 / 64
    batch = torch.stack([place.expand(64, 64), place[:, None].expand(64, 64)])[None].expand(400, -1, -1, -1)
    torch.manual_seed(0)
    found = Crop(area=(0.3, 0.5), ratio=1.5)(batch)
    # From the middle half, where reflection does not reach.
    width = 2 * (found[:, 0, :, 48] - found[:, 0, :, 16]).mean(1)
    height = 2 * (found[:, 1, 48] - found[:, 1, 16]).mean(1)
    area = (width * height).abs() / 4
    assert area.min() == pytest.approx(0.3, abs=0.01)
    assert area.max() == pytest.approx(0.5, abs=0.01)
    ratio = (width / height).abs()
    assert ratio.max() == pytest.approx(1.5, abs=0.05)
    assert ratio.min() == pytest.approx(1 / 1.5, abs=0.05)
    assert (height > 0).all()
    assert 150 < (width < 0).sum() < 250
    assert found.min() == pytest.approx(-1, abs=0.03)
    assert found.max() == pytest.approx(1, abs=0.03)
    assert 150 < (found[:, 0].mean((1, 2)) > 0).sum() < 250


def test_a_crop_of_all_is_the_image_or_its_mirror():
    torch.manual_seed(0)
    batch = images(20)
    found = Crop(area=(1, 1), ratio=1)(batch)
    same = [torch.equal(a, b.float()) for a, b in zip(found, batch, strict=True)]
    mirrored = [torch.equal(a, b.float().flip(2)) for a, b in zip(found, batch, strict=True)]
    assert all(a or b for a, b in zip(same, mirrored, strict=True))
    assert any(same)
    assert any(mirrored)


def test_a_warp_is_what_torch_makes_of_the_matrix():
    torch.manual_seed(0)
    batch, matrix = images(size=20).float(), torch.eye(2, 3) + 0.3 * torch.randn(3, 2, 3)
    grid = nn.functional.affine_grid(matrix, batch.shape, align_corners=False)
    expected = nn.functional.grid_sample(batch, grid, padding_mode="reflection", align_corners=False)
    assert (warp(batch, matrix) - expected).abs().max() < 0.01


def grey_levels(views):
    return (views * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255


def test_camera_noise_has_the_exposure_and_the_deviation_that_are_asked_for():
    views = Normalize(MEAN, STD)(torch.full((32, 3, 32, 32), 200, dtype=torch.uint8))
    torch.manual_seed(0)
    found = grey_levels(CameraNoise(1.0, MEAN, STD, exposure=(0.5, 0.5), deviation=(20, 20))(views))
    assert found.mean().item() == pytest.approx(100, abs=0.5)
    assert found.std().item() == pytest.approx(20, rel=0.02)
    assert torch.allclose(found[:, 0], found[:, 2], atol=1e-3), "the same on all channels"
    assert not torch.allclose(found[0], found[1], atol=5), "each image has its own"


def test_camera_noise_draws_strengths_from_between_the_ends():
    views = Normalize(MEAN, STD)(torch.full((400, 3, 24, 24), 120, dtype=torch.uint8))
    torch.manual_seed(0)
    found = grey_levels(CameraNoise(1.0, MEAN, STD, exposure=(0.25, 1), deviation=(0, 4))(views))
    light, deviation = found.mean((1, 2, 3)) / 120, found[:, 0].std((1, 2))
    assert 0.24 < light.min() < 0.27
    assert 0.97 < light.max() < 1.01
    assert light.log().mean().item() == pytest.approx(np.log(0.25) / 2, abs=0.06), "even in the logarithm"
    assert deviation.min() < 0.1
    assert 3.7 < deviation.max() < 4.5


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 1), st.integers(0, 99))
def test_camera_noise_stays_in_range_and_spoils_its_share(probability, seed):
    batch = Normalize(MEAN, STD)(images(300, size=6, seed=seed))
    before = batch.clone()
    torch.manual_seed(seed)
    found = CameraNoise(probability, MEAN, STD)(batch)
    assert torch.equal(batch, before), "on a copy"
    assert (grey_levels(found) > -0.01).all()
    assert (grey_levels(found) < 255.01).all()
    changed = (found != batch).flatten(1).any(1).float().mean().item()
    assert changed == pytest.approx(probability, abs=0.13)
    torch.manual_seed(seed)
    assert torch.equal(found, CameraNoise(probability, MEAN, STD)(batch)), "a seed decides it"


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_camera_noise_wants_a_probability(probability):
    with pytest.raises(ValueError, match="probability of noise"):
        CameraNoise(probability, MEAN, STD)


def test_the_next_random_number_does_not_depend_on_which_views_are_noisy():
    views, drawn = Normalize(MEAN, STD)(images(6)), []
    for probability in (0.0, 0.3, 1.0):
        torch.manual_seed(0)
        CameraNoise(probability, MEAN, STD)(views)
        drawn.append(torch.rand(()))
    assert drawn[0] == drawn[1] == drawn[2]
