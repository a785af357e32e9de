"""A model of the table has the tree that transformers builds, or none of the table's."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qplug import TensorSpec
from qplug.api.tensors import Checkpoint, StoredTensor
from qplug.errors import QplugError
from qplug.model import view
from qplug.model.architectures import by_linear
from qplug.model.plain_models import PLAIN_MODELS, PlainModel, plain_tree
from qplug.model.skeleton import Skeleton
from qplug.planning.headers import RemoteTensor
from qplug.registry.registry import Registry

#: Sizes that are all different.
SIZES: dict[str, Any] = {
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
#: Values that a damaged or a strange config.json may have in a field.
ODD: tuple[object, ...] = (
    *(None, True, False, 0, 1, 2, -1, 3, 64, 0.5, 1.0, 1e9, "", "silu", "gelu", "bfloat16"),
    *([], [0], [0, 1], ["full_attention"] * 3, ["sliding_attention"] * 3, {}, {"rope_theta": 1.0}),
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "yarn", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
)
FIELDS = (
    *SIZES,
    *("attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "initializer_range"),
    *("layer_types", "max_window_layers", "mlp_bias", "pad_token_id", "pretraining_tp"),
    *("rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "torch_dtype"),
    *("transformers_version", "use_cache", "use_sliding_window", "strange"),
)
FIELDS_OF_EXPERTS = (
    *EXPERTS,
    *("decoder_sparse_step", "mlp_only_layers", "norm_topk_prob", "output_router_logits"),
    "router_aux_loss_coef",
)


def config_of(row: PlainModel, **changes: Any) -> dict[str, Any]:
    """A config.json of a small model of ``row``."""
    plain = {"architectures": [row.architecture], "model_type": row.model_type, **SIZES}
    if row.model_type == "qwen2":  # its heads are as wide as its stream has room
        del plain["head_dim"]
    return {**plain, **(EXPERTS if row.experts else {}), **changes}


def tensors_of(row: PlainModel, config: dict[str, Any], folder: Path) -> dict[str, StoredTensor]:
    """Tensors without values, as a checkpoint of ``config`` has them by transformers."""
    skeleton = _skeleton(config, folder)
    names = ["model.embed_tokens.weight"]
    names += [] if config["tie_word_embeddings"] else ["lm_head.weight"]
    for number in range(config["num_hidden_layers"]):
        names += [f"model.layers.{number}.{n}" for n in row.others]
        names += [f"model.layers.{number}.{n}.weight" for n in row.linears]
        for expert in range(config["num_experts"] if row.experts else 0):
            own = (n.replace("*", str(expert)) for n in row.experts)
            names += [f"model.layers.{number}.{n}.weight" for n in own]
    shapes = skeleton.names([*names, "model.norm.weight"]).shapes
    return {
        name: RemoteTensor(folder / "model.safetensors", TensorSpec("bfloat16", shape))
        for name, shape in shapes.items()
    }


def _skeleton(config: dict[str, Any], folder: Path) -> Skeleton:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return Skeleton(folder)


def checkpoint_of(row: PlainModel, folder: Path, **changes: Any) -> Checkpoint:
    config = config_of(row, **changes)
    return Checkpoint(folder, config, tensors_of(row, config, folder))


def by_transformers(checkpoint: Checkpoint) -> object:
    """The view that the module tree of transformers gives, or the error."""
    skeleton = _skeleton(dict(checkpoint.config), checkpoint.folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view, "plain_tree", lambda checkpoint: None)
        try:
            return view.model_view(checkpoint, skeleton)
        except QplugError as error:
            return error


by_row = pytest.mark.parametrize("row", PLAIN_MODELS, ids=lambda row: row.model_type)


@by_row
@pytest.mark.parametrize("is_tied", [False, True])
def test_the_table_has_the_view_of_transformers(
    row: PlainModel, is_tied: bool, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(row, tmp_path, tie_word_embeddings=is_tied)
    assert plain_tree(checkpoint) is not None
    found = view.model_view(checkpoint)
    assert ("lm_head" in found.linears) == (not is_tied)
    assert found == by_transformers(checkpoint)
    assert by_linear(checkpoint, Registry.installed(), Skeleton(tmp_path)) == checkpoint


@by_row
def test_a_tied_head_may_be_stored(row: PlainModel, tmp_path: Path) -> None:
    untied = checkpoint_of(row, tmp_path)
    checkpoint = replace(untied, config={**untied.config, "tie_word_embeddings": True})
    assert plain_tree(checkpoint) is not None
    assert view.model_view(checkpoint) == by_transformers(checkpoint)


@by_row
def test_whatever_a_field_says_the_table_says_what_transformers_does(
    row: PlainModel, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(row, tmp_path)
    taken = 0
    for changed in _changed(row, checkpoint):
        if plain_tree(changed) is not None:
            taken += 1
            assert view.model_view(changed) == by_transformers(changed), changed.config
    assert taken > 10


def _changed(row: PlainModel, checkpoint: Checkpoint) -> Iterator[Checkpoint]:
    """Yields ``checkpoint`` with one field of its config.json changed, added or taken away."""
    for key in (*FIELDS, *(FIELDS_OF_EXPERTS if row.experts else ())):
        others = {k: v for k, v in checkpoint.config.items() if k != key}
        yield replace(checkpoint, config=others)
        for value in ODD:
            yield replace(checkpoint, config={**others, key: value})


@by_row
def test_a_checkpoint_with_other_tensors_is_left_to_transformers(
    row: PlainModel, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(row, tmp_path)
    for name, stored in checkpoint.tensors.items():
        without = {n: t for n, t in checkpoint.tensors.items() if n != name}
        wider = TensorSpec("bfloat16", (*stored.spec.shape[:-1], stored.spec.shape[-1] + 1))
        codes = TensorSpec("uint8", stored.spec.shape)
        for other in (
            without,
            {**without, f"{name}.more": stored},
            {**checkpoint.tensors, f"{name}.more": stored},
            {**without, name: RemoteTensor(tmp_path, wider)},
            {**without, name: RemoteTensor(tmp_path, codes)},
        ):
            assert plain_tree(replace(checkpoint, tensors=other)) is None


def test_real_sizes_are_plain(tmp_path: Path) -> None:
    """Qwen3-8B and Llama 3.1 8B, as they are published."""
    rows = {row.model_type: row for row in PLAIN_MODELS}
    published: dict[str, dict[str, Any]] = {
        "qwen3": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "initializer_range": 0.02,
            "max_window_layers": 36,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0",
            "use_cache": True,
            "use_sliding_window": False,
        },
        "llama": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": [1, 8, 9],
            "initializer_range": 0.02,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.43.0.dev0",
            "use_cache": True,
        },
    }
    for kind, fields in published.items():
        assert plain_tree(checkpoint_of(rows[kind], tmp_path / kind, **fields)) is not None


#: What a run that only rounds must not import, since each takes seconds.
HEAVY = ("transformers", "tokenizers", "torch._dynamo", "torch.distributed.tensor", "sympy")


def test_rounding_imports_no_model_code(tmp_path: Path) -> None:
    code = (
        "import sys; from qplug.cli.main import main\n"
        f"words = ['quantize', 'qplug:demo', '--out', {str(tmp_path / 'out')!r}, '--algo', 'rtn',\n"
        "         '--scheme', 'W4A16', '--device', 'cpu', '--no-check']\n"
        "assert main(words, standalone_mode=False) in (None, 0)\n"
        f"print('found', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "found []"
    assert (tmp_path / "out" / "config.json").is_file()
