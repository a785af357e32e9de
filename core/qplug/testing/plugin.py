"""Fixtures for the tests of plugins: ``pytest_plugins = ["qplug.testing.plugin"]``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qplug.registry.registry import Registry
from qplug.testing.models import tiny_tokenizer as make_tokenizer
from qplug.testing.models import write_tiny_model
from qplug.testing.registries import bare_registry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two blocks and its tokenizer; tests must not change it."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each printable ASCII character."""
    return make_tokenizer()


@pytest.fixture
def registry() -> Registry:
    """A registry without plugins; ``registry.with_(plugin)`` is a registry with one."""
    return bare_registry()
