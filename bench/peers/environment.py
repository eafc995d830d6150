"""The peers' own virtual environment, built when first asked for and when its pins change.

It lies in ``bench/.venv-peers``, which git ignores, because peers pin versions of NumPy that the
package does not share.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parent / ".venv-peers"
PINS = (HERE / "requirements.txt", HERE / "constraints.txt")


def peers_python() -> Path:
    """Return the interpreter of the peers' environment, building the environment if need be.

    Raises
    ------
    subprocess.CalledProcessError
        If pip cannot install the peers; what it said stands on stderr.
    """
    python = ENVIRONMENT / "bin" / "python"
    pins = "".join(file.read_text() for file in PINS)
    stamp = ENVIRONMENT / "installed-pins"
    if python.exists() and stamp.exists() and stamp.read_text() == pins:
        return python
    print(f"building the peers' environment in {ENVIRONMENT.name} (a minute or two)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
    pip = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", PINS[0], "-c", PINS[1]], check=True, env=_environment())
    stamp.write_text(pins)
    return python


def _environment() -> dict[str, str]:
    """Return this process's variables without those that would point Python at other packages."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
