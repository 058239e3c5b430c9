import json

import numpy as np
import pytest
import scipy.ndimage
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_fer import postprocess_fer
from modeling_fer.postprocess_fer import SMOOTHINGS, PostProcess

BIAS = (0.5, -1.0, 0.0, 2.0)


@st.composite
def cases(draw, causal=None):
    """Settings, logits (B, T, 4), mask and positions with gaps."""
    post = PostProcess(
        smoothing=draw(st.sampled_from(sorted(SMOOTHINGS))),
        half_width=draw(st.integers(0, 6)),
        temperature=draw(st.sampled_from([0.5, 1.0, 2.5])),
        bias=draw(st.sampled_from([None, BIAS])),
        causal=draw(st.booleans()) if causal is None else causal,
    )
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 30)))
    rng = np.random.default_rng([31, draw(st.integers(0, 10**6))])
    logits = torch.from_numpy(rng.normal(0, 3, (*shape, 4)).astype(np.float32))
    mask = torch.from_numpy(rng.random(shape) < draw(st.sampled_from([0.3, 0.8, 1.0])))
    steps = rng.choice([1.0, 1.0, 1.0, 0.9, 2.0, 3.0, 50.0], shape)
    return post, logits, mask, torch.from_numpy(steps.cumsum(1))


def slowly(post, logits, mask, positions):
    """The rule as it is written down, frame by frame in float64."""
    found = np.zeros(logits.shape)
    soft = scipy.special.softmax(logits.double().numpy() / post.temperature, -1)
    for b, video in enumerate(soft):
        present = np.flatnonzero(mask[b])
        for rank, t in enumerate(present):
            first, last = rank - post.half_width, rank + (0 if post.causal else post.half_width)
            ranks = [r for r in range(max(first, 0), last + 1) if r < len(present)]
            distance = np.array([abs(float(positions[b, present[r]] - positions[b, t])) for r in ranks])
            near = distance <= post.half_width + 0.5
            rows, distance = video[present[ranks]][near], distance[near]
            if post.smoothing == "none" or post.half_width == 0:
                p = video[t]
            elif post.smoothing == "median":
                p = np.sort(rows, 0)[(len(rows) - 1) // 2]
            else:
                sigma = post.half_width / 2 if post.smoothing == "gaussian" else np.inf
                p = np.exp(-(distance**2) / (2 * sigma**2)) @ rows
            odds = p * np.exp(post.bias or 0.0)
            found[b, t] = odds / odds.sum()
    return found


@settings(max_examples=80, deadline=None)
@given(case=cases())
def test_it_equals_the_rule_written_out_frame_by_frame(case):
    post, logits, mask, positions = case
    got = post(logits, mask, positions)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, slowly(post, logits, mask, positions), atol=2e-6)
    np.testing.assert_allclose(got.sum(-1), mask.float(), atol=1e-5)


@pytest.mark.parametrize("half_width", [1, 4, 16])
@pytest.mark.parametrize("smoothing", ["box", "gaussian", "median"])
def test_whole_videos_equal_scipy(smoothing, half_width):
    rng = np.random.default_rng([32, half_width])
    logits = rng.normal(0, 2, (90, 5))
    p = scipy.special.softmax(logits, -1)
    size = 2 * half_width + 1
    filters = {
        "box": lambda x: scipy.ndimage.uniform_filter1d(x, size, axis=0, mode="constant"),
        "gaussian": lambda x: scipy.ndimage.gaussian_filter1d(
            x, half_width / 2, axis=0, mode="constant", radius=half_width
        ),
        "median": lambda x: scipy.ndimage.median_filter(x, (size, 1), mode="nearest"),
    }
    expected = filters[smoothing](p)
    expected /= expected.sum(1, keepdims=True)  # at the ends, too: outside there are zeros
    got = PostProcess(smoothing, half_width)(torch.from_numpy(logits)[None])[0]
    # scipy's median has no rule for fewer neighbours: there, compare what is whole.
    whole = slice(half_width, -half_width) if smoothing == "median" else slice(None)
    np.testing.assert_allclose(got[whole], expected[whole], atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(case=cases(), extra=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_absent_frames_padding_and_other_videos_change_nothing(case, extra, seed):
    post, logits, mask, positions = case
    expected = post(logits, mask, positions)
    rng = np.random.default_rng([33, seed])
    for b in range(len(logits)):
        # Alone, with rubbish inserted where there is no frame: the rows of the frames that are there stay.
        keep = torch.from_numpy(np.sort(rng.permutation(logits.shape[1] + extra)[: logits.shape[1]]))
        rubbish = torch.full((1, logits.shape[1] + extra, 4), torch.nan)
        rubbish[0, keep] = logits[b].masked_fill(~mask[b, :, None], torch.inf)
        there = torch.zeros(rubbish.shape[:2], dtype=torch.bool)
        there[0, keep] = mask[b]
        times = torch.full(there.shape, torch.nan, dtype=torch.float64)
        times[0, keep] = positions[b]
        got = post(rubbish, there, times)
        np.testing.assert_allclose(got[0, keep], expected[b], atol=1e-6)
        assert not got[~there].any()


@settings(max_examples=60, deadline=None)
@given(case=cases(causal=True), cuts=st.lists(st.integers(1, 7), min_size=1, max_size=30))
def test_a_stream_gives_what_the_whole_video_gives(case, cuts):
    post, logits, mask, positions = case
    expected = post(logits, mask, positions)
    state = post.init_stream(len(logits), 4)
    found, start = [], 0
    while start < logits.shape[1]:
        part = slice(start, start + cuts[len(found) % len(cuts)])
        out, state = post.step(logits[:, part], state, positions[:, part], mask[:, part])
        found.append(out)
        start = part.stop
        assert state.probabilities.shape[1] <= post.half_width  # however long the stream
    np.testing.assert_allclose(torch.cat(found, 1), expected, atol=1e-6)
    assert state.seen == logits.shape[1]


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_a_stream_frame_by_frame_counts_positions_itself(smoothing):
    post = PostProcess(smoothing, 3, causal=True, bias=BIAS)
    logits = torch.randn(2, 40, 4, generator=torch.Generator().manual_seed(0))
    state = post.init_stream(2, 4)
    for t in range(40):
        if t == 20:
            before, later = state, post.step(logits[:, t], state)[0]
        out, state = post.step(logits[:, t], state)
        np.testing.assert_allclose(out, post(logits)[:, t], atol=1e-6)
    assert torch.equal(post.step(logits[:, 20], before)[0], later)  # an old state can be gone back to


@settings(max_examples=30, deadline=None)
@given(case=cases(causal=True), cut=st.integers(1, 30))
def test_causal_settings_never_look_ahead(case, cut):
    post, logits, mask, positions = case
    whole, start = post(logits, mask, positions), post(logits[:, :cut], mask[:, :cut], positions[:, :cut])
    np.testing.assert_allclose(whole[:, :cut], start, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(case=cases(), order=st.permutations(range(4)))
def test_permuting_the_classes_permutes_the_result(case, order):
    post, logits, mask, positions = case
    order = list(order)
    bias = post.bias and tuple(post.bias[i] for i in order)
    permuted = PostProcess.from_dict(post.to_dict() | {"bias": bias})
    got = permuted(logits[..., order], mask, positions)
    np.testing.assert_allclose(got, post(logits, mask, positions)[..., order], atol=1e-6)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_long_videos_go_through_in_blocks(smoothing, monkeypatch):
    logits = torch.randn(2, 301, 4, generator=torch.Generator().manual_seed(1))
    post = PostProcess(smoothing, 5)
    whole = post(logits)
    sizes = []

    def seen(windows, *rest):
        sizes.append(windows.numel())
        return kernel(windows, *rest)

    if kernel := SMOOTHINGS[smoothing]:
        monkeypatch.setitem(SMOOTHINGS, smoothing, seen)
    monkeypatch.setattr(postprocess_fer, "CELLS_AT_ONCE", 1000)
    np.testing.assert_allclose(post(logits), whole, atol=1e-6)
    assert max(sizes, default=0) <= 1000
    assert len(sizes) == (0 if kernel is None else 28)  # 301 frames, 2 * 4 * 11 cells each, 11 frames a block


def test_no_smoothing_is_the_softmax():
    logits = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(2))
    for post in (PostProcess(), PostProcess("none", 5), PostProcess("box", 0), PostProcess("median", 0)):
        assert torch.equal(post(logits), logits.softmax(-1))
        assert torch.equal(post(logits.bfloat16()), logits.bfloat16().float().softmax(-1))


def test_bias_and_temperature_move_the_prediction_as_the_formula_says():
    logits = torch.tensor([[[2.0, 0.0]]])
    assert PostProcess(temperature=2.0)(logits)[0, 0, 0] == pytest.approx(1 / (1 + np.exp(-1)))
    assert PostProcess(bias=(0.0, 2.0))(logits).tolist() == [[pytest.approx([0.5, 0.5])]]
    # After the temperature: the bias is in log-probability, not in logits.
    assert PostProcess(temperature=2.0, bias=(0.0, 1.0))(logits).tolist() == [[pytest.approx([0.5, 0.5])]]


def test_nothing_is_smoothed_across_a_gap():
    sure = torch.tensor([[[20.0, 0.0]] * 4 + [[0.0, 20.0]] * 4])
    with_gap = torch.tensor([[0.0, 1, 2, 3, 90, 91, 92, 93]], dtype=torch.float64)
    post = PostProcess("box", 3)
    assert post(sure, positions=with_gap)[0, :, 0].tolist() == pytest.approx([1] * 4 + [0] * 4, abs=1e-6)
    assert post(sure)[0, 3, 0] == pytest.approx(4 / 7)


def test_where_every_median_is_zero_the_classes_share_equally():
    # Float32 underflow: three frames, each certain of another class.
    logits = torch.eye(3)[None] * 500
    got = PostProcess("median", 1, bias=(0.0, 0.0, 1.0))(logits)[0, 1]
    assert got.tolist() == pytest.approx(scipy.special.softmax([0, 0, 1]).tolist())


def test_a_video_without_frames():
    for smoothing in SMOOTHINGS:
        post = PostProcess(smoothing, 2, bias=BIAS)
        assert post(torch.zeros(2, 0, 4)).shape == (2, 0, 4)
        assert not post(torch.zeros(1, 3, 4), torch.zeros(1, 3, dtype=torch.bool)).any()


@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_settings_survive_json(case):
    values = case[0].to_dict()
    assert PostProcess.from_dict(json.loads(json.dumps(values))) == case[0]
    assert json.loads(json.dumps(values)) == values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"smoothing": "mean"}, "smoothing must be one of none, box, gaussian, median, got 'mean'"),
        ({"smoothing": None}, "smoothing must be one of"),
        ({"half_width": -1}, "half_width must be a whole number from 0 up, got -1"),
        ({"half_width": 1.5}, "half_width must be a whole number"),
        ({"half_width": True}, "half_width must be a whole number"),
        ({"temperature": 0}, "temperature must be a number above 0, got 0"),
        ({"temperature": float("nan")}, "temperature must be a number above 0"),
        ({"temperature": "1"}, "temperature must be a number above 0"),
        ({"bias": [0, "1"]}, "bias must be None or a tuple of one number a class"),
        ({"bias": 1.0}, "bias must be None or a tuple"),
        ({"bias": [float("inf")]}, "bias must be None or a tuple"),
        ({"causal": 1}, "causal must be true or false, got 1"),
        ({"width": 3, "kind": "box"}, "knows smoothing, half_width, .*; got width, kind"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        PostProcess.from_dict(values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 4),), r"logits must be \(B, T, C\), got shape \(3, 4\)"),
        ((torch.zeros(1, 3, 5),), "the bias is for 4 classes, the logits have 5"),
        ((torch.zeros(1, 3, 4), torch.ones(1, 3)), "mask must be bool of shape .*float32"),
        ((torch.zeros(1, 3, 4), torch.ones(1, 2, dtype=torch.bool)), r"mask must be bool of shape \(1, 3\)"),
        ((torch.zeros(1, 3, 4), None, torch.zeros(3)), r"positions must have shape \(1, 3\), got \(3,\)"),
    ],
)
def test_wrong_shapes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PostProcess("box", 2, bias=BIAS)(*arguments)


def test_streams_are_refused_where_they_cannot_work():
    with pytest.raises(ValueError, match="looks ahead and cannot follow a stream"):
        PostProcess("box", 2).init_stream(1, 4)
    post = PostProcess("box", 2, causal=True)
    with pytest.raises(ValueError, match="looks ahead and cannot follow a stream"):
        PostProcess("box", 2).step(torch.zeros(2, 4), post.init_stream(2, 4))
    with pytest.raises(ValueError, match="the stream began with 2 videos and 4 classes"):
        post.step(torch.zeros(3, 4), post.init_stream(2, 4))
