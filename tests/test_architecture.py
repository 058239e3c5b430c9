"""Holds the layer table, the line budgets, and the rules for files that ship with a checkpoint."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUDGETS = {"train.py": 300, "pseudo_label.py": 200, "cross_validate.py": 200, "release.py": 300}
DEFAULT_BUDGET = 400
SCRIPTS = [path for name in BUDGETS if (path := ROOT / name).exists()]
MODULES = sorted((ROOT / "modeling_fer").rglob("*.py")) + SCRIPTS
SHIPPED = sorted((ROOT / "modeling_fer").glob("*_fer.py"))

# Arrows run downward only. `model`: `*_fer.py` and what `modeling_fer` re-exports; `top`: scripts and cli/.
MAY_IMPORT = {
    "labels": set(),
    "postprocess": {"postprocess", "model"},
    "model": {"model", "postprocess"},
    "package": {"labels", "model", "postprocess"},
    "data": {"data", "labels", "postprocess"},
    "evaluation": {"evaluation", "labels", "postprocess"},
    "learning": {"learning", "adapters", "model", "postprocess", "data", "evaluation", "labels"},
    "video": {"video", "model", "postprocess", "data", "evaluation", "labels"},
    "hub": {"hub", "adapters", "evaluation", "model", "postprocess", "labels"},
}
MAY_IMPORT["top"] = {*MAY_IMPORT, "adapters", "top"}
# Tensor maths that imports nothing of ours.
PURE = {
    f"modeling_fer/learning/{name}.py" for name in ("losses", "thresholds", "debias", "gate", "improvement")
}
WINGS = {"data", "evaluation", "learning", "video", "hub"}
EXTRAS = ("cv2", "av", "onnx", "onnxscript", "onnxruntime", "gradio")
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# Written in pieces, so that this file does not find itself.
REGISTRY_HOST = re.compile(
    "py" + r"pi\.[a-z]+|python" + r"hosted|download\.py" + r"torch\.|npm" + r"js\.(?:org|com)", re.I
)


def imported(tree, path):
    """Yield the full dotted name of everything that is imported anywhere in a file: `package.module.name`."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def room(name):
    """Return the room of a dotted name, or None if it is not ours."""
    parts = name.split(".")
    if parts[0] in {"train", "pseudo_label", "cross_validate", "release"}:
        return "top"
    if parts[0] != "modeling_fer":
        return None
    second = parts[1] if len(parts) > 1 else ""
    if second in WINGS:
        return "adapters" if parts[1:3] == ["learning", "adapters"] else second
    return {"labels": "labels", "postprocess_fer": "postprocess", "cli": "top"}.get(second, "model")


def layer_faults(source, path):
    own = path.removesuffix(".py").replace("/", ".")
    home = "package" if path == "modeling_fer/__init__.py" else room(own)
    allowed = set() if path in PURE else MAY_IMPORT["learning" if home == "adapters" else home]
    targets = [(name, room(name)) for name in imported(ast.parse(source), path)]
    faults = [f"{path} ({home}) imports {name} ({to})" for name, to in targets if to and to not in allowed]
    return faults + ([f"{path} imports something"] if home == "labels" and targets else [])


def shipping_faults(source):
    """Check what the Hub's loader needs; it looks for lines, so those inside docstrings count as well."""
    lines = [line.strip() for line in source.splitlines()]
    faults = [
        line
        for line in lines
        if re.match(r"(from|import)\s+\.", line) and not re.match(r"from \.\w+_fer import [\w(]", line)
    ]
    for name in imported(ast.parse(source), "modeling_fer/any_fer.py"):
        top = name.split(".")[0]
        relative = bool(re.match(r"modeling_fer\.\w+_fer\.", name))
        if not relative and top not in sys.stdlib_module_names | {"torch", "transformers"}:
            faults.append(name)
    absolute = [line for line in lines if re.match(r"(from|import)\s+modeling_fer\b", line)]
    return faults + absolute


def loading_faults(source):
    """Find what could run code that is hidden in a data file."""
    tree = ast.parse(source)
    names = imported(tree, "modeling_fer/any.py")
    faults = [name for name in names if name.split(".")[0] in UNPICKLERS or name == "torch.load"]
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        keywords = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if ast.unparse(call.func).endswith("torch.load") and keywords.get("weights_only") != "True":
            faults.append(ast.unparse(call))
        if keywords.get("allow_pickle", "False") != "False" or keywords.get("weights_only") == "False":
            faults.append(ast.unparse(call))
    return faults


def relative(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_module_keeps_to_its_layer_its_budget_and_safe_loading(path):
    source = path.read_text(encoding="utf-8")
    assert layer_faults(source, relative(path)) == []
    assert loading_faults(source) == []
    assert len(source.splitlines()) <= BUDGETS.get(relative(path), DEFAULT_BUDGET)


@pytest.mark.parametrize("path", SHIPPED, ids=relative)
def test_files_that_ship_with_a_checkpoint_can_be_loaded_from_the_hub(path):
    assert shipping_faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source", "good"),
    [
        ("modeling_fer/labels.py", "import re", False),
        ("modeling_fer/data/x.py", "from modeling_fer.labels import CLASSES", True),
        ("modeling_fer/data/x.py", "from .schema import Example", True),
        ("modeling_fer/data/x.py", "from modeling_fer import evaluation", False),
        ("modeling_fer/data/x.py", "def f():\n    from modeling_fer.evaluation.metrics import nll", False),
        ("modeling_fer/data/x.py", "from modeling_fer import FerModel", False),
        ("modeling_fer/data/sources/x.py", "from ...learning import step", False),
        ("modeling_fer/data/x.py", "import modeling_fer.modeling_fer as m", False),
        ("modeling_fer/evaluation/x.py", "from modeling_fer.postprocess_fer import smooth", True),
        ("modeling_fer/evaluation/x.py", "from modeling_fer import data, labels", False),
        ("modeling_fer/evaluation/x.py", "importlib.import_module('modeling_fer.learning')", False),
        ("modeling_fer/learning/x.py", "from modeling_fer import data, evaluation, FerModel", True),
        ("modeling_fer/learning/x.py", "from modeling_fer.learning.adapters import merge", True),
        ("modeling_fer/learning/x.py", "from modeling_fer.video import faces", False),
        ("modeling_fer/learning/x.py", "import train", False),
        ("modeling_fer/learning/losses.py", "from modeling_fer.labels import CLASSES", False),
        ("modeling_fer/video/x.py", "from modeling_fer.learning import adapters", False),
        ("modeling_fer/hub/x.py", "from modeling_fer.learning import adapters", True),
        ("modeling_fer/hub/x.py", "from modeling_fer.learning import step", False),
        ("modeling_fer/hub/x.py", "from modeling_fer.cli import main", False),
        ("modeling_fer/temporal_fer.py", "from modeling_fer.labels import CLASSES", False),
        ("modeling_fer/__init__.py", "from modeling_fer.modeling_fer import FerModel", True),
        ("modeling_fer/__init__.py", "from . import data", False),
        ("modeling_fer/cli/push.py", "from modeling_fer.hub.push import push", True),
        ("train.py", "from modeling_fer.learning import step", True),
    ],
)
def test_the_layer_check_can_fail(path, source, good):
    assert (layer_faults(source, path) == []) is good


@pytest.mark.parametrize(
    ("source", "good"),
    [
        ("import math\nimport torch.nn\nfrom transformers import X\nfrom .temporal_fer import Head", True),
        ("from .temporal_fer import (\n    Head,\n)", True),
        ("from . import temporal_fer", False),
        ("from .labels import CLASSES", False),
        ("from .data.schema import Example", False),
        ("from ..x_fer import y", False),
        ('"""Example:\n    from .helper import f\n"""', False),
        ("def f():\n    import numpy as np", False),
        ("try:\n    import peft\nexcept ImportError:\n    pass", False),
        ("from modeling_fer.temporal_fer import Head", False),
        ('"""from modeling_fer import FerModel"""', True),
        ('"""Example:\n    from modeling_fer import FerModel\n"""', False),
    ],
)
def test_the_shipping_check_can_fail(source, good):
    assert (shipping_faults(source) == []) is good


@pytest.mark.parametrize(
    ("source", "good"),
    [
        ("torch.load(p, weights_only=True)", True),
        ("torch.load(p)", False),
        ("torch.load(p, weights_only=False)", False),
        ("from torch import load", False),
        ("import pickle", False),
        ("from pickle import load", False),
        ("np.load(p)", True),
        ("np.load(p, allow_pickle=True)", False),
    ],
)
def test_the_loading_check_can_fail(source, good):
    assert (loading_faults(source) == []) is good


def test_every_module_imports_without_the_optional_extras():
    names = [relative(p).removesuffix(".py").replace("/", ".").removesuffix(".__init__") for p in MODULES]
    names = [name for name in names if name.startswith("modeling_fer")]
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({EXTRAS!r}))  # None: importing it raises, looking for it finds nothing
for name in {names!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_no_file_names_a_package_registry():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    # Files not added yet count as well: the fault is found before it is committed.
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    faults = []
    for path in (ROOT / name for name in listed if name):
        if path.is_file() and path.stat().st_size < 2_000_000:
            text = path.read_bytes().decode("utf-8", "ignore")
            faults += [f"{relative(path)}: {host}" for host in REGISTRY_HOST.findall(text)]
    assert faults == []
    assert REGISTRY_HOST.search("https://py" + "pi.org/simple")
    assert REGISTRY_HOST.search("files.python" + "hosted.org")
