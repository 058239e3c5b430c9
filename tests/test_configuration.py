import json

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, ViTConfig

from modeling_fer import CLASSES, FerConfig
from modeling_fer.configuration_fer import CROP_POINTS, EXPRESSIONS
from modeling_fer.video.faces import Crop


def test_the_classes_that_travel_with_a_checkpoint_are_ours():
    assert EXPRESSIONS == CLASSES
    assert FerConfig().class_names == list(CLASSES)


def test_round_trip_with_the_encoder_as_object_and_as_dict(encoder, tmp_path):
    _, encoder_config, _ = encoder
    as_object = FerConfig(encoder_config=encoder_config, classifier_dropout=0.25, temporal_causal=True)
    as_dict = FerConfig(
        encoder_config=encoder_config.to_dict(), classifier_dropout=0.25, temporal_causal=True
    )
    as_object.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    for config in (as_dict, loaded):
        assert type(config) is FerConfig
        assert type(config.encoder_config) is type(encoder_config)
        assert config.encoder_config.to_dict() == encoder_config.to_dict()
        assert (config.classifier_dropout, config.temporal_causal) == (0.25, True)
        assert config.class_names == list(CLASSES)
    assert loaded.to_dict().keys() == as_object.to_dict().keys()
    assert loaded.image_size == 16


def test_a_second_save_changes_nothing(tmp_path):
    FerConfig(id2label={0: "Fear", 1: "Anger"}).save_pretrained(tmp_path / "a")
    FerConfig.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()


def test_fewer_classes_keep_their_order(tmp_path):
    config = FerConfig(id2label={0: "Surprise", 1: "Neutral", 2: "Anger"})
    config.save_pretrained(tmp_path)
    loaded = FerConfig.from_pretrained(tmp_path)  # JSON turns the ids into strings
    assert loaded.id2label == {0: "Surprise", 1: "Neutral", 2: "Anger"}
    assert loaded.label2id == {"Surprise": 0, "Neutral": 1, "Anger": 2}
    assert loaded.num_labels == 3
    assert json.loads((tmp_path / "config.json").read_text())["id2label"]["0"] == "Surprise"


def test_more_than_ten_classes_are_not_sorted_as_text(tmp_path):
    names = [f"class {i}" for i in range(12)]
    FerConfig(id2label=dict(enumerate(names))).save_pretrained(tmp_path)
    assert FerConfig.from_pretrained(tmp_path).class_names == names


def test_the_default_is_a_tiny_vit_at_112():
    config = FerConfig()
    assert type(config.encoder_config) is ViTConfig
    assert (config.encoder_config.hidden_size, config.encoder_config.image_size, config.image_size) == (
        192,
        112,
        112,
    )


@pytest.mark.parametrize(
    ("given", "native", "expected"), [(None, 32, 32), (48, 32, 48), (None, (32, 32), 32), (48, [32, 32], 48)]
)
def test_image_size_is_the_encoders_unless_given(given, native, expected):
    config = FerConfig(encoder_config=ViTConfig(hidden_size=16, image_size=native), image_size=given)
    assert config.image_size == expected


def test_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match=r"pooling must be one of mean, cls, pooler, got 'max'"):
        FerConfig(pooling="max")


def test_repeated_class_names_are_refused():
    with pytest.raises(ValueError, match="class names must differ"):
        FerConfig(id2label={0: "Anger", 1: "Anger"})


def test_class_ids_with_a_gap_are_refused():
    with pytest.raises(ValueError, match=r"class ids must be 0 to C - 1, got \[1, 2\]"):
        FerConfig(id2label={1: "Anger", 2: "Fear"})


@pytest.mark.parametrize("kind", ["CLIPConfig", "BertConfig"])
def test_what_is_no_plain_vision_encoder_is_refused(kind):
    with pytest.raises(ValueError, match=f"{kind} has none: is it a vision encoder"):
        FerConfig(encoder_config=getattr(transformers, kind)())


def test_an_encoder_of_any_size_needs_one():
    config = transformers.ResNetConfig(hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    with pytest.raises(ValueError, match="image_size is missing: ResNetConfig takes images of any size"):
        FerConfig(encoder_config=config)
    taken = FerConfig(encoder_config=config, image_size=32)
    assert (taken.image_size, taken.feature_size, taken.is_hierarchical) == (32, 16, True)
    assert (FerConfig().feature_size, FerConfig().is_hierarchical) == (192, False)


def test_an_encoder_dict_of_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="nonsense"):
        FerConfig(encoder_config={"model_type": "nonsense"})


# -- the crop convention ----------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [{"name": "box"}, {"name": "arcface112", "margin": 0.1}])
def test_a_crop_is_kept_in_full(crop, tmp_path):
    FerConfig(crop=crop).save_pretrained(tmp_path)
    full = {"points": CROP_POINTS[crop["name"]], "margin": 0.0, **crop}
    assert json.loads((tmp_path / "config.json").read_text())["crop"] == full
    assert FerConfig.from_pretrained(tmp_path).crop == full


def test_a_checkpoint_from_before_there_was_a_crop_loads(tmp_path):
    FerConfig(crop={"name": "box"}).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["crop"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert FerConfig.from_pretrained(tmp_path).crop is None
    assert FerConfig().crop is None


def test_five_points_of_your_own():
    points = [[0.3, 0.3], [0.7, 0.3], [0.5, 0.5], [0.35, 0.7], [0.65, 0.7]]
    given_points = tuple(map(tuple, points))
    assert FerConfig(crop={"name": "mine", "points": given_points}).crop["points"] == points


@pytest.mark.parametrize(
    ("crop", "message"),
    [
        ("box", "crop must have a name, and perhaps points and a margin, got 'box'"),
        ({}, "crop takes a name"),
        ({"name": "square"}, "crop must have points or be one of arcface112, box, got 'square'"),
        ({"name": "box", "margin": 3}, "margin of a crop must be above -0.5 and at most 1, got 3"),
        ({"name": "box", "side": 3}, "crop knows name, points, margin; got side"),
    ],
)
def test_a_wrong_crop_is_refused(crop, message):
    with pytest.raises(ValueError, match=message):
        FerConfig(crop=crop)


coordinates = st.floats(0, 1) | st.just(float("nan"))
points = (
    st.none() | st.just(CROP_POINTS["arcface112"]) | st.lists(st.tuples(coordinates, coordinates), max_size=6)
)
conventions = st.fixed_dictionaries(
    {"name": st.sampled_from(["arcface112", "box", "mine"])},
    optional={"points": points, "margin": st.floats(), "size": st.just(112)},
)


@settings(deadline=None)
@given(conventions)
def test_faces_are_cut_out_by_what_a_configuration_takes_and_by_nothing_else(values):
    def outcome(build):
        try:
            return build()
        except ValueError as error:
            return str(error)

    stated = outcome(lambda: FerConfig(crop=values).crop)
    assert outcome(lambda: Crop.from_dict(values).to_dict()) == stated
    if isinstance(stated, dict):
        crop = Crop.from_dict(stated)
        assert Crop(crop.name, crop.points, crop.margin) == Crop.from_dict(values) == crop
