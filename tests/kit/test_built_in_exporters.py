"""The exporters that ship with qplug keep the contract that third parties are held to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from zoo.make import make

from qplug.registry.registry import Registry
from qplug.testing import ExporterContract
from qplug_awq_format.exporter import AWQExporter
from qplug_compressed_tensors.exporter import CompressedTensorsExporter
from qplug_fake.exporter import Fake
from qplug_gpt_oss.exporter import GptOssExporter
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


class TestGptOss(ExporterContract):
    exporter = GptOssExporter
    linear = "model.layers.0.mlp.experts.0.up_proj"
    model_config: ClassVar[Mapping[str, Any]] = {"model_type": "gpt_oss"}
    served = ("MXFP4A16", None)

    def model(self, folder: Path) -> str:
        return str(make("gpt_oss", folder / "gpt_oss"))


def test_every_exporter_has_one() -> None:
    """Nothing ships that is not held to it."""
    classes = [kind for kind in ExporterContract.__subclasses__() if kind.__module__ == __name__]
    held = {kind.exporter.name for kind in classes}
    assert held >= set(Registry.installed(only_shipped=True).exporters)
