"""The exporters that ship with qplug keep the contract that third parties are held to."""

from __future__ import annotations

from qplug.testing import ExporterContract
from qplug_compressed_tensors.exporter import CompressedTensors
from qplug_fake.exporter import Fake
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
