"""Contracts, the tests that every plugin must pass, and small models to test with; needs pytest.

Subclass a contract in your own tests::

    class TestMine(AlgorithmContract):
        algorithm = Mine

Every check fails with a sentence that says what to correct. New checks are added in minor releases
only, and the release notes name them.
"""

from __future__ import annotations

from qplug.testing.algorithm import AlgorithmContract
from qplug.testing.blocks import tiny_block, tiny_linear
from qplug.testing.dataset import DatasetContract
from qplug.testing.exporter import ExporterContract
from qplug.testing.models import ByteTokenizer, tiny_model, tiny_tokenizer, write_tiny_model
from qplug.testing.reader import ReaderContract
from qplug.testing.registries import KitText, bare_registry, registry_with

__all__ = [
    "AlgorithmContract",
    "ByteTokenizer",
    "DatasetContract",
    "ExporterContract",
    "KitText",
    "ReaderContract",
    "bare_registry",
    "registry_with",
    "tiny_block",
    "tiny_linear",
    "tiny_model",
    "tiny_tokenizer",
    "write_tiny_model",
]


def __dir__() -> list[str]:
    return __all__
