"""LLMC's own files, unmodified but for their placeholder paths, if they are at hand.

``QPLUG_LLMC_CONFIGS=.../configs/quantization pytest -m llmc tests/recipe/test_llmc_files.py`` runs
every file of ``backend/sglang`` and ``backend/vllm`` on small models: its algorithm, its scheme and
its stages, on less data. So it does with ``methods`` and ``combination``, of which docs/llmc.md
says what each becomes. Steps that read what another step writes run after it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import Result
from safetensors.torch import load_file, save_file

from qplug.checkpoint.locate import find_model
from qplug.recipe.files import read_job
from qplug.recipe.llmc.data import STAGES
from qplug.registry.registry import Registry

Cli = Callable[..., Result]
pytestmark = pytest.mark.llmc

ROOT = Path(os.environ.get("QPLUG_LLMC_CONFIGS", "no such folder"))
PAGE = Path(__file__).parents[2] / "docs/llmc.md"


def files_in(*folders: str) -> list[str]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.yml"))]
    return [path.relative_to(ROOT).as_posix() for path in found]


SERVED = files_in("backend/sglang", "backend/vllm")
MEASURED = files_in("combination", "methods")
NONE = "QPLUG_LLMC_CONFIGS must name a folder with files"
#: What docs/llmc.md says that files become, by patterns of their names.
ROWS = re.findall(
    r"^\| `((?:methods|combination)/.*?)` \| (.*?) \|$", PAGE.read_text("utf-8"), re.M
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and models that take windows of 2048 tokens: ``model``, and ``deep`` of 6 blocks."""
    root = tmp_path_factory.mktemp("llmc")
    lines = (f"The {n}th line of a text is about {n * n}, or {n % 7}." for n in range(250))
    (root / "text.txt").write_text("\n".join(lines))
    for name in ("wikitext2", "c4"):
        (root / "texts" / name).mkdir(parents=True)
        shutil.copy(root / "text.txt", root / "texts" / name)
    demo_of(2, root / "model")
    demo_of(6, root / "deep")
    return root


def demo_of(blocks: int, folder: Path) -> None:
    """The demo model with so many blocks: some of them, or some of them twice."""
    shutil.copytree(find_model("qplug:demo"), folder)
    config = json.loads((folder / "config.json").read_text())
    count = config["num_hidden_layers"]
    config |= {"max_position_embeddings": 4096, "num_hidden_layers": blocks}
    (folder / "config.json").write_text(json.dumps(config))
    made = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        inside = re.fullmatch(r"(model\.layers\.)(\d+)(\..*)", name)
        if inside is None:
            made[name] = tensor
            continue
        for block in range(int(inside[2]), blocks, count):
            made[f"{inside[1]}{block}{inside[3]}"] = tensor.clone()
    save_file(made, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def deepseek(place: Path) -> Path:
    """A random DeepSeek-V3 in blocks of fp8, whose widths groups of 128 divide.

    Its experts are wider than a group: vLLM mixes up the scales of others, so they are refused.
    """
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=128,
        q_lora_rank=128,
        qk_rope_head_dim=64,
        qk_nope_head_dim=64,
        v_head_dim=64,
    )
    folder = place / "deepseek"
    DeepseekV3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model("qplug:demo") / name, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, weight in list(tensors.items()):
        if "_proj" in name and weight.ndim == 2:
            rows, columns = -(-weight.shape[0] // 128), -(-weight.shape[1] // 128)
            tensors[name] = weight.to(torch.float8_e4m3fn)  # scales of 1
            tensors[f"{name}_scale_inv"] = torch.ones(rows, columns)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    told = json.loads((folder / "config.json").read_text())
    told["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def filled(text: str, place: Path, engine: str, model: Path) -> str:
    """The file with every placeholder replaced, and nothing else."""
    several = re.search(r"name: \[.*,", text)
    data = place / ("texts" if several else "text.txt")
    section = ""
    lines = []
    for line in text.splitlines():
        section = line.partition(":")[0] if re.match(r"\w", line) else section
        indent, key = re.match(r"( *)(\w*)", line).groups()  # type: ignore[union-attr]
        if key == "path" and section in ("calib", "eval"):
            line = f"{indent}path: {data}"
        elif key == "path" and "/path/to/save" not in line:
            line = f"{indent}path: {model}"
        lines.append(line.replace("/path/to", str(place / engine)))
    return "\n".join(lines).replace("../cache", str(place / engine)) + "\n"


def stages(told: str) -> list[str]:
    """The stages at which a file asks for perplexities, in their order."""
    sections = yaml.safe_load(told).get("eval") or []
    found = []
    for section in [sections] if isinstance(sections, dict) else sections:
        if section.get("type", "ppl") == "ppl":
            names = section["name"] if isinstance(section["name"], list) else [section["name"]]
            asked = {STAGES[at] for at in section["eval_pos"] if at in STAGES}
            found += [stage for stage in asked for _ in names]
    return sorted(found, key=list(dict.fromkeys(STAGES.values())).index)


@pytest.mark.parametrize("file", [*SERVED, *MEASURED] or [NONE])
def test_a_file_of_llmc(
    file: str,
    place: Path,
    request: pytest.FixtureRequest,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)  # some have a relative save_path
    model = place / ("deep" if "MixPrecision" in file else "model")
    model = request.getfixturevalue("deepseek") if "dsv3" in file else model
    told = filled((ROOT / file).read_text(), place, file.split("/")[1], model)
    path = place / "f.yml"
    path.write_text(told)
    becomes = next((told for pattern, told in ROWS if fnmatchcase(file, pattern)), None)
    checked = cli("config", "check", path)
    if becomes is not None and becomes.startswith("refused: "):
        assert checked.exit_code == 1
        line = checked.output.splitlines()[-1]
        assert re.match(rf"Error: {re.escape(str(path))}:\d+: ", line)
        assert becomes.removeprefix("refused: ") in line
        assert cli("quantize", "--config", path).output == f"opening {path}\n{checked.output}"
        return
    assert checked.exit_code == 0, checked.output
    if file in MEASURED:
        assert f": valid LLMC file: {becomes}, ".replace("`", "") in checked.stdout

    registry = Registry.installed()
    converted = cli("config", "convert", path)
    (place / "native.yml").write_text(converted.stdout)
    assert cli("config", "check", place / "native.yml").exit_code == 0
    assert read_job(place / "native.yml", registry).job == read_job(path, registry).job

    out = re.search(r"save_path: *(\S+)", told)
    assert out is not None
    saves = re.findall(r"save_(\w+): True", told)
    folder = Path(out[1]) / ("transformed_model" if saves == ["trans"] else "")
    words: tuple[object, ...] = ("--samples", 2, "--device", "cpu")
    if not {"trans", "sgl", "vllm"} & set(saves):
        folder, words = place / "out", (*words, "--out", place / "out", "--backend", "fake")
    # Several files have one save_path between them; one step 2 reads what another's step 1 wrote.
    shutil.rmtree(folder, ignore_errors=True)
    result = cli("quantize", "--config", path, "--json", *words)
    assert result.exit_code == 0, result.output
    done = json.loads(result.stdout)
    (written,) = done["results"]
    assert Path(written["out"]) == folder
    assert [measured["at"] for measured in done["measured"]] == stages(told)
    checked = cli("verify", folder)
    assert checked.exit_code == 0, checked.output


def test_the_folder_is_whole() -> None:
    assert len(SERVED) == 34, "set QPLUG_LLMC_CONFIGS to LLMC's configs/quantization"


def test_the_page_names_every_file() -> None:
    fits = {file: [p for p, _ in ROWS if fnmatchcase(file, p)] for file in MEASURED}
    assert [file for file, patterns in fits.items() if not patterns] == []
    assert {pattern for pattern, _ in ROWS} == {patterns[0] for patterns in fits.values()}
