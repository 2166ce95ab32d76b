"""Python environments of their own, for programs whose requirements do not go together with ours.

`environments/<name>.txt` lists what an environment holds, with versions. It is made in `runs/environments/<name>` when
it is first asked for, and again when its list has changed. The installer's own settings (PIP_INDEX_URL, PIP_FIND_LINKS)
say where packages come from.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from distillabse.storage import sha256_of_file

LISTS = Path(__file__).parent / "environments"
FOLDER = Path("runs/environments")


def interpreter(name: str) -> Path:
    """The Python interpreter of an environment, which is made first where it is not there.

    Raises:
        FileNotFoundError: there is no list of that name.
        subprocess.CalledProcessError: pip could not install it; what it printed is on standard error.
    """
    wanted = LISTS / f"{name}.txt"
    digest, folder = sha256_of_file(wanted), FOLDER / name
    python, made_from = folder / "bin" / "python", folder / "made-from.txt"
    if not made_from.is_file() or made_from.read_text() != digest:
        print(f"Making the environment {folder} from {wanted}", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--requirement", wanted], check=True, stdout=sys.stderr
        )
        made_from.write_text(digest)
    return python.absolute()
