from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_output_in_the_readme_is_what_the_code_prints_today() -> None:
    command = [sys.executable, str(Path(__file__).parent.parent / "docs" / "outputs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nmake readme writes it anew"
