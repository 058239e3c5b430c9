import importlib
import io
import sys

import numpy as np
import pytest
from PIL import Image

from modeling_fer.evaluation import plots
from modeling_fer.evaluation.metrics import reliability_bins
from modeling_fer.evaluation.plots import (
    confusion_matrix_figure,
    image_rows_figure,
    learning_curve_figure,
    reliability_figure,
    save,
    timeline_figure,
)
from modeling_fer.labels import CLASSES

# Rows as train.py writes them.
HISTORY = [
    {
        "step": s,
        "epoch": s // 40,
        "loss": 2.0 / (s + 1),
        "accuracy": s / 100,
        "grad_norm": 1.5,
        "learning_rate": 1e-4 * (1 - s / 100),
        "images_per_second": 900.0,
    }
    for s in range(0, 100, 2)
] + [
    {"step": 50, "validation/macro_f1": 0.3, "validation/accuracy": 0.5, "validation/loss": 1.2},
    {"step": 100, "validation/macro_f1": 0.25, "validation/accuracy": 0.55},
]


def words(figure):
    return {text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))}


def test_confusion_matrix_shows_counts_shares_names_and_score():
    matrix = np.zeros((8, 8), int)
    matrix[0, :2] = [3, 1]
    matrix[4, 4] = 1200
    text = words(confusion_matrix_figure(matrix))
    assert {"75%", "25%", "100%", "3", "1", "1,200", *CLASSES, "Neutral\nn = 4"} <= text
    # F1: Neutral 6/7, Happiness 1, six absent classes 0
    assert "Confusion matrix: macro F1 0.232, accuracy 0.999" in text


def test_confusion_matrix_of_the_wrong_size_is_an_error():
    with pytest.raises(ValueError, match=r"expected shape \(8, 8\), got \(7, 7\)"):
        confusion_matrix_figure(np.zeros((7, 7), int))


def test_reliability_figure_draws_one_bar_per_filled_bin():
    bins = reliability_bins([0, 0, 1], [[0.5, 0.5], [0.75, 0.25], [0.8, 0.2]], bins=4)
    figure = reliability_figure(bins)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == [1, 1, 0]
    assert f"Reliability: ECE {bins.ece:.3f}, 3 examples" in words(figure)


def curves(figure):
    return {
        line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist())
        for axes in figure.axes
        for line in axes.get_lines()
        if not line.get_label().startswith("_")
    }


def test_learning_curve_draws_every_column_over_steps():
    drawn = curves(learning_curve_figure(HISTORY))
    assert set(drawn) == {"training loss (smoothed)", "learning rate", "macro F1", "accuracy"}
    assert drawn["learning rate"][0] == list(range(0, 100, 2))
    assert drawn["learning rate"][1][:2] == pytest.approx([1e-4, 0.98e-4])
    assert drawn["macro F1"] == ([50, 100], [0.3, 0.25])
    assert "best 0.300" in words(learning_curve_figure(HISTORY))


def test_learning_curve_with_parts_missing_repeated_or_not_finite():
    rows = [{"step": 2, "loss": 1.0}, {"step": 1, "loss": float("nan")}, {"step": 2, "loss": 0.5}]
    drawn = curves(learning_curve_figure(rows))
    assert drawn["training loss"][0] == [1, 2]
    assert drawn["training loss"][1][1] == 0.5
    assert set(curves(learning_curve_figure([{"step": 1, "learning_rate": 1e-3}]))) == {"learning rate"}
    assert set(curves(learning_curve_figure([{"step": 1, "validation/macro_f1": 0.1}]))) == {"macro F1"}
    with pytest.raises(ValueError, match="to have 'step'"):
        learning_curve_figure([{"loss": 1.0}])
    with pytest.raises(ValueError, match="none in 0 rows"):
        learning_curve_figure([])


def test_learning_curve_without_a_classifier_shows_what_validation_found():
    """A run of masked autoencoding, as train.py writes it: below 0 at first, and two probes."""
    found = {"explained_variance": (-0.4, 0.3, 0.2), "linear_probe": (0.2, 0.4, 0.5), "knn_probe": (0.1,) * 3}
    rows = [{"step": step, "loss": 1.0} for step in range(1, 4)]
    rows += [
        {"step": i + 1, **{f"validation/{name}": values[i] for name, values in found.items()}}
        for i in range(3)
    ]
    figure = learning_curve_figure(rows)
    drawn = curves(figure)
    assert set(drawn) == {"training loss", "explained variance", "linear probe", "knn probe"}
    assert drawn["explained variance"] == ([1, 2, 3], [-0.4, 0.3, 0.2])
    assert "best 0.300" in words(figure)
    below = figure.axes[-1]
    assert {line.get_label() for line in below.get_lines()} >= {"explained variance", "linear probe"}
    assert below.get_ylim()[0] < -0.4
    assert below.get_ylim()[1] == 1
    assert len({line.get_color() for line in below.get_lines() if not line.get_label().startswith("_")}) == 3


def test_learning_curve_of_a_classifier_shows_its_scores_alone():
    both = [{"step": 1, "validation/accuracy": 0.5, "validation/nll": 2.0}]
    figure = learning_curve_figure(both)
    assert set(curves(figure)) == {"accuracy"}
    assert figure.axes[-1].get_ylim() == (0, 1)


def test_image_rows_show_each_image_in_its_place():
    rng = np.random.default_rng([0])
    rows = {name: rng.integers(0, 256, (4, 3, 5, 6), dtype=np.uint8) for name in ("seen", "filled")}
    figure = image_rows_figure(rows)
    shown = [axes.get_images()[0].get_array() for axes in figure.axes]
    assert len(shown) == 8
    for image, expected in zip(shown, [*rows["seen"], *rows["filled"]], strict=True):
        assert np.array_equal(image, expected.transpose(1, 2, 0))
    assert {"seen", "filled"} <= words(figure)
    assert len(image_rows_figure({"one": rows["seen"][:1]}).axes) == 1
    with pytest.raises(ValueError, match="shorter"):
        image_rows_figure({"seen": rows["seen"], "filled": rows["filled"][:3]})


@pytest.mark.parametrize(
    "make",
    [
        lambda: confusion_matrix_figure(np.eye(8, dtype=int) * 5),
        lambda: reliability_figure(reliability_bins([0, 1], [[0.9, 0.1], [0.6, 0.4]])),
        lambda: learning_curve_figure(HISTORY),
        lambda: image_rows_figure(
            {name: np.arange(96).astype(np.uint8).reshape(2, 3, 4, 4) for name in "abc"}
        ),
    ],
)
def test_saved_files_are_png_and_repeatable(make, tmp_path):
    path = tmp_path / "figures" / "one.png"
    save(make(), path)
    first = path.read_bytes()
    save(make(), path)
    assert path.read_bytes() == first
    image = Image.open(io.BytesIO(first))
    assert image.format == "PNG"
    assert min(image.size) > 400
    assert len(np.unique(np.asarray(image.convert("L")))) > 20  # something was drawn
    assert [f.name for f in path.parent.iterdir()] == ["one.png"]


def test_plots_do_without_pyplot(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it raises
    fresh = importlib.reload(plots)
    fresh.save(fresh.learning_curve_figure(HISTORY), tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").format == "PNG"


@pytest.mark.parametrize("step", [1, 3])
def test_a_timeline_draws_labels_and_predictions_without_holes_of_its_own(step):
    """Frames in steps as prepared make whole lines; a real gap, and frames without a label, make a hole."""
    frames = np.arange(0, 60 * step, step)
    frames[40:] += 10 * step
    references = np.repeat([0, 4], 30)
    references[10:15] = -1
    probabilities = np.eye(8)[np.repeat([0, 5, 4], 20)]
    axes = timeline_figure(probabilities, references, frames, CLASSES, "v1").axes[0]
    label, prediction = (line.get_ydata() for line in axes.get_lines())
    assert label.shape == (70,)
    assert np.array_equal(prediction[:40], np.repeat([0, 5], 20))
    assert np.isnan(prediction[40:50]).all()
    assert np.array_equal(prediction[50:], np.full(20, 4))
    assert np.isnan(label[10:15]).all()
    assert not np.isnan(label[15:40]).any()
    assert axes.get_title() == "v1"
    shades = axes.get_images()[0].get_array()
    assert shades.shape == (8, 70)


def test_a_timeline_of_one_frame_and_of_a_long_video():
    one = timeline_figure(np.eye(8)[[3]], np.array([3]), np.array([17]), CLASSES, "one")
    assert one.axes[0].get_images()[0].get_array().shape == (8, 1)
    frames = np.arange(100_000)
    long = timeline_figure(np.full((100_000, 8), 0.125), np.zeros(100_000, int), frames, CLASSES, "long")
    assert long.axes[0].get_images()[0].get_array().shape[1] < 5_000
