"""The wheel: it holds what the package needs besides code, and shows its help where nothing else is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = (".safetensors", ".json", ".j2", ".css", ".js", ".typed", ".model", ".txt", ".jinja")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the working tree, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("trimtab-*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    def names(folder: Path) -> set[str]:
        files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        return {path.relative_to(folder).as_posix() for path in files if path.suffix in (".py", *DATA)}

    assert names(wheel / "trimtab") == names(ROOT / "src" / "trimtab")


@pytest.mark.parametrize("words", [["--help"], ["compare", "--help"], ["report", "absent"]])
def test_it_runs_with_no_dependency_installed(wheel: Path, words: list[str], tmp_path: Path) -> None:
    # -S: no site-packages. No HOME either.
    environment = {"PYTHONPATH": str(wheel), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-S", "-m", "trimtab", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert (done.returncode, done.stderr) in ((0, ""), (2, "trimtab: there is no folder absent\n"))
