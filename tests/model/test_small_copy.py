"""The small copy on which rewrites are tried keeps one block of each kind of an architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
from zoo.make import make

import qplug
from qplug import QplugError
from qplug.model.hollow import load_config
from qplug.model.small_copy import SmallCopy


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("mamba2", ["linear_attention"]),
        ("jamba", ["linear_attention", "full_attention"]),
        ("bamba", ["linear_attention", "full_attention"]),
        ("recurrent_gemma", ["linear_attention", "sliding_attention"]),
    ],
)
def test_types_of_blocks_that_the_configuration_computes(
    name: str, types: list[str], tmp_path: Path
) -> None:
    """They are computed from the number of blocks, and that of the copy is another."""
    folder = make(name, tmp_path / name)
    config = load_config(folder, trust_remote_code=False)
    copy = SmallCopy(config, folder, False)
    text = copy.model.config.get_text_config()
    assert set(text.layer_types) == set(types)
    assert text.layer_types == [config.get_text_config().layer_types[at] for at in copy.first]
    assert text.num_hidden_layers == len(copy.first) == len(copy.run().hidden)


def test_a_part_for_text_that_does_not_say_whether_its_words_are_tied(tmp_path: Path) -> None:
    folder = make("glm4v", tmp_path / "glm4v")
    with pytest.raises(QplugError, match=r"layers\.0: cannot be rotated: no linear reads"):
        qplug.quantize(
            str(folder), tmp_path / "out", algo="quarot+rtn", scheme="W8A8", backend="vllm"
        )


def test_norms_that_multiply_by_no_parameter(tmp_path: Path) -> None:
    """Those within the mixers of Falcon-Mamba keep ones in a buffer."""
    folder = make("falcon_mamba", tmp_path / "falcon_mamba")
    with pytest.raises(QplugError, match="nothing is left to quantize"):
        qplug.quantize(
            str(folder), tmp_path / "out", algo="quarot+rtn", scheme="W8A8", backend="vllm"
        )


def test_a_model_without_logits(tmp_path: Path) -> None:
    folder = make("roberta_embedding", tmp_path / "roberta")
    with pytest.raises(QplugError, match="computes no logits, by which") as error:
        qplug.quantize(
            str(folder), tmp_path / "out", algo="quarot+rtn", scheme="W8A8", backend="vllm"
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("blip2", "the model computes nothing of text without pixel_values, so"),
        ("gemma3n_text", r"a small copy of the model, on which .* take an algorithm that rewrites"),
        ("zamba2", r"model\.embed_tokens\.weight: more than norms read what it writes, so"),
        ("xglm", r"model\.layers\.0: cannot be rotated: it computes otherwise then; take an"),
    ],
)
def test_what_is_said_of_models_that_cannot_be_rotated(
    name: str, says: str, tmp_path: Path
) -> None:
    folder = make(name, tmp_path / name)
    with pytest.raises(QplugError, match=says) as error:
        qplug.quantize(
            str(folder), tmp_path / "out", algo="quarot+rtn", scheme="W8A8", backend="vllm"
        )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
