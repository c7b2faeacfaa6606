"""Pins requirements/cpu.in in requirements/cpu.lock. Run by `make lock`; any Python 3.11 or 3.12 with pip will do.

The pinning is done by uv, which is installed into a virtual environment that is thrown away. Indexes are pip's own:
what its configuration files and PIP_INDEX_URL, PIP_EXTRA_INDEX_URL and PIP_FIND_LINKS say is passed on.

Usage: python tools/lock.py [--upgrade] [more options of `uv pip compile`, such as --extra-index-url URL]
"""

import os
import shlex
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "requirements"
PASSED_ON = ("index-url", "extra-index-url", "find-links")


def indexes_of_pip() -> list[str]:
    """Options that make uv look where pip looks."""
    told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True)
    options: dict[str, None] = {}
    for line in told.stdout.splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        if name in PASSED_ON:
            for place in shlex.split(value)[0].split():
                options[f"--{name}={place}"] = None
    return list(options)


def main() -> None:
    """Writes the lock; what it already pins stays unless --upgrade or a changed requirement moves it."""
    with tempfile.TemporaryDirectory() as scratch:
        venv.create(scratch, with_pip=True)
        python = f"{scratch}/bin/python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"], check=True)
        command = [python, "-m", "uv", "pip", "compile", "cpu.in", "--override", "cpu.overrides"]
        command += [
            "--output-file",
            "cpu.lock",
            "--python-version",
            "3.11",
            "--python-platform",
            "x86_64-manylinux_2_28",
        ]
        # Torch's CPU builds may stand on an index of their own, which must not hide newer versions of all else.
        command += ["--index-strategy", "unsafe-best-match", *indexes_of_pip(), *sys.argv[1:]]
        environment = {**os.environ, "UV_CUSTOM_COMPILE_COMMAND": "make lock"}
        subprocess.run(command, check=True, cwd=FOLDER, env=environment, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
