"""Temporal heads and the video model: what must not matter does not; streams equal whole videos."""

import dataclasses
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import COMMON
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForVideoClassification

from modeling_fer import CLASSES, FerConfig, FerForVideoClassification
from modeling_fer.data.windows import WindowDataset, tracks
from modeling_fer.learning.timelines import postprocess, predict_frames, predict_tracks, windows_of
from modeling_fer.temporal_fer import TEMPORAL_HEADS, TemporalTransformer, rotary_angles, rotate

heads = pytest.mark.parametrize("head", TEMPORAL_HEADS)
WIDTH = COMMON["hidden_size"]


def video_model(head="transformer", causal=False, seed=0, **options):
    """A tiny model whose logits differ clearly between frames."""
    torch.manual_seed(seed)
    sizes = {
        "temporal_hidden_size": 16,
        "temporal_num_layers": 2,
        "temporal_num_heads": 2,
        "temporal_window": 5,
    }
    config = FerConfig(
        encoder_config=transformers.ViTConfig(**COMMON, intermediate_size=32),
        temporal_head=head,
        temporal_causal=causal,
        **{**sizes, **options},
    )
    model = FerForVideoClassification(config)
    for layer in model.temporal.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=0.4)
    torch.nn.init.normal_(model.classifier.weight)
    return model.eval()


def features(*shape, seed=0):
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))


# -- what attention means ---------------------------------------------------------------------------


def reference(model, x, positions):
    """The transformer head as it is defined: one frame at a time, over the frames that it may attend to."""
    head = model.temporal.head
    hidden = head.project(x)
    for layer in head.layers:
        q, k, v = (
            layer.query_key_value(layer.attention_norm(hidden)).unflatten(-1, (3, layer.heads, -1)).unbind(1)
        )
        angles = [a[0, :, 0] for a in rotary_angles(positions[None], q.shape[-1])]
        q, k = rotate(q, angles), rotate(k, angles)
        rows = []
        for i in range(len(x)):
            near = [
                j
                for j in range(len(x))
                if abs(i - j) <= layer.window
                and abs(positions[i] - positions[j]) <= layer.window + 0.5
                and not (layer.causal and j > i)
            ]
            weights = (torch.einsum("hd,jhd->hj", q[i], k[near]) / q.shape[-1] ** 0.5).softmax(-1)
            rows.append(torch.einsum("hj,jhd->hd", weights, v[near]).flatten())
        hidden = hidden + layer.attention_output(torch.stack(rows))
        hidden = hidden + layer.mlp_down(F.gelu(layer.mlp_up(layer.mlp_norm(hidden))))
    return model.classifier(head.norm(hidden))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("frames", [1, 4, 15, 16, 37])
def test_the_transformer_attends_to_frames_near_in_order_and_in_time(causal, frames):
    model = video_model(causal=causal)
    x = features(frames)
    # Frames follow one another, but for a few that lack, a gap longer than the window, and some that crowd.
    steps = torch.ones(frames)
    steps[3::4] = 2.0
    steps[frames // 2] = 9.0
    steps[frames // 3 : frames // 3 + 3] = 0.25
    positions = steps.double().cumsum(0)
    with torch.no_grad():
        found = model(frame_features=x[None], frame_times=positions[None] / model.config.frame_rate)
        assert torch.allclose(found.frame_logits[0], reference(model, x, positions), atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("frames", [12, 37])  # one block, and several
def test_half_precision_says_what_full_precision_does(causal, frames):
    model, x = video_model(causal=causal), features(2, frames)
    mask = torch.arange(frames) % 5 > 0  # some are absent
    mask = torch.stack([mask, mask.flip(0)])
    whole = model(frame_features=x, frame_mask=mask).frame_logits
    with torch.autocast("cpu", torch.bfloat16):
        half = model(frame_features=x, frame_mask=mask).frame_logits
        half.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.temporal.parameters())
    scale = whole.abs().max()
    assert (half.float() - whole).abs().max() < 0.05 * scale
    with torch.no_grad():
        model = model.to(torch.bfloat16)
        stored = model(frame_features=x.bfloat16(), frame_mask=mask).frame_logits
        assert (stored.float() - whole).abs().max() < 0.05 * scale
        if causal:
            stream = model.init_stream(batch_size=2)
            parts = []
            for piece in x.bfloat16().split(8, dim=1):
                logits, _, stream = model.step(piece, stream)
                parts.append(logits)
            follows = model(frame_features=x.bfloat16()).frame_logits
            assert (torch.cat(parts, 1).float() - follows.float()).abs().max() < 0.05 * scale


def test_rotary_products_depend_on_the_distance_alone_even_after_hours():
    q, k = features(1, 1, 1), features(1, 1, 1, seed=1)

    def product(a, b):
        first, second = (rotary_angles(torch.tensor([[p]], dtype=torch.float64), WIDTH) for p in (a, b))
        return (rotate(q, first) * rotate(k, second)).sum()

    assert torch.allclose(product(3.0, 10.5), product(1e6, 1e6 + 7.5), atol=1e-5)
    assert not torch.allclose(product(3.0, 10.5), product(3.0, 11.5), atol=1e-3)


@heads
@pytest.mark.parametrize("causal", [False, True])
def test_a_frame_is_changed_by_frames_in_its_view_and_by_no_others(head, causal):
    model = video_model(head, causal)
    view = {"transformer": 10, "convolution": 6 if causal else 3, "none": 0}[head]
    x = features(1, 40).requires_grad_()
    model(frame_features=x).frame_logits[0, 20].sum().backward()
    seen = (x.grad[0].abs().sum(-1) > 0).nonzero().flatten()
    assert seen.min() == 20 - view
    assert seen.max() == (20 if causal else 20 + view)


# -- what must not matter ---------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    head=st.sampled_from(sorted(TEMPORAL_HEADS)),
    causal=st.booleans(),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    spare=st.integers(0, 20),
    seed=st.integers(0, 99),
)
def test_padding_masking_and_the_batch_change_no_valid_frame(head, causal, lengths, spare, seed):
    """Videos with absent frames strewn in, padded, side by side: each as if alone and without them."""
    model = video_model(head, causal)
    rng = np.random.default_rng(seed)
    slots = max(lengths) + spare
    mask = torch.zeros(len(lengths), slots, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, np.sort(rng.permutation(slots)[:length])] = True
    x = features(len(lengths), slots, seed=seed).masked_fill(
        ~mask[..., None], float(rng.choice([np.nan, 1e9]))
    )
    times = torch.from_numpy(np.sort(rng.uniform(0, 2, mask.shape), axis=1))
    times = times.masked_fill(~mask, float(rng.choice([np.nan, -np.inf, 7.0])))
    with torch.no_grad():
        together = model(frame_features=x, frame_mask=mask, frame_times=times)
        assert (together.frame_logits[~mask] == 0).all()
        for row in range(len(lengths)):
            here = mask[row]
            alone = model(frame_features=x[row, here][None], frame_times=times[row, here][None])
            assert torch.allclose(together.frame_logits[row, here], alone.frame_logits[0], atol=1e-4)
            assert torch.allclose(together.logits[row], alone.frame_logits[0].mean(0), atol=1e-4)


@heads
def test_the_loss_counts_labelled_frames_that_are_there(head):
    model = video_model(head)
    x, mask = features(2, 12), torch.ones(2, 12, dtype=torch.bool)
    mask[1, 5:] = False
    labels = torch.randint(0, 8, (2, 12), generator=torch.Generator().manual_seed(1))
    labels[0, :4] = -1
    output = model(frame_features=x, frame_mask=mask, labels=labels)
    counted = mask & (labels >= 0)
    expected = F.cross_entropy(output.frame_logits[counted], labels[counted])
    assert torch.allclose(output.loss, expected)
    assert model(frame_features=x, frame_mask=mask, labels=torch.full((2, 12), -1)).loss == 0
    output.loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if not name.startswith("fer.")}


def test_pixels_are_their_features_and_one_video_needs_no_batch():
    model = video_model()
    pixels = torch.randn(2, 7, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(pixel_values=pixels).frame_logits
        encoded = torch.stack([model.fer(video).pooler_output for video in pixels])
        assert torch.allclose(found, model(frame_features=encoded).frame_logits, atol=1e-6)
        assert torch.allclose(found[:1], model(pixel_values=pixels[0]).frame_logits, atol=1e-5)


# -- streams ----------------------------------------------------------------------------------------


@heads
@settings(max_examples=15, deadline=None)
@given(chunks=st.lists(st.integers(1, 13), min_size=1, max_size=8), seed=st.integers(0, 9))
def test_a_stream_in_pieces_of_any_size_equals_the_whole_video(head, chunks, seed):
    model = video_model(head, causal=True)
    frames = sum(chunks)
    x = features(2, frames, seed=seed)
    times = torch.rand(2, frames, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).cumsum(
        1
    )
    with torch.no_grad():
        whole = model(frame_features=x, frame_times=times).frame_logits
        stream, parts, start = model.init_stream(2), [], 0
        for size in chunks:
            places = slice(start, start + size)
            logits, probabilities, stream = model.step(x[:, places], stream, times[:, places])
            assert torch.allclose(probabilities, logits.softmax(-1), atol=1e-6)
            parts.append(logits)
            start += size
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


@heads
def test_frames_that_are_absent_from_a_stream_are_as_if_they_had_not_been(head):
    model = video_model(head, causal=True)
    temporal = model.temporal
    x, mask = features(2, 30), torch.rand(2, 30, generator=torch.Generator().manual_seed(0)) > 0.4
    positions = torch.arange(30, dtype=torch.float64).expand(2, 30)
    with torch.no_grad():
        whole, state, parts = temporal(x, mask, positions), temporal.start(2, x), []
        for places in (slice(0, 1), slice(1, 2), slice(2, 11), slice(11, 29), slice(29, 30)):
            found, state = temporal.extend(x[:, places], state, positions[:, places], mask[:, places])
            parts.append(found)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


def test_a_stream_remembers_no_more_the_longer_it_runs():
    model = video_model(causal=True, postprocess={"smoothing": "box", "half_width": 3})
    stream = model.init_stream(1)

    def size(stream):
        tensors = [t for layer in stream.temporal.past for t in layer]
        tensors += [stream.temporal.positions, stream.temporal.valid, stream.postprocess.probabilities]
        return sum(t.numel() for t in tensors)

    before = size(stream)
    for i in range(40):
        logits, probabilities, stream = model.step(features(1, seed=i), stream)
        assert size(stream) == before
        assert all(t.grad_fn is None for layer in stream.temporal.past for t in layer), (
            "no history hangs on it"
        )
    assert logits.shape == probabilities.shape == (1, 8)
    assert not torch.allclose(probabilities, logits.softmax(-1))


def tensors_in(state):
    """All tensors of a stream's state, however deep they lie."""
    if isinstance(state, torch.Tensor):
        return [state]
    if dataclasses.is_dataclass(state):
        state = [getattr(state, field.name) for field in dataclasses.fields(state)]
    return [t for part in state for t in tensors_in(part)] if isinstance(state, list | tuple) else []


@pytest.fixture
def _one_thread():
    """Threads that wait for one another spoil tests of many small steps, where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell")
def test_a_long_stream_takes_no_more_memory():
    """Neither its state nor the process: one state is 66 kB, so that keeping them all would show."""
    sizes = {"temporal_hidden_size": 64, "temporal_window": 64}
    post = {"smoothing": "gaussian", "half_width": 8, "temperature": 1.5, "bias": [0.1] * 8}
    model = video_model(causal=True, postprocess=post, **sizes)
    x, stream, told = features(1_000).repeat(2, 1), model.init_stream(), {}
    for number in range(1, 2_001):
        _, _, stream = model.step(x[None, number - 1], stream)
        if number in (200, 2_000):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            state = sum(t.untyped_storage().nbytes() for t in tensors_in(stream))
            told[number] = state, pages * resource.getpagesize()
    assert told[200][0] == told[2_000][0] > 66_000
    assert told[2_000][1] - told[200][1] < 16 * 2**20


def test_only_causal_models_follow_streams():
    with pytest.raises(ValueError, match="a stream needs one trained with temporal_causal=True"):
        video_model().init_stream()


def test_a_stream_keeps_the_post_processing_that_it_began_with():
    """Built and checked once, not for every frame."""
    model = video_model(causal=True, postprocess={"temperature": 2.0})
    stream = model.init_stream()
    model.config.postprocess = {"smoothing": "nonsense"}
    for i in range(3):
        logits, probabilities, stream = model.step(features(1, seed=i), stream)
        assert torch.allclose(probabilities, (logits / 2).softmax(-1), atol=1e-6)


@heads
@pytest.mark.parametrize("times", [[[3.0], [3.0]], [[3.0], [2.9]], [[1.0, 1.0]], [[1.0, 0.5]]])
def test_times_of_a_stream_that_do_not_rise_are_an_error(head, times):
    """From call to call as within one; a first time may be any."""
    model = video_model(head, causal=True)
    for *before, last in ([*times], [[-9.0], *times], [[0.1], [float("nan")]], [[float("inf")]]):
        stream = model.init_stream(2)
        for own in before:
            _, _, stream = model.step(features(2, len(own)), stream, torch.tensor([own, own]).double())
        wrong = torch.tensor([[t + 99 for t in last], last]).double()  # of one stream of the two
        with pytest.raises(ValueError, match=r"frame_times must be numbers that rise, .* got"):
            model.step(features(2, len(last)), stream, wrong)
        if len(last) == 1:
            with pytest.raises(ValueError, match="frame_times must be numbers that rise"):
                model.step(features(2), stream, wrong[:, 0])


def test_times_before_zero_and_none_at_all_go_on_from_the_last():
    model = video_model(causal=True)
    x, rate = features(1, 6), model.config.frame_rate
    times = torch.tensor([[-5.0, -4.0, -3.0, -2.0, -1.0, 0.0]]).double() / rate
    whole = model(frame_features=x, frame_times=times).frame_logits
    stream, parts = model.init_stream(), []
    for places, own in ((slice(0, 2), times[:, :2]), (slice(2, 5), times[:, 2:5]), (slice(5, 6), None)):
        logits, _, stream = model.step(x[:, places], stream, own)
        parts.append(logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


def test_streams_are_followed_without_dropout():
    model = video_model(causal=True, temporal_dropout=0.5, classifier_dropout=0.5)
    stream = model.init_stream()
    with pytest.raises(ValueError, match=r"in evaluation mode: call model\.eval\(\) first"):
        model.train().step(features(1), stream)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("frames", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_long_stream_of_the_default_head_equals_the_whole_video(frames):
    torch.manual_seed(0)
    model = FerForVideoClassification(FerConfig(temporal_causal=True)).eval()
    x = torch.randn(1, frames, 192)
    with torch.inference_mode():
        whole = model(frame_features=x).frame_logits
        stream, parts = model.init_stream(), []
        for i in range(frames):
            logits, _, stream = model.step(x[:, i], stream)
            parts.append(logits)
    assert torch.allclose(torch.stack(parts, 1), whole, atol=1e-5)


# -- videos of any length ---------------------------------------------------------------------------


@heads
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 16, 17, 100, 1100])
def test_long_videos_are_predicted_piece_by_piece(head, causal, frames):
    """Causal heads and those of short reach give what one pass over the whole video gives."""
    model = video_model(head, causal, num_frames=16)
    x = features(frames)
    positions = np.cumsum(np.random.default_rng(0).integers(1, 3, frames))
    found = predict_frames(model, x.numpy().astype(np.float16), positions)
    times = torch.from_numpy(positions / model.config.frame_rate)[None]
    with torch.no_grad():
        whole = model(frame_features=x.half().float()[None], frame_times=times).frame_logits[0].numpy()
    assert found.shape == (frames, 8)
    if causal or head == "none" or positions[-1] - positions[0] < 16:
        assert np.allclose(found, whole, atol=1e-4)
    else:  # windows see less than the whole, at their ends
        assert np.abs(found - whole).mean() < np.abs(whole).mean()


def test_windows_are_averaged_with_weights_that_fall_towards_their_ends():
    model = video_model(num_frames=8)
    x, positions = features(12), np.arange(12)
    with torch.no_grad():
        a, b = (model(frame_features=x[None, s : s + 8]).frame_logits[0].numpy() for s in (0, 4))
    ramp = np.array([1, 2, 3, 4, 4, 3, 2, 1.0])[:, None]
    expected = np.concatenate([a[:4], (a[4:] * ramp[4:] + b[:4] * ramp[:4]) / (ramp[4:] + ramp[:4]), b[4:]])
    assert np.allclose(predict_frames(model, x.numpy(), positions), expected, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(steps=st.lists(st.integers(1, 40), min_size=0, max_size=60), span=st.integers(1, 20))
def test_windows_cover_every_frame_and_hold_no_more_than_their_span(steps, span):
    """Also where frames are far apart; where they follow one another, windows are half over the next."""
    positions = np.cumsum([5.0, *steps])
    windows = list(windows_of(positions, span))
    covered = np.zeros(len(positions), bool)
    for start, places in windows:
        own = positions[places]
        assert len(own)
        assert own[0] >= start
        assert own[-1] < start + span
        covered[places] = True
    assert covered.all()
    dense = [start for start, _ in windows_of(np.arange(50.0), 16)]
    assert dense == [0, 8, 16, 24, 32, 34]


def test_frames_far_apart_are_seen_at_the_distances_of_training():
    """Every fifth frame: a window holds those within its span, not as many as it has places."""
    model = video_model(num_frames=16)
    x, positions = features(40), np.arange(0, 200, 5)
    with torch.no_grad():
        times = torch.from_numpy(positions[:4] / model.config.frame_rate)[None]
        first = model(frame_features=x[None, :4], frame_times=times).frame_logits[0].numpy()
    assert np.allclose(predict_frames(model, x.numpy(), positions)[0], first[0], atol=1e-5)


def test_times_of_whole_frames_are_whole_positions():
    """Seconds of 30 frames and 15,360 ticks a second, times 30, are off by an ulp here and there."""
    model, x = video_model(num_frames=16), features(2_000).numpy()
    positions = np.arange(2_000) * 512 / 15_360 * 30
    whole = np.arange(2_000)
    assert (positions != whole).any()
    assert np.allclose(positions, whole, rtol=0, atol=1e-9)
    assert np.array_equal(predict_frames(model, x, positions), predict_frames(model, x, whole))


class Counted:
    """Features that note how many are read at once, and in all."""

    def __init__(self, values):
        self.values, self.shape, self.dtype, self.read = values, values.shape, values.dtype, []

    def __getitem__(self, rows):
        found = self.values[rows]
        self.read.append(len(found))
        return found


@pytest.mark.parametrize("causal", [False, True])
def test_features_of_a_video_are_read_as_they_are_needed_and_once(causal):
    """Of rows in any order; what two windows share is read a second time only where batches of them meet."""
    model = video_model(causal=causal, num_frames=16)
    rows = np.random.default_rng(0).permutation(3_000)
    numbers = np.arange(2_000)
    where = tracks(["a"] * 2_000 + ["b"] * 1_000, [*numbers, *numbers[:1_000]], np.full(3_000, -1), "here")
    found = [dataclasses.replace(track, rows=rows[track.rows]) for track in where]
    x = Counted(features(3_000).numpy())
    logits = predict_tracks(model, x, found)
    for track, own in zip(found, logits, strict=True):
        assert np.array_equal(own, predict_frames(model, x.values[track.rows], track.frames))
    assert max(x.read) <= (512 if causal else 16 + 31 * 8)
    assert 3_000 <= sum(x.read) <= 3_000 * 1.05


@pytest.mark.usefixtures("_one_thread")
def test_a_video_of_a_hundred_thousand_frames():
    """Cut into windows, predicted and post-processed; in its midst a gap of 20 seconds."""
    frames = 100_000
    post = {"smoothing": "gaussian", "half_width": 8, "temperature": 1.5, "bias": [0.1] * 8}
    sizes = {"temporal_hidden_size": 8, "temporal_num_layers": 1, "temporal_window": 4, "num_frames": 64}
    model = video_model(postprocess=post, **sizes)
    x = features(frames).numpy().astype(np.float16)
    numbers = np.arange(1, frames + 1) + 600 * (np.arange(frames) >= frames // 2)
    found = tracks(["long"] * frames, numbers, numbers // 500 % 9 - 1, "here")
    windows = WindowDataset(x, found, CLASSES, slots=127, longest=32)
    batch = windows.__getitems__([0, len(windows) - 1])
    assert batch["values"].shape == (2, 127, WIDTH)
    anchor = np.flatnonzero(numbers == windows.pieces.anchor[-1])[0]
    assert np.array_equal(batch["values"][1][63], x[anchor])

    (logits,) = predict_tracks(model, x, found)
    probabilities = postprocess(model, logits, numbers)
    assert probabilities.shape == (frames, 8)
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)
    for start in (0, 30_016, 49_900, 99_700):  # as if these frames were all, but for the neighbours outside
        part, inner = slice(start, start + 300), slice(start and 60, 300 if start == 99_700 else 230)
        own = predict_frames(model, x[part], numbers[part])
        if start % 32 == 0:  # windows lie as in the whole video
            assert np.allclose(logits[part][inner], own[inner], atol=1e-5)
        smoothed = postprocess(model, logits[part], numbers[part])
        assert np.allclose(probabilities[part][inner], smoothed[inner], atol=1e-6)


def test_frames_out_of_order_are_an_error():
    model = video_model()
    for positions in ([], [1, 1], [3, 2]):
        with pytest.raises(ValueError, match="positions that rise"):
            predict_frames(model, features(len(positions)).numpy(), np.array(positions))


# -- configuration and files ------------------------------------------------------------------------


@heads
def test_a_saved_copy_is_the_same_and_its_features_load_alone(head, tmp_path):
    model = video_model(head)
    model.save_pretrained(tmp_path)
    x, pixels = features(1, 9), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        loaded = AutoModelForVideoClassification.from_pretrained(tmp_path)
        assert torch.equal(loaded(frame_features=x).frame_logits, model(frame_features=x).frame_logits)
        encoder = AutoModel.from_pretrained(tmp_path)
        assert torch.equal(encoder(pixels).pooler_output, model.fer(pixels).pooler_output)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModelForVideoClassification"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temporal_head": "lstm"}, "temporal_head must be one of transformer, convolution, none"),
        ({"temporal_hidden_size": 30, "temporal_num_heads": 4}, "must divide by twice temporal_num_heads 4"),
        ({"temporal_window": 0}, "temporal_window must be above 0"),
        ({"frame_rate": -1.0}, "frame_rate must be above 0"),
    ],
)
def test_configurations_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        FerConfig(**options)


def test_inputs_that_do_not_fit():
    model = video_model()
    with pytest.raises(ValueError, match="videos need at least one frame"):
        model(frame_features=features(2, 0))
    with pytest.raises(ValueError, match="either pixel_values or frame_features"):
        model()
    with pytest.raises(ValueError, match=r"labels must be of shape \(1, 3\), got \(3,\)"):
        model(frame_features=features(1, 3), labels=torch.zeros(3, dtype=torch.long))


def test_the_heads_have_the_sizes_of_the_configuration():
    head = video_model(temporal_num_layers=3, temporal_hidden_size=32).temporal.head
    assert isinstance(head, TemporalTransformer)
    assert (len(head.layers), head.width) == (3, 32)
