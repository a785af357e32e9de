"""GPUs by the names that users know: the only table of them, and the column of each in others.

Memory, bandwidth and rates are those that NVIDIA publishes, of the variant that is most common
where there are several. Rates are dense: where a datasheet states twice the rate "with sparsity",
this table has the half of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qplug.errors import QplugError, did_you_mean

#: The columns of engines' tables: CUDA's compute capabilities (A100, L40, H100, B200), and CPUs.
DEVICES = ("sm80", "sm89", "sm90", "sm100", "cpu")

#: The generation of the GPUs of each column, for people.
GENERATIONS = {"sm80": "Ampere", "sm89": "Ada", "sm90": "Hopper", "sm100": "Blackwell"}


@dataclass(frozen=True)
class GpuModel:
    """A model of GPU: ``architecture`` is CUDA's compute capability (``sm90``).

    ``memory`` is in GiB, ``bandwidth`` of the memory in GB/s. ``bf16``, ``int8`` and ``fp8`` are
    dense tera-operations a second of the tensor cores, 0 where the GPU has none or NVIDIA states
    none. ``source`` names the document with the figures.
    """

    architecture: str
    memory: float
    bandwidth: float
    bf16: float
    int8: float
    fp8: float
    source: str


_AMPERE = "NVIDIA Ampere GA102 GPU architecture whitepaper 2.1"
_ADA = "NVIDIA Ada GPU architecture whitepaper 2.1"
_HOPPER = "NVIDIA H100 Tensor Core GPU datasheet"
_BLACKWELL = "NVIDIA Blackwell architecture technical brief 1.1"
_RTX_BLACKWELL = "NVIDIA RTX Blackwell GPU architecture whitepaper 1.1"
_A100 = "NVIDIA A100 Tensor Core GPU datasheet"
_ULTRA = "NVIDIA HGX B300 and GB300 NVL72 product pages"

#: The models by name: architecture, GiB, GB/s, bf16, int8, fp8, source.
GPUS = {
    "A100": GpuModel("sm80", 80, 2039, 312, 624, 0, _A100),
    "A100-40": GpuModel("sm80", 40, 1555, 312, 624, 0, _A100),
    "A100-80": GpuModel("sm80", 80, 2039, 312, 624, 0, _A100),
    "A800": GpuModel("sm80", 80, 2039, 312, 624, 0, _A100),
    "A30": GpuModel("sm80", 24, 933, 165, 330, 0, "NVIDIA A30 datasheet"),
    "A10": GpuModel("sm86", 24, 600, 125, 250, 0, "NVIDIA A10 datasheet"),
    "A10G": GpuModel("sm86", 24, 600, 70, 140, 0, "NVIDIA A10G datasheet"),
    "A40": GpuModel("sm86", 48, 696, 150, 299, 0, "NVIDIA A40 datasheet"),
    "A5000": GpuModel("sm86", 24, 768, 111, 222, 0, "NVIDIA RTX A5000 datasheet"),
    "A6000": GpuModel("sm86", 48, 768, 155, 310, 0, "NVIDIA RTX A6000 datasheet"),
    "3060": GpuModel("sm86", 12, 360, 25.5, 102, 0, _AMPERE),
    "3080": GpuModel("sm86", 10, 760, 59.5, 238, 0, _AMPERE),
    "3090": GpuModel("sm86", 24, 936, 71, 284, 0, _AMPERE),
    "L4": GpuModel("sm89", 24, 300, 121, 242, 242, "NVIDIA L4 datasheet"),
    "L20": GpuModel("sm89", 48, 864, 119.5, 239, 239, "NVIDIA L20 datasheet"),
    "L40": GpuModel("sm89", 48, 864, 181, 362, 362, "NVIDIA L40 datasheet"),
    "L40S": GpuModel("sm89", 48, 864, 362, 733, 733, "NVIDIA L40S datasheet"),
    "6000 Ada": GpuModel("sm89", 48, 960, 364, 728, 728, "NVIDIA RTX 6000 Ada datasheet"),
    "4070": GpuModel("sm89", 12, 504, 58.3, 233, 117, _ADA),
    "4080": GpuModel("sm89", 16, 717, 97.5, 390, 195, _ADA),
    "4090": GpuModel("sm89", 24, 1008, 165, 661, 330, _ADA),
    "H20": GpuModel("sm90", 96, 4000, 148, 296, 296, "NVIDIA H20 datasheet"),
    "H100": GpuModel("sm90", 80, 3350, 989, 1979, 1979, _HOPPER),
    "H100-PCIE": GpuModel("sm90", 80, 2000, 756, 1513, 1513, _HOPPER),
    "H100-NVL": GpuModel("sm90", 94, 3900, 835, 1671, 1671, _HOPPER),
    "H800": GpuModel("sm90", 80, 3350, 989, 1979, 1979, _HOPPER),
    "H200": GpuModel("sm90", 141, 4800, 989, 1979, 1979, "NVIDIA H200 datasheet"),
    "GH200": GpuModel("sm90", 96, 4000, 989, 1979, 1979, "NVIDIA GH200 datasheet"),
    "B100": GpuModel("sm100", 180, 8000, 1750, 3500, 3500, _BLACKWELL),
    "B200": GpuModel("sm100", 180, 8000, 2250, 4500, 4500, _BLACKWELL),
    "GB200": GpuModel("sm100", 186, 8000, 2500, 5000, 5000, _BLACKWELL),
    "B300": GpuModel("sm103", 270, 8000, 2250, 0, 4500, _ULTRA),
    "GB300": GpuModel("sm103", 279, 8000, 2500, 0, 5000, _ULTRA),
    "5070": GpuModel("sm120", 12, 672, 61.7, 247, 123, _RTX_BLACKWELL),
    "5080": GpuModel("sm120", 16, 960, 113, 450, 225, _RTX_BLACKWELL),
    "5090": GpuModel("sm120", 32, 1792, 210, 838, 419, _RTX_BLACKWELL),
    "PRO 6000": GpuModel(
        "sm120", 96, 1792, 500, 1000, 1000, "NVIDIA RTX PRO 6000 Blackwell datasheet"
    ),
}

#: Compute capabilities that no engine's table has, and the nearest one that tables have.
NEAREST = {"sm86": "sm80", "sm87": "sm80", "sm103": "sm100", "sm120": "sm100", "sm121": "sm100"}

#: Words in the full names of GPUs that are no part of the short name; then those that tell variants
#: apart of some models only.
_LEFT_OUT = {"nvidia", "geforce", "rtx", "tesla", "blackwell", "generation", "edition"}
_VARIANTS = {"workstation", "server", "max", "q", "pcie", "sxm", "sxm4", "sxm5"}


@dataclass(frozen=True)
class Column:
    """A column of the engines' tables: a name in ``DEVICES``, and a remark if it only comes near.

    The remark is empty if the column is that of the GPU.
    """

    device: str
    remark: str = ""


def model_named(name: str) -> tuple[str, GpuModel] | None:
    """Returns the model with the name ``name``, and its name in ``GPUS``; None if there is none.

    Case, hyphens and words such as NVIDIA and RTX do not count: ``NVIDIA GeForce RTX 4090`` is
    ``4090``. Of a name with a memory size, ``NVIDIA A100-SXM4-40GB``, the size counts.
    """
    text = re.sub(r"(?<=\d)gb\b", "", re.sub(r"\brtx(?=\w)", "rtx ", name.lower()))
    words = re.split(r"[-_ ]+", text)
    known = {re.sub("[- ]", "", key.lower()): key for key in GPUS}
    for left_out in (set(), _LEFT_OUT, _LEFT_OUT | _VARIANTS):
        short = "".join(word for word in words if word not in left_out)
        if short in known:
            return known[short], GPUS[known[short]]
    # The driver names H100s by their memory too: NVIDIA H100 80GB HBM3.
    key = next((known[word] for word in words if word in known), None)
    return (key, GPUS[key]) if key is not None and words[0] in _LEFT_OUT else None


def named_column(name: str) -> Column:
    """Returns the column for ``name``: a name in ``GPUS``, a compute capability, or ``cpu``.

    Raises QplugError for another name.
    """
    found = model_named(name)
    architecture = found[1].architecture if found else name.lower()
    if architecture not in (*DEVICES, *NEAREST):
        names = [*GPUS, *sorted({*DEVICES, *NEAREST})]
        hint = did_you_mean(name.upper(), GPUS) or did_you_mean(name.lower(), names)
        raise QplugError(f"{name}: not a known GPU.{hint} There are: {', '.join(names)}")
    return column_of(architecture, name)


def column_of(architecture: str, name: str) -> Column:
    """Returns the column for a compute capability; ``name`` is the GPU for messages.

    Raises QplugError if no column is near.
    """
    if architecture in DEVICES:
        return Column(architecture)
    near = NEAREST.get(architecture)
    if near is None:
        raise QplugError(f"{name} is {architecture}, which no engine's table has")
    title = architecture if name == architecture else f"{name} is {architecture}"
    return Column(near, f"{title}; no table has it, the nearest is {near}, which may differ")
