"""The exporters that ship with qplug keep the contract that third parties are held to."""

from __future__ import annotations

from pathlib import Path

from qplug.registry.registry import Registry
from qplug.testing import ExporterContract
from qplug_awq_format.exporter import AWQExporter
from qplug_compressed_tensors.exporter import CompressedTensorsExporter
from qplug_fake.exporter import Fake
from qplug_gptq_format.exporter import GPTQExporter
from qplug_hf.exporter import HuggingFace
from qplug_sglang.exporter import SGLangExporter
from qplug_vllm.exporter import VLLMExporter


class TestCompressedTensors(ExporterContract):
    exporter = CompressedTensorsExporter


class TestSGLang(ExporterContract):
    exporter = SGLangExporter
    served = ("W8A8", None)


class TestVLLM(ExporterContract):
    exporter = VLLMExporter
    served = ("W8A8", None)


class TestFake(ExporterContract):
    exporter = Fake


class TestHuggingFace(ExporterContract):
    exporter = HuggingFace


class TestAWQFormat(ExporterContract):
    exporter = AWQExporter
    served = ("W4A16_ASYM", 32)

    def model(self, folder: Path) -> str:
        return "qplug:demo"  # Marlin takes no matrix as narrow as those of the kit


class TestGPTQFormat(ExporterContract):
    exporter = GPTQExporter

    def model(self, folder: Path) -> str:
        return "qplug:demo"


def test_every_exporter_has_one() -> None:
    """Nothing ships that is not held to it."""
    classes = [kind for kind in ExporterContract.__subclasses__() if kind.__module__ == __name__]
    held = {kind.exporter.name for kind in classes}
    assert held >= set(Registry.installed(only_shipped=True).exporters)
