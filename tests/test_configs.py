"""Every file of configs/ is read by the program that it is for."""

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

import pseudo_label
from modeling_fer.learning.command_line import parse_arguments

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"

KINDS = {
    "one_process": (DistributedType.NO, 1),
    "one_gpu": (DistributedType.NO, 1),
    "multi_gpu": (DistributedType.MULTI_GPU, 8),
    "multi_node": (DistributedType.MULTI_GPU, 16),
    "fsdp2": (DistributedType.FSDP, 8),
}

LABEL_FLAGS = {
    "--out",
    *(f"--{field.name}" for kind in pseudo_label.COMMANDS["label"][1] for field in dataclasses.fields(kind)),
}


def test_every_accelerate_file_is_known():
    assert {path.stem for path in (CONFIGS / "accelerate").iterdir()} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads(name):
    config = load_config_from_file(str(CONFIGS / f"accelerate/{name}.yaml"))
    assert (config.distributed_type, config.num_processes) == KINDS[name]
    assert config.num_processes % config.num_machines == 0
    assert config.mixed_precision == "no"  # anything else would overrule --precision auto


def test_fsdp_options_are_accelerates():
    config = load_config_from_file(str(CONFIGS / "accelerate/fsdp2.yaml"))
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert config.fsdp_config["fsdp_version"] == 2
    assert config.fsdp_config.keys() <= known.keys()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_train_reads(path):
    given = yaml.safe_load(path.read_text())
    # Of some, the command line says where data, output and the image model are.
    needed = {"data": "DATA", "output_dir": "OUT"} | (
        {"encoder": "E"} if given.get("stage") == "video" else {}
    )
    flags = [word for name, value in needed.items() for word in (f"--{name}", value)]
    parsed = parse_arguments(["--config", str(path), *flags])
    for name in given.keys() - needed.keys():
        assert getattr(parsed, name) == type(getattr(parsed, name))(given[name])


# --- Slurm ---


def run_script(name: str, folder: Path, *words: str, **environment: str) -> list[list[str]]:
    """What `accelerate` or `python` are told by a batch script, once a machine; the rest is stand-ins."""
    stubs = folder / "bin"
    stubs.mkdir()
    for program in ("accelerate", "python"):
        (stubs / program).write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$@" > "{folder}/words-${{SLURM_NODEID:-0}}"\n'
        )
    # Each node of the job in turn, as the options before the command do not matter here.
    (stubs / "srun").write_text(
        '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\n'
        'for ((node = 0; node < ${SLURM_NNODES:-1}; node++)); do SLURM_NODEID=$node "$@" || exit; done\n'
    )
    (stubs / "scontrol").write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    (stubs / "sleep").write_text(
        f'#!/bin/sh\nmkdir -p "{folder}/out/job" && : > "{folder}/out/job/job.json"\n'
    )
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    subprocess.run(
        ["bash", str(CONFIGS / "slurm" / name), *words],
        env={**os.environ, **environment, "PATH": f"{stubs}:{os.environ['PATH']}"},
        check=True,
        timeout=30,
    )
    return [noted.read_text().splitlines() for noted in sorted(folder.glob("words-*"))]


@pytest.mark.parametrize("path", sorted((CONFIGS / "slurm").iterdir()), ids=lambda path: path.name)
def test_bash_reads(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_train_script_starts_a_launcher_a_machine(tmp_path):
    words = ["--config", str(CONFIGS / "demo.yaml"), "--output_dir", "a folder"]
    slurm = {
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": "12345",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }
    noted = run_script("train.sbatch", tmp_path, *words, **slurm)
    assert len(noted) == 2
    for rank, (command, *given) in enumerate(noted):
        assert command == "launch"
        launch = launch_command_parser().parse_args(given)
        assert (launch.num_machines, launch.num_processes, int(launch.machine_rank)) == (2, 8, rank)
        assert (launch.main_process_ip, launch.main_process_port) == ("n1", 32345)
        assert (ROOT / launch.config_file).is_file()
        assert launch.training_script == "train.py"
        arguments = parse_arguments(launch.training_script_args)
        assert (arguments.resume, arguments.output_dir) == ("auto", "a folder")


@pytest.mark.parametrize("task", ["3", "4"])
def test_array_script_labels(tmp_path, task):
    slurm = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_MIN": "3"}
    words = ["--model", "a model", "--images", "IMAGES", "--unit_rows", "50000"]
    (noted,) = run_script("pseudo_label_array.sbatch", tmp_path, str(tmp_path / "out"), *words, **slurm)
    assert noted == ["pseudo_label.py", "label", "--out", str(tmp_path / "out"), *words]
    assert {word for word in noted if word.startswith("--")} <= LABEL_FLAGS
    # Only a later task waits for the cut.
    assert (tmp_path / "out/job/job.json").exists() == (task == "4")


@pytest.mark.parametrize("script", ["train", "pseudo_label_array"])
def test_heads_of_scripts_name_known_flags(script):
    text = (CONFIGS / f"slurm/{script}.sbatch").read_text()
    (usage,) = (line for line in text.splitlines() if line.startswith("#   sbatch"))
    shown = {word.strip("[]") for word in usage.split(".sbatch")[1].split() if "--" in word}
    assert shown
    known = {"--config", "--any_field"} if script == "train" else LABEL_FLAGS
    assert shown <= known
