import io
import os
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from transformers import ViTImageProcessor

from modeling_fer.data import pixels
from modeling_fer.data.pixels import UnreadableImageError, decode, decode_split, open_image


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def noise(mode, width, height, seed=0):
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(values.squeeze(-1) if bands == 1 else values)


def split_of(images, folder):
    """A data set as `prepare` leaves it: read back from a parquet file."""
    features = Features({"image": ImageFeature(), "source": Value("string")})
    rows = {"image": [{"bytes": image, "path": None} for image in images], "source": ["x"] * len(images)}
    path = folder / "train.parquet"
    Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(folder / "hf"))


@pytest.mark.parametrize("size", [16, 48, 64])
@pytest.mark.parametrize(("width", "height"), [(48, 48), (31, 57), (64, 64), (100, 20)])
def test_pixels_are_those_of_the_stock_processor(size, width, height):
    processor = ViTImageProcessor(
        size={"height": size, "width": size}, resample=2, do_rescale=False, do_normalize=False
    )
    image = noise("RGB", width, height, seed=width + size)
    expected = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
    np.testing.assert_array_equal(decode(encoded(image), size), expected)
    np.testing.assert_array_equal(decode(image, size), expected)


def test_grey_images_become_three_equal_channels():
    image = noise("L", 8, 8)
    found = decode(encoded(image), 8)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.stack([np.asarray(image)] * 3))


def test_rotated_photographs_are_turned_upright_as_datasets_does(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees to the right
    data = encoded(noise("RGB", 12, 8), exif=exif)
    upright = np.asarray(split_of([data], tmp_path)[0]["image"].convert("RGB").resize((8, 8), 2))
    np.testing.assert_array_equal(decode(data, 8), upright.transpose(2, 0, 1))


def test_a_split_is_decoded_in_order_and_found_again(tmp_path, monkeypatch):
    images = [noise("L", 10, 10, seed) for seed in range(600)]  # more than two batches
    dataset = split_of([encoded(image) for image in images], tmp_path)
    expected = np.stack([decode(image, 8) for image in images])
    np.testing.assert_array_equal(decode_split(dataset, 8, show_progress=False), expected)

    cached = decode_split(dataset, 8, tmp_path / "cache", show_progress=False)
    assert isinstance(cached, np.memmap)
    assert not cached.flags.writeable
    np.testing.assert_array_equal(cached, expected)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npy"]

    monkeypatch.setattr(pixels, "decode", None)  # the second time nothing is decoded
    np.testing.assert_array_equal(decode_split(dataset, 8, tmp_path / "cache", show_progress=False), expected)


def test_another_size_and_other_rows_have_their_own_arrays(tmp_path):
    images = [noise("L", 10, 10, seed) for seed in range(5)]
    dataset = split_of([encoded(image) for image in images], tmp_path)
    cache = tmp_path / "cache"
    assert decode_split(dataset, 8, cache, False).shape == (5, 3, 8, 8)
    assert decode_split(dataset, 12, cache, False).shape == (5, 3, 12, 12)
    some = decode_split(dataset.select([4, 2]), 8, cache, False)
    np.testing.assert_array_equal(some, np.stack([decode(images[i], 8) for i in (4, 2)]))
    assert decode_split(dataset.select([]), 8, cache, False).shape == (0, 3, 8, 8)


def test_runs_that_start_together_leave_one_whole_file(tmp_path):
    images = [noise("L", 10, 10, seed) for seed in range(300)]
    dataset = split_of([encoded(image) for image in images], tmp_path)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: decode_split(dataset, 8, tmp_path / "cache", False), range(4)))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    for array in found:
        np.testing.assert_array_equal(array, np.stack([decode(image, 8) for image in images]))


@pytest.mark.slow
def test_another_process_finds_the_array_again(tmp_path):
    dataset = split_of([encoded(noise("L", 10, 10, seed)) for seed in range(3)], tmp_path)
    decode_split(dataset, 8, tmp_path / "cache", False)
    script = (
        "import sys; from datasets import load_dataset; from modeling_fer.data.pixels import decode_split\n"
        "parquet, hf, cache = sys.argv[1:]\n"
        "dataset = load_dataset('parquet', data_files=parquet, split='train', cache_dir=hf)\n"
        "decode_split(dataset, 8, cache, False)"
    )
    folders = [str(tmp_path / name) for name in ("train.parquet", "hf", "cache")]
    subprocess.run([sys.executable, "-c", script, *folders], check=True, cwd=Path(__file__).parents[2])
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_damaged_image_is_named_by_its_row_and_leaves_no_file(tmp_path):
    good = encoded(noise("L", 10, 10))
    dataset = split_of([good] * 300 + [good[:60]] + [good], tmp_path)
    with pytest.raises(ValueError, match=r"row 300: .*prepare the data again"):
        decode_split(dataset, 8, tmp_path / "cache", False)
    assert os.listdir(tmp_path / "cache") == []


def with_exif():
    """Camera data of several kinds, each of which PIL reads by code of its own."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    exif.get_ifd(0x8769).update({0x9003: "2020:01:01 00:00:00", 0x829A: 0.01})
    return exif


KINDS = {
    "jpeg": lambda image: encoded(image, "JPEG", exif=with_exif()),
    "png": lambda image: encoded(image, "PNG", exif=with_exif()),
    "bmp": lambda image: encoded(image, "BMP"),
    "webp": lambda image: encoded(image, "WEBP", exif=with_exif()),
    "tiff": lambda image: encoded(image, "TIFF"),
    "packed tiff": lambda image: encoded(image, "TIFF", compression="tiff_lzw"),
}


def damage(data, rng):
    """Set a few bytes to others, mostly where the structure or the camera data lie, and cut some off."""
    values = np.frombuffer(data, np.uint8).copy()
    camera = max(data.find(b"MM\0*"), data.find(b"II*\0"), 0)
    start, reach = ((0, len(values)), (0, 200), (camera, 120), (camera, 120))[rng.integers(4)]
    places = rng.integers(start, min(start + reach, len(values)), rng.integers(1, 5))
    values[places] = rng.integers(0, 256, len(places))
    length = len(values) if rng.random() < 0.9 else rng.integers(0, len(values))
    return values.tobytes()[:length]


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL tells of damage that it works around
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_images_are_read_or_raise_one_kind_of_error(kind, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # no damaged size takes long to read
    data = KINDS[kind](noise("RGB", 8, 6))
    outcomes = set()
    for seed in range(1000):
        try:
            outcomes.add(open_image(damage(data, np.random.default_rng(seed))).mode)
        except UnreadableImageError:
            outcomes.add("unreadable")
    assert outcomes == {"RGB", "unreadable"}


@pytest.mark.parametrize("kind", [KeyError, TypeError, ZeroDivisionError, struct.error, zlib.error, EOFError])
def test_whatever_goes_wrong_inside_pil_is_told_with_its_reason(kind, monkeypatch):
    def fail(_):
        raise kind("the reason")

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    with pytest.raises(UnreadableImageError, match="the reason") as caught:
        open_image(encoded(noise("RGB", 4, 4)))
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value.__cause__, kind)


def test_what_is_no_image_is_told_without_memory_addresses():
    with pytest.raises(UnreadableImageError, match=r"no image of a known format$"):
        open_image(b"<html>")
