"""The exporters that ship with qplug keep the contract that third parties are held to."""

from __future__ import annotations

from pathlib import Path

from qplug.registry.registry import Registry
from qplug.testing import ExporterContract
from qplug_awq_format.exporter import AWQFormat
from qplug_compressed_tensors.exporter import CompressedTensors
from qplug_fake.exporter import Fake
from qplug_gptq_format.exporter import GPTQFormat
from qplug_hf.exporter import HuggingFace
from qplug_sglang.engine import SGLang
from qplug_vllm.engine import VLLM


class TestCompressedTensors(ExporterContract):
    exporter = CompressedTensors


class TestSGLang(ExporterContract):
    exporter = SGLang
    served = ("W8A8", None)


class TestVLLM(ExporterContract):
    exporter = VLLM
    served = ("W8A8", None)


class TestFake(ExporterContract):
    exporter = Fake


class TestHuggingFace(ExporterContract):
    exporter = HuggingFace


class TestAWQFormat(ExporterContract):
    exporter = AWQFormat
    served = ("W4A16_ASYM", 32)

    def model(self, folder: Path) -> str:
        return "qplug:demo"  # Marlin takes no matrix as narrow as those of the kit


class TestGPTQFormat(ExporterContract):
    exporter = GPTQFormat

    def model(self, folder: Path) -> str:
        return "qplug:demo"


def test_every_exporter_has_one() -> None:
    """Nothing ships that is not held to it."""
    classes = [kind for kind in ExporterContract.__subclasses__() if kind.__module__ == __name__]
    held = {kind.exporter.name for kind in classes}
    assert held >= set(Registry.installed(only_shipped=True).exporters)
