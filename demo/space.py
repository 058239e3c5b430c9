"""Put the Space together: a folder with all that a Hugging Face Space of this demo needs.

python demo/space.py --model RUN/model --out space
hf upload org/name space . --repo-type space
"""

import argparse
import re
import shutil
import sys
import tomllib
from pathlib import Path

from recognition import DEFAULT_MODEL

from modeling_fer.hub.release import check_model, released_files
from modeling_fer.learning.checkpoint import write_folder

ROOT = Path(__file__).parents[1]
CODE = ("app.py", "pictures.py", "recognition.py")
CARD = """---
title: Facial expression
emoji: 🙂
colorFrom: yellow
colorTo: blue
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
license: apache-2.0
short_description: Perceived expression in photos, videos, by camera
---

Finds the faces of a photograph, a short video or a camera, and says which expression people would see in
each: what is perceived, not what anyone feels. The model, its limits and its terms: `{model}/README.md`. The
code is under Apache-2.0.
"""


def requirements() -> list[str]:
    """What the package needs with videos; Gradio is there already, at the version that the card names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["video"]]


def tested_gradio() -> str:
    """The version of Gradio that the tests ran with."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return re.findall(r"^gradio==(\S+)", pins, re.MULTILINE)[0]


def write_space(model: Path, out: Path) -> None:
    """Write the folder: app, package, model where the app looks for it, requirements, card.

    Raises:
        FileNotFoundError, ValueError: the model is not there, does not load, or has no card.
        FileExistsError: the folder is there already.
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already: delete it, or choose another --out")
    check_model(model)
    files = released_files(model)
    if "README.md" not in files:
        raise ValueError(f"{model} has no card, which says what may be done with it: run `fer card {model}`")

    def write(folder: Path) -> None:
        for name in CODE:
            shutil.copy(ROOT / "demo" / name, folder / name)
        unwanted = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(ROOT / "modeling_fer", folder / "modeling_fer", ignore=unwanted)
        for name, path in files.items():
            target = folder / DEFAULT_MODEL / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        (folder / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")
        card = CARD.format(gradio=tested_gradio(), model=DEFAULT_MODEL)
        (folder / "README.md").write_text(card, encoding="utf-8")

    write_folder(out, write)


def main(argv: list[str] | None = None) -> int:
    """Write the folder, and say what to do with it; what the user can mend is told in one line."""
    parser = argparse.ArgumentParser(description="Put a Hugging Face Space together.")
    parser.add_argument("--model", type=Path, default=ROOT / DEFAULT_MODEL, help="folder with a card in it")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    try:
        write_space(args.model, args.out)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"space: {error}\n")
        return 2
    sys.stdout.write(f"written: {args.out}\nhf upload org/name {args.out} . --repo-type space\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
