"""`make test-browser` fails where it cannot test, and says what to install."""

import shutil
import subprocess

import pytest
from test_app import ROOT


@pytest.mark.parametrize(
    ("there", "message"), [((), "apt-get install chromium"), (("chromium",), "apt-get install npm")]
)
def test_what_is_missing_is_told(there, message, tmp_path):
    bare, copy = tmp_path / "bin", tmp_path / "copy"
    bare.mkdir()
    shutil.copytree(ROOT / "demo/web", copy / "demo/web", ignore=shutil.ignore_patterns("vendor"))
    shutil.copy(ROOT / "Makefile", copy)
    for name in ("make", "sh", "dirname", "sha256sum"):
        if (found := shutil.which(name)) is None:
            pytest.skip(f"no {name}")
        (bare / name).symlink_to(found)
    for name in there:
        (bare / name).symlink_to(bare / "sh")
    command = ["make", "--old-file=demo/.venv/.installed", "test-browser"]
    done = subprocess.run(command, cwd=copy, env={"PATH": str(bare)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
