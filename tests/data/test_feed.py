import io

import numpy as np
import pytest
import torch
from test_stream import SIZE, numbers, write

from modeling_fer.data.dataset import FaceDataset
from modeling_fer.data.feed import Pool, Streamed, joined
from modeling_fer.data.sampling import DebiasFeedbackSampler
from modeling_fer.data.stream import FaceStream
from modeling_fer.labels import CLASSES

CPU = torch.device("cpu")


def pool(faces=20, batch_size=8, rank=0, world_size=1, seed=0, round_batches=0):
    """Faces whose pixels are their numbers."""
    pixels = np.broadcast_to(np.arange(faces, dtype=np.uint8)[:, None, None, None], (faces, 3, 2, 2)).copy()
    dataset = FaceDataset(pixels, np.arange(faces) % 2)
    order = DebiasFeedbackSampler(
        dataset.labels, 2, batch_size, 1.0, seed, rank, world_size, round_batches=round_batches
    )
    return Pool(dataset, order)


def take(feed, steps, microbatches=1):
    """Face numbers by step, as the loop draws them: it notes a step when all its parts are used."""
    batches, found = feed.batches(microbatches), []
    for _ in range(steps):
        parts = [next(batches) for _ in range(microbatches)]
        found.append([part["index"].tolist() for part in parts])
        feed.advance()
    return found


def test_batches_are_the_samplers_order_round_after_round():
    feed, alone = pool(round_batches=2), pool(round_batches=2).sampler
    expected = []
    for _ in range(3):
        expected.append(list(alone))
        for _ in range(2):
            alone.advance()
    assert np.ravel(take(feed, 6)).tolist() == np.ravel(expected).tolist()
    batch = next(pool().batches())
    assert batch["pixels"][:, 0, 0, 0].tolist() == batch["index"].tolist()
    assert batch["labels"].tolist() == (batch["index"] % 2).tolist()


def test_microbatches_are_parts_of_the_same_batches():
    assert [[i for part in parts for i in part] for parts in take(pool(), 5, 4)] == [
        parts[0] for parts in take(pool(), 5)
    ]
    assert [len(part) for part in take(pool(), 1, 4)[0]] == [2] * 4


def test_processes_share_each_batch():
    whole = take(pool(), 5)
    halves = [take(pool(rank=rank, world_size=2), 5, 2) for rank in range(2)]
    for (batch,), *parts in zip(whole, *halves, strict=True):
        assert sorted(batch) == sorted(i for half in parts for part in half for i in part)


def test_new_class_weights_count_from_the_next_round():
    feed = pool(round_batches=2)
    batches, shares = feed.batches(), []
    for weights in ([3, 1], [1, 1], [1, 1]):
        labels = []
        for _ in range(2):
            labels += next(batches)["labels"].tolist()
            ended = feed.advance()
        assert ended
        feed.sampler.set_class_weights(weights)
        shares.append(labels.count(1) / len(labels))
    assert shares == [0.5, 0.25, 0.5]


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_pool_resumes(stop):
    whole, first, second = take(pool(round_batches=2), 6), pool(round_batches=2), pool(round_batches=2)
    head = take(first, stop)
    second.load_state_dict(first.state_dict())
    assert head + take(second, 6 - stop) == whole


def streamed(folder, batch_size=4, seed=3, classes=CLASSES):
    return Streamed(str(folder), SIZE, batch_size, seed, 0, 1, classes)


def test_a_stream_gives_what_it_reads_in_the_models_classes(tmp_path):
    folder = write(tmp_path / "shards", [9, 9])
    order = list(reversed(CLASSES[2:]))
    ours = streamed(folder, classes=order).batches()
    plain = FaceStream(folder, SIZE, 4, 3)
    for _ in range(5):
        a, b = next(ours), next(plain)
        assert numbers(a) == numbers(b)
        names = [CLASSES[label] if label >= 0 else None for label in b["labels"].tolist()]
        assert a["labels"].tolist() == [order.index(name) if name in order else -1 for name in names]
    plain.close()


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_stream_resumes_after_the_last_step(tmp_path, microbatches):
    folder = write(tmp_path / "shards", [9, 9, 5])
    first, second, whole = (streamed(folder) for _ in range(3))
    expected = take(whole, 9, microbatches)
    assert first.state_dict() == {}, "nothing was read yet"
    head = take(first, 4, microbatches)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    second.load_state_dict(saved)
    assert second.state_dict() == saved
    assert head + take(second, 5, microbatches) == expected
    assert first.advance() is False, "it makes no rounds"


def test_a_fresh_streams_state_is_a_fresh_start(tmp_path):
    folder = write(tmp_path / "shards", [9])
    second = streamed(folder)
    second.load_state_dict(streamed(folder).state_dict())
    assert take(second, 2) == take(streamed(folder), 2)


def test_labelled_and_unlabelled_come_side_by_side():
    labelled, unlabelled = pool(seed=1), pool(faces=40, batch_size=16, seed=2)
    alone = pool(seed=1), pool(faces=40, batch_size=16, seed=2)
    stream = joined(labelled, unlabelled, 2, CPU)
    parts = [feed.batches(2) for feed in alone]
    for _ in range(2):
        batch = next(stream)
        plain, other = (next(batches) for batches in parts)
        assert set(batch) == set(plain) | {f"unlabelled_{name}" for name in other}
        assert all(torch.equal(batch[name], plain[name]) for name in plain)
        assert all(torch.equal(batch[f"unlabelled_{name}"], other[name]) for name in other)
        assert (len(batch["index"]), len(batch["unlabelled_index"])) == (4, 8)
    assert set(next(joined(pool(), None, 1, CPU))) == {"pixels", "labels", "targets", "index"}
