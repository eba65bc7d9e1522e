"""An interpreter that only seems to have an engine."""

import sys
from pathlib import Path

ASKED = "import json, sys; asked = sys.argv[1:]\nif asked[0] == '-c': sys.exit(0)\n"
"""Of an interpreter: it has every engine that it is asked for."""


def interpreter(directory: Path, code: str) -> str:
    """An executable that runs this code where a worker would be."""
    file = directory / "python"
    file.write_text(f"#!{sys.executable}\n{ASKED}{code}")
    file.chmod(0o755)
    return str(file)
