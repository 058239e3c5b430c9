import dataclasses
import json
from pathlib import Path

import pytest

from modeling_fer.learning.arguments import FREE_ON_RESUME, FerTrainingArguments
from modeling_fer.learning.command_line import parse_arguments

NEEDED = ["--data", "d", "--output_dir", "o"]


@pytest.fixture
def config(tmp_path):
    """Return a writer of a configuration file."""

    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(config):
    file = config("data: from_file\noutput_dir: out\nbatch_size: 8\nlearning_rate: 1e-3\n")
    arguments = parse_arguments([*file, "--batch_size", "16", "--seed=3"])
    assert (arguments.data, arguments.output_dir) == ("from_file", "out")
    assert (arguments.batch_size, arguments.seed) == (16, 3)
    assert arguments.learning_rate == 0.001  # YAML reads 1e-3 as text
    untouched = {"data", "output_dir", "batch_size", "seed", "learning_rate"}
    for f in dataclasses.fields(arguments):
        assert f.name in untouched or getattr(arguments, f.name) == f.default, f.name


def test_the_order_on_the_command_line_does_not_matter(config):
    file = config("data: d\noutput_dir: o\nbatch_size: 8\n")
    assert parse_arguments(["--batch_size", "16", *file]) == parse_arguments([*file, "--batch_size", "16"])
    assert parse_arguments([f"--config={file[1]}"]).batch_size == 8


def test_types_are_those_of_the_fields(config):
    file = config("data: d\noutput_dir: o\nepochs: 3\nmax_steps: 7\nerasing: 0.25\nencoder: 2024\n")
    arguments = parse_arguments(file)
    assert (arguments.epochs, type(arguments.epochs)) == (3.0, float)
    assert (arguments.max_steps, type(arguments.max_steps)) == (7, int)
    assert (arguments.erasing, arguments.encoder) == (0.25, "2024")


@pytest.mark.parametrize("text", ["true", "True", "yes", "on", "1"])
def test_booleans_that_are_on(text, config):
    assert parse_arguments(config(f"data: d\noutput_dir: o\nsoft_labels: {text}\n")).soft_labels is True
    assert parse_arguments([*NEEDED, "--soft_labels", text.replace("on", "yes")]).soft_labels is True
    assert parse_arguments([*NEEDED, "--soft_labels"]).soft_labels is True


@pytest.mark.parametrize("text", ["false", "no", "0"])
def test_booleans_that_are_off(text, config):
    file = config("data: d\noutput_dir: o\nsoft_labels: true\ncompile: " + text)
    arguments = parse_arguments([*file, "--soft_labels", text])
    assert (arguments.soft_labels, arguments.compile) == (False, False)


def test_hyphens_do_as_well():
    assert parse_arguments([*NEEDED, "--max-steps", "5"]).max_steps == 5


def test_an_empty_field_keeps_its_default(config):
    arguments = parse_arguments(config("data: d\noutput_dir: o\nencoder:\nseed: null\n"))
    assert (arguments.encoder, arguments.seed) == ("", 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: d\nlearning_rat: 1\n", "run.yaml holds unknown fields learning_rat; known fields: data, "),
        ("data: d\n3: 1\n", "run.yaml holds unknown fields 3;"),
        ("- data\n- d\n", "run.yaml holds no mapping of fields to values"),
        ("data: [a, b]\n", "run.yaml: data must be a single value"),
        ("data: {a: b\n", "run.yaml is not YAML"),
    ],
)
def test_a_bad_file_is_named(text, message, config):
    with pytest.raises(ValueError, match=message):
        parse_arguments(config(text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        parse_arguments(["--config", str(tmp_path / "absent.yaml")])


def test_a_value_of_the_wrong_type_stops_the_command(config, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(config("data: d\noutput_dir: o\nbatch_size: many\n"))
    message = capsys.readouterr().err
    assert "batch_size" in message
    assert "'many'" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stage", "audio"), ("classes", "some"), ("augmentation", "heavy"), ("precision", "fp8"),
        ("precision", "fp16"), ("tracker", "paper"), ("data", ""), ("output_dir", ""), ("batch_size", 0),
        ("accumulation_steps", 0), ("eval_steps", -1), ("eval_batch_size", 0), ("save_steps", 0),
        ("log_steps", 0), ("keep_checkpoints", 0), ("patch_size", 0), ("num_layers", -1), ("max_steps", -1),
        ("epochs", 0), ("ema_decay", 1.5), ("label_smoothing", -0.1), ("erasing", 2), ("noise", 2),
        ("dropout", -1),
        ("warmup", 1.01), ("sampling_alpha", -0.5), ("image_size", -1), ("lora_rank", -4), ("seed", -1),
        ("weight_decay", -1), ("max_grad_norm", -1), ("learning_rate", 0), ("learning_rate", -1e-3),
        ("epochs", float("nan")), ("learning_rate", float("nan")), ("dropout", float("nan")),
        ("weight_decay", float("nan")), ("method", "noisy"), ("strong_augmentation", "crop"), ("mu", 0),
        ("lambda_u", -0.1), ("lambda_u", float("nan")), ("threshold_rule", "loose"), ("threshold", 1.1),
        ("threshold", -0.1), ("threshold_momentum", 1), ("debias_tau", -1), ("debias_momentum", 1),
        ("debias_momentum", -0.1), ("align", "natural"), ("gate", "door"), ("gate_quantile", 1.5),
        ("teacher_ema", 1), ("feedback_weight", -1), ("finetune", 1), ("finetune", -0.1),
        ("sampler_bound", 0.9), ("sampler_bound", 0), ("sampler_bound", float("nan")),
        ("sampler_bound", float("inf")), ("holdout", 1), ("holdout", -0.1), ("round_steps", -1),
        ("stream_memory", 0), ("mask_ratio", 0), ("mask_ratio", 1.1), ("layer_decay", 0),
        ("decoder_layers", 0), ("decoder_hidden_size", 0), ("crop", "round"), ("crop_margin", 0.1),
    ],
)  # fmt: skip
def test_values_out_of_range_name_their_flag(name, value):
    values = {"data": "d", "output_dir": "o", name: value}
    with pytest.raises(ValueError, match=f"--{name}"):
        FerTrainingArguments(**values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "feedback", "accumulation_steps": 2}, "use --accumulation_steps 1"),
        ({"teacher": "t"}, "--teacher t and its share, --distillation 0.0, go together"),
        ({"distillation": 0.5}, "--teacher DIR and its share, --distillation 0.5, go together"),
        ({"teacher": "t", "distillation": 0.5, "method": "fixmatch"}, "--teacher t is for --stage image"),
        ({"encoder_config": "c", "encoder": "e"}, "--encoder_config c is of a new encoder"),
        ({"encoder_config": "c", "lora_rank": 2}, "--lora_rank 2 adapts a pretrained encoder"),
        ({"method": "feedback", "teacher_ema": 0.99}, "is for fixmatch"),
        ({"stage": "pretrain", "method": "fixmatch"}, "leave them out of --stage pretrain"),
        ({"stage": "pretrain", "encoder": "e"}, "leave out --encoder"),
        ({"stage": "pretrain", "crop": "box"}, "leave out --encoder, --lora_rank and --crop"),
        ({"crop": "box", "crop_margin": -0.5}, "--crop_margin must be above -0.5 and at most 1"),
        ({"crop": "box", "crop_margin": float("nan")}, "--crop_margin must be"),
        ({"augmentation": "none", "erasing": 0.5}, "--erasing 0.5 needs --augmentation"),
        ({"stage": "pretrain", "noise": 0.5}, "--noise 0.5 is for --stage image"),
        ({"stage": "video", "encoder": "e", "noise": 0.5}, "--noise 0.5 is for --stage image"),
        ({"method": "fixmatch", "noise": 0.5}, "--noise 0.5 is for --stage image --method supervised"),
    ],
)
def test_what_does_not_go_together_is_told(options, message):
    with pytest.raises(ValueError, match=message):
        FerTrainingArguments(data="d", output_dir="o", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hub_model_id": ""}, "--push_to_hub needs --hub_model_id org/name, got ''"),
        ({"hub_model_id": "fer"}, "--hub_model_id org/name, got 'fer'"),
        ({"hub_model_id": "org/f er"}, "--hub_model_id org/name, got 'org/f er'.*alphanumeric"),
        ({"hub_model_id": "org/fer.git"}, "cannot end by '.git'"),
        ({"hub_model_id": "a/b/c"}, "--hub_model_id org/name, got 'a/b/c'"),
        (
            {"stage": "pretrain"},
            "--stage pretrain makes an encoder, which has no card.*fer push .* --no-card",
        ),
        (
            {"lora_rank": 4, "encoder": "runs/first/model"},
            "runs/first/model is a folder.*--hub_base_model org/name",
        ),
        ({"lora_rank": 4, "encoder": "HERE"}, "--encoder .* is a folder, which nobody else has"),
        ({"lora_rank": 4, "encoder": "HERE", "hub_base_model": "x"}, "--hub_base_model org/name, got 'x'"),
    ],
)
def test_a_push_that_must_fail_is_refused_before_training(options, message, tmp_path):
    options = {name: str(tmp_path) if value == "HERE" else value for name, value in options.items()}
    needed = {"data": "d", "output_dir": "o", "hub_model_id": "org/fer"}
    with pytest.raises(ValueError, match=message):
        FerTrainingArguments(**{**needed, "push_to_hub": True, **options})
    good = {"hub_model_id": "org/fer", "hub_base_model": "org/base", "stage": "image"}
    FerTrainingArguments(**{**needed, "push_to_hub": True, **options, **good})


def test_an_encoder_of_the_hub_is_the_base_of_its_adapter():
    needed = {"data": "d", "output_dir": "o", "push_to_hub": True, "hub_model_id": "org/fer"}
    assert FerTrainingArguments(**needed, lora_rank=4, encoder="google/vit-base").hub_base_model == ""


def test_repeated_data_and_commas_and_the_file_are_the_same(config):
    once = parse_arguments(["--data", "labelled=A,pseudo=B,unlabelled=C", "--output_dir", "o"])
    assert once.data == "labelled=A,pseudo=B,unlabelled=C"
    repeated = ["--data", "labelled=A", "--output_dir", "o", "--data=pseudo=B", "--data", "unlabelled=C"]
    assert parse_arguments(repeated) == once
    assert parse_arguments(config("data: labelled=A,pseudo=B,unlabelled=C\noutput_dir: o\n")) == once
    file = config("data: from_file\noutput_dir: o\n")
    assert parse_arguments([*file, *repeated]) == once, "the command line wins, and does not add"


def test_the_saved_arguments_are_read_back(tmp_path):
    arguments = FerTrainingArguments(data="d", output_dir="o", seed=4, soft_labels=True)
    arguments.save(tmp_path / "arguments.json")
    saved = json.loads((tmp_path / "arguments.json").read_text())
    assert FerTrainingArguments(**saved) == arguments
    assert arguments.differences(saved) == []


def test_differences_are_those_that_decide_what_is_learnt():
    saved = dataclasses.asdict(FerTrainingArguments(data="d", output_dir="o"))
    other = FerTrainingArguments(data="d", output_dir="p", resume="auto", save_steps=7, seed=1)
    assert other.differences(saved) == ["seed: 0 -> 1"]
    assert saved.keys() >= FREE_ON_RESUME
    del saved["noise"]  # a run of a version without this field did what is its default now
    assert other.differences(saved) == ["seed: 0 -> 1"]
    other.noise = 0.25
    assert other.differences(saved) == ["noise: 0.0 -> 0.25", "seed: 0 -> 1"]
    saved["gone"] = 3  # of a version with another field
    assert other.differences(saved) == ["gone: 3 -> None", "noise: 0.0 -> 0.25", "seed: 0 -> 1"]
    del saved["crop"], saved["crop_margin"]  # they only say how the data were made
    assert len(other.differences(saved)) == 3


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda p: p.name
)
def test_every_configuration_in_the_repository_can_be_read(path):
    more = ["--encoder", "e"] if "stage: video" in path.read_text() else []  # it has no default of its own
    arguments = parse_arguments(["--config", str(path), *NEEDED, *more])
    assert arguments.data == "d"
