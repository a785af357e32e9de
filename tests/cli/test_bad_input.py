"""What the user can mend is one line that says where it is wrong, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from qplug.checkpoint.open import INDEX
from qplug.errors import QplugError, shown
from qplug.machine.devices import find_device
from qplug.output import disk
from qplug.output.journal import Journal
from qplug.run.quantize import quantize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from click.testing import Result

    Contents = Callable[[Path], dict[str, bytes | None]]
    Refused = Callable[..., str]

FIRST = "model-00001-of-00002.safetensors"
LAST = "model-00002-of-00002.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"  # is in FIRST
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def refused(tmp_path: Path, cli: Callable[..., Result], contents: Contents) -> Refused:
    """Runs ``qplug quantize``, which must say no and leave ``tmp_path`` as it was.

    Gives the message. ``--out`` is a new folder unless ``words`` have another.
    """

    def run(model: object, *words: object, exit_code: int = 1) -> str:
        before = contents(tmp_path)
        out = () if "--out" in words else ("--out", tmp_path / "out")
        result = cli("quantize", "--algo", "rtn", model, *out, *words)
        assert contents(tmp_path) == before
        assert result.stdout == ""
        assert isinstance(result.exception, SystemExit), result.exception
        lines = result.stderr.splitlines()
        if exit_code == 1:
            said = ("opening ", f"{model} (")  # what it opens, and the plan
            assert all(line.startswith(said) for line in lines[:-1])
        assert result.exit_code == exit_code
        assert lines[-1].startswith("Error: ")
        return lines[-1].removeprefix("Error: ")

    return run


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    held = json.loads(path.read_text())
    change(held)
    path.write_text(json.dumps(held))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    held = load_file(path)
    change(held)
    save_file(held, path, {"format": "pt"})


def test_the_checkpoint_that_the_tests_break_is_whole(
    llama: Path, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    assert cli("quantize", "--algo", "rtn", llama, "--out", tmp_path / "out").exit_code == 0
    assert Q_PROJ in load_file(llama / FIRST)


# --- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["missing", "./missing", "a/b/c", "x" * 300, "a\0b"])
def test_no_such_folder(name: str, refused: Refused) -> None:
    assert refused(name) == f"{shown(name)}: no such folder"


def test_a_hub_id_without_a_network(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants  # not an attribute of the package before its import

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert refused("someone/a-model") == (
        "someone/a-model: no folder on this machine, and not downloaded from the Hub: it is not in "
        "the Hub's cache, and HF_HUB_OFFLINE is set; unset the variable; or pass the path of a "
        "folder"
    )


def test_what_cannot_be_a_hub_id(refused: Refused) -> None:
    assert refused("some one/a model") == (
        "some one/a model: no folder on this machine, and not downloaded from the Hub: a "
        "repository on the Hub cannot have this name; or pass the path of a folder"
    )


def test_a_hub_that_cannot_be_reached(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no snapshot") from OSError(-2, "Name or service not known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    assert refused("someone/a-model") == (
        "someone/a-model: no folder on this machine, and not downloaded from the Hub: the Hub "
        "cannot be reached; check the network; or pass the path of a folder"
    )


def test_a_file_for_a_model(llama: Path, refused: Refused) -> None:
    assert refused(llama / "config.json") == f"{llama / 'config.json'}: no such folder"


def test_no_config(llama: Path, refused: Refused) -> None:
    (llama / "config.json").unlink()
    assert refused(llama) == f"{llama}: has no config.json"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"", "cannot be read: Expecting value"),
        (b"{", "cannot be read: Expecting property name"),
        (b"\xff\xfe\xff", "cannot be read: "),
        (b"[]", "is not a JSON mapping"),
    ],
)
def test_a_config_that_is_not_json(
    text: bytes, complaint: str, llama: Path, refused: Refused
) -> None:
    (llama / "config.json").write_bytes(text)
    assert refused(llama).startswith(f"{llama / 'config.json'}: {complaint}")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "llama9000"}, "llama9000"),
        ({"model_type": None}, "unknown architecture"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "lacks embeddings."),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_hidden_layers": -1}, "no list of decoder blocks"),
        ({"num_attention_heads": 0, "head_dim": None}, "by zero"),
        ({"hidden_act": "nonsense"}, "nonsense"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_of_no_model(
    changes: dict[str, Any], complaint: str, llama: Path, refused: Refused
) -> None:
    edit_json(llama / "config.json", lambda config: config.update(changes))
    message = refused(llama)
    assert str(llama) in message
    assert complaint in message


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_model_quantized_in_a_format_that_no_reader_reads(
    key: str, llama: Path, refused: Refused
) -> None:
    edit_json(llama / "config.json", lambda config: config.update({key: {"quant_method": "hqq"}}))
    assert refused(llama) == (
        f"{llama}: is quantized already, and no reader reads its quant_method 'hqq'; quantize the "
        "float model it came from"
    )


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "modelopt"])
def test_a_float_model_that_says_it_is_quantized(
    method: str, llama: Path, refused: Refused
) -> None:
    told = {"quantization_config": {"quant_method": method}}
    edit_json(llama / "config.json", lambda config: config.update(told))
    assert refused(llama) == (
        f"{llama / 'config.json'}: says that weights are quantized ({method}): none is"
    )


# --- its files -----------------------------------------------------------------------------------


def test_no_weights(llama: Path, refused: Refused) -> None:
    (llama / INDEX).unlink()
    assert refused(llama) == f"{llama}: has neither model.safetensors nor {INDEX}"


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_a_truncated_shard(left: int, llama: Path, refused: Refused) -> None:
    whole = (llama / LAST).read_bytes()
    (llama / LAST).write_bytes(whole[:left])
    message = refused(llama)
    assert message.startswith(f"{llama / LAST}: ")
    if left < 0:
        told = f"cut short: its header describes {len(whole)} bytes, it has {len(whole) - 1}"
        assert message == f"{llama / LAST}: {told}"


def test_a_corrupt_header(llama: Path, refused: Refused) -> None:
    whole = bytearray((llama / FIRST).read_bytes())
    whole[8:20] = b"not JSON at "
    (llama / FIRST).write_bytes(whole)
    assert refused(llama).startswith(f"{llama / FIRST}: not a sound safetensors file: ")


def test_an_index_that_names_a_missing_file(llama: Path, refused: Refused) -> None:
    (llama / LAST).unlink()
    assert refused(llama) == f"{llama / INDEX}: names {LAST}, which is not there"


def test_an_index_that_names_a_missing_tensor(llama: Path, refused: Refused) -> None:
    edit_json(llama / INDEX, lambda index: index["weight_map"].update({"model.extra": FIRST}))
    assert refused(llama) == f"{llama / INDEX}: model.extra is not in {FIRST}"


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("kind", ["relative", "absolute", "inner"])
def test_an_index_that_leads_out_of_the_folder(
    kind: str, there: bool, llama: Path, tmp_path: Path, refused: Refused
) -> None:
    (llama / "inner").mkdir()
    path = {
        "relative": f"../{FIRST}",
        "absolute": str(tmp_path / FIRST),
        "inner": f"inner/{FIRST}",
    }[kind]
    if there:
        shutil.copyfile(llama / FIRST, llama / path)
    edit_json(llama / INDEX, lambda index: index["weight_map"].update({Q_PROJ: path}))
    assert refused(llama) == f"{llama / INDEX}: {path} is not a file of this folder"


@pytest.mark.parametrize("place", ["..", ".", "", "a\0b", 7, None, ["x"], {}])
def test_an_index_that_names_what_is_no_file(place: object, llama: Path, refused: Refused) -> None:
    edit_json(llama / INDEX, lambda index: index["weight_map"].update({Q_PROJ: place}))
    assert refused(llama).startswith(f"{llama / INDEX}: ")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_an_index_that_is_none(text: str, llama: Path, refused: Refused) -> None:
    (llama / INDEX).write_text(text)
    assert refused(llama).startswith(f"{llama / INDEX}: ")


# --- its tensors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        "model.embed_tokens.weight",
        Q_PROJ,
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "another shape"])
def test_a_tensor_that_is(damage: str, tensor: str, llama: Path, refused: Refused) -> None:
    file = json.loads((llama / INDEX).read_text())["weight_map"][tensor]
    if damage == "missing":
        edit_json(llama / INDEX, lambda index: index["weight_map"].pop(tensor))
        assert refused(llama) == f"{llama}: the checkpoint lacks {tensor}"
        return
    shape: list[int] = []

    def grow(held: dict[str, torch.Tensor]) -> None:
        shape[:] = held[tensor].shape
        held[tensor] = torch.cat([held[tensor], held[tensor]])

    edit_tensors(llama / file, grow)
    grown = [2 * shape[0], *shape[1:]]
    assert refused(llama) == f"{llama}: {tensor} is {grown}, but config.json makes it {shape}"


def test_a_head_that_is_missing(
    tmp_path: Path, write_llama: Callable[..., Path], refused: Refused
) -> None:
    model = write_llama(tmp_path / "untied", tie_word_embeddings=False)
    edit_tensors(model / "model.safetensors", lambda held: held.pop("lm_head.weight"))
    assert refused(model) == f"{model}: the checkpoint lacks lm_head.weight"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A8", "FP8_BLOCK"])
def test_a_weight_that_is_not_finite(
    scheme: str, bad: float, llama: Path, refused: Refused
) -> None:
    name = "model.layers.1.mlp.up_proj"  # steps before it are written when it is found
    file = json.loads((llama / INDEX).read_text())["weight_map"][f"{name}.weight"]
    edit_tensors(llama / file, lambda held: held[f"{name}.weight"][-1, -1].fill_(bad))
    message = refused(llama, "--scheme", scheme, "--backend", "fake")
    assert message == f"{name}.weight: has NaN or infinite values; mend the float model"


# --- what cannot be served -----------------------------------------------------------------------


def test_a_group_that_does_not_divide_the_width(llama: Path, refused: Refused) -> None:
    message = refused(llama, "--group-size", 96)
    told = "groups of 96 do not divide its width, 256; choose another --group-size"
    assert message == f"model.layers.0.mlp.down_proj: {told}"


def test_groups_of_inputs_that_do_not_divide_the_width(
    tmp_path: Path, write_llama: Callable[..., Path], refused: Refused
) -> None:
    model = write_llama(tmp_path / "narrow", intermediate_size=320)
    message = refused(model, "--scheme", "FP8_BLOCK", "--backend", "fake")
    assert message == (
        "model.layers.0.mlp.down_proj: groups of 128 do not divide its width, 320; "
        "choose a --scheme without groups of inputs, or --ignore it"
    )


def test_a_group_that_sglang_has_no_kernel_for(llama: Path, refused: Refused) -> None:
    message = refused(llama, "--group-size", 16)
    assert message.startswith("sglang: model.layers.0.")
    assert message.endswith("Marlin takes groups of 32, 64, 128, -1, not 16")


def test_a_shape_that_sglang_has_no_kernel_for(
    tmp_path: Path, write_llama: Callable[..., Path], refused: Refused
) -> None:
    model = write_llama(tmp_path / "narrow", intermediate_size=320)
    message = refused(model, "--group-size", 64)
    name = "model.layers.0.mlp.down_proj"
    assert message == (
        f"sglang: {name}: Marlin needs in_features in multiples of 128, not 320; "
        "to keep such linears float, pass --ignore 'model.layers.*.mlp.down_proj'"
    )


def test_two_formats_in_one_folder_for_sglang(llama: Path, refused: Refused) -> None:
    message = refused(llama, "--override", "*mlp.*=W8A8", "--backend-opt", "engine=0.5.16")
    assert message.startswith("sglang: SGLang 0.5.16 reads one format in a folder, not ")


def test_fused_layers_with_two_schemes(llama: Path, refused: Refused) -> None:
    message = refused(llama, "--override", "*.q_proj=W8A16")
    assert "q_proj" in message
    assert message.endswith("so they must share one scheme")


# --- what was asked for --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--algo", "rnt"], "no algorithm 'rnt'. Did you mean 'rtn'?"),
        (["--algo", ""], "--algo : name one algorithm"),
        (["--algo", "rtn+"], "--algo rtn+: name one algorithm"),
        (["--algo", "rtn+rtn"], "--algo rtn+rtn: name one algorithm"),
        (["--scheme", "W9A16"], "no scheme 'W9A16'. Did you mean 'W8A16'? There are: W4A16"),
        (["--scheme", "W4A61"], "no scheme 'W4A61'. Did you mean 'W4A16'? There are: W4A16"),
        (["--scheme", "fp8_dyn"], "no scheme 'fp8_dyn'. Did you mean 'FP8_DYNAMIC'?"),
        (["--backend", "sgland"], "no backend 'sgland'. Did you mean 'sglang'?"),
        (["-o", "rtn.bits=4"], "algorithm rtn has no option 'bits'"),
        (["-o", "gptq.bits=4"], "-o gptq...: gptq is not in --algo"),
        (["-o", "rnt.bits=4"], "-o rnt...: rnt is not in --algo. Did you mean 'rtn'?"),
        (
            ["--algo", "awq", "-o", "awq.clip_step=4"],
            "algorithm awq has no option 'clip_step'. Did you mean 'clip_steps'?",
        ),
        (["--backend-opt", "x=1"], "backend sglang has no option 'x'"),
        (["--backend-opt", "x"], "--backend-opt x: write KEY=VALUE"),
        (["--group-size", "0"], "group_size must be positive, not 0"),
        (["--group-size", "64", "--scheme", "FP8_BLOCK"], "FP8_BLOCK has no group size to choose"),
        (["--ignore", "*.q_prj"], "--ignore *.q_prj: matches no linear layer of the model"),
        (["--ignore", "re:("], "re:(: not a regular expression: "),
        (["--ignore", "*"], "nothing is left to quantize"),
        (["--override", "*.x=W8A16"], "--override *.x: matches no linear layer of the model"),
        (["--override", "*=W9A9"], "no scheme 'W9A9'"),
        (["--override", "W8A16"], "--override W8A16: write KEY=VALUE"),
        (["--device", "nonsense"], "--device nonsense: torch cannot use such a device here; use "),
        (["--device", "cpu:x"], "--device cpu:x: torch cannot use such a device here; use auto, "),
        (["--device", "cuda:99"], "--device cuda:99: "),
        (["--device", "meta"], "--device meta: torch cannot use such a device here; use auto, "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_asked_for(words: list[str], complaint: str, llama: Path, refused: Refused) -> None:
    assert refused(llama, *words).startswith(complaint)


@pytest.mark.parametrize(
    "words",
    [
        ["--group-size", "many"],
        ["--shard-size", "0"],
        ["--shard-size", "-1"],
        ["--seed", "x"],
        ["--nonsense"],
        ["-o", "bits=4"],
    ],
    ids=" ".join,
)
def test_usage(words: list[str], llama: Path, refused: Refused) -> None:
    assert words[0] in refused(llama, *words, exit_code=2)


def test_a_model_must_be_named(cli: Callable[..., Result]) -> None:
    result = cli("quantize", "--out", "x")
    assert result.exit_code == 2
    message = "Error: Missing MODEL: give MODEL, or a recipe with --config."
    assert result.stderr.splitlines()[-1] == message


@pytest.mark.parametrize(
    ("built", "told"),
    [
        (False, "this torch is built without CUDA; install a torch with CUDA; or use --device cpu"),
        (
            True,
            "torch sees no GPU; check nvidia-smi, its driver and CUDA_VISIBLE_DEVICES; or use "
            "--device cpu",
        ),
    ],
)
def test_no_gpu(built: bool, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    with pytest.raises(QplugError) as refused:
        find_device("cuda")
    assert str(refused.value) == f"--device cuda: {told}"


def test_a_device_that_is_there() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


# --- where to ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling link"])
def test_out_exists(kind: str, llama: Path, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(llama if kind == "link" else tmp_path / "nowhere")
    complaint = f"{out}: exists; choose another folder, or pass --overwrite"
    assert refused(llama) == complaint
    if kind != "folder":
        assert refused(llama, "--overwrite").startswith(f"{out}: is not a folder, so it is not")


def test_overwrite_takes_only_what_qplug_wrote(
    llama: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "out").mkdir()
    for name in ("thesis.tex", "config.json"):
        (tmp_path / "out" / name).write_text("{}")
        message = refused(llama, "--overwrite")
        assert message == (
            f"{tmp_path / 'out'}: is not a folder that qplug wrote, so it is not overwritten; "
            "choose another folder"
        )


def test_no_folder_to_write_into(llama: Path, refused: Refused) -> None:
    for out in (llama / "config.json" / "b", llama / "config.json" / "b" / "c"):
        message = refused(llama, "--out", out)
        assert message == f"{llama / 'config.json'}: is not a folder to write into"


def test_a_refused_run_leaves_no_parents_of_the_folder(
    llama: Path, tmp_path: Path, refused: Refused
) -> None:
    message = refused(llama, "--out", tmp_path / "a" / "b" / "c", "--ignore", "*")
    assert message.startswith("nothing is left to quantize")


def test_missing_parents_of_the_folder_are_made(
    llama: Path, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    out = tmp_path / "a" / "b" / "c"
    assert cli("quantize", "--algo", "rtn", llama, "--out", out, "--dry-run").exit_code == 0
    assert not (tmp_path / "a").exists()
    result = cli("quantize", "--algo", "rtn", llama, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert (out / "qplug.json").exists()


def test_a_folder_that_cannot_be_written(llama: Path, refused: Refused) -> None:
    assert refused(llama, "--out", "/proc/out").startswith("/proc/out: cannot be written: ")


def test_a_name_that_is_too_long(llama: Path, tmp_path: Path, refused: Refused) -> None:
    for length in (250, 300):  # the longest name is 255; that of the partial folder has more
        out = tmp_path / ("x" * length)
        assert refused(llama, "--out", out) == f"{out}: cannot be written: File name too long"


@pytest.mark.parametrize("name", ["llama", "link", "llama/../llama", "link/../llama"])
def test_out_is_the_model(
    name: str, llama: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(llama)
    assert refused("llama", "--out", name).startswith(f"{name}: exists; ")
    assert refused("llama", "--out", name, "--overwrite").startswith(f"{name}: is ")
    assert refused("link", "--out", name, "--overwrite").startswith(f"{name}: is ")


def test_the_model_is_inside_out(llama: Path, tmp_path: Path, refused: Refused) -> None:
    shutil.copyfile(llama / "config.json", tmp_path / "config.json")  # a model's folder too
    message = refused(llama, "--out", tmp_path, "--overwrite")
    assert message.startswith(f"{tmp_path}: is not a folder that qplug wrote, so it is not")


def test_the_model_itself(llama: Path, tmp_path: Path, refused: Refused) -> None:
    quantize(str(llama), tmp_path / "float", algo="quarot", backend="hf")
    out = tmp_path / "float"
    message = refused(out, "--out", out, "--overwrite")
    assert message == f"{out}: is or contains the model itself; choose another folder"


def test_the_folder_that_one_stands_in(
    llama: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert refused(llama, "--out", ".").startswith(".: exists; ")
    for name in (".", "..", "/"):
        assert refused(llama, "--out", name, "--overwrite").startswith(f"{name}: ")


# --- a full disk ---------------------------------------------------------------------------------


def test_a_disk_that_is_full_before_the_work(
    llama: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 30, 1 << 30, 1000))
    message = refused(llama)
    assert message.startswith(f"{tmp_path}: the disk is full: ")
    assert message.endswith("are to be written, 0.00 GiB are free")


@pytest.mark.parametrize("what", ["journal begins", "journal", "shard", "tokenizer", "config"])
def test_a_disk_that_fills_up(
    what: str, llama: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    (llama / "tokenizer.json").write_text("{}")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if what == "journal begins":
        monkeypatch.setattr(Journal, "restart", fail)
    elif what == "journal":
        monkeypatch.setattr(Journal, "append", failing_after(7, Journal.append, fail))
    elif what == "shard":
        monkeypatch.setattr(disk, "write_at", failing_after(3, disk.write_at, fail))
    else:
        begin = {"tokenizer": "tokenizer", "config": "config"}[what]
        write_new = disk.write_new

        def write(path: Path, pieces: Iterable[bytes]) -> None:
            (fail if path.name.startswith(begin) else write_new)(path, pieces)

        monkeypatch.setattr(disk, "write_new", write)
    told = {"journal begins": f"{tmp_path / 'out'}: cannot be written: No space left on device"}
    assert refused(llama) == told.get(what, f"{tmp_path}: the disk is full; nothing was kept")


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.EFBIG, "a file would be larger than this process may write (ulimit -f)"),
        (errno.EMFILE, "this process may not open so many files (ulimit -n)"),
    ],
)
def test_a_limit_of_the_process(
    number: int,
    sentence: str,
    llama: Path,
    tmp_path: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(disk, "write_at", failing_after(3, disk.write_at, fail))
    assert refused(llama) == f"{tmp_path}: {sentence}; nothing was kept"


def failing_after(
    calls: int, work: Callable[..., Any], fail: Callable[..., None]
) -> Callable[..., Any]:
    done = []

    def wrapped(*args: object) -> Any:
        done.append(args)
        return (fail if len(done) > calls else work)(*args)

    return wrapped


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 200 KiB; skips where mounting one is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(words, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("cannot mount a small disk here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_small_disk(
    llama: Path, small_disk: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refused(llama, "--out", small_disk / "out", "--backend", "fake")
    assert message.startswith(f"{small_disk}: the disk is full: ")
    # Another program took the room after that was checked.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 30, 0, 1 << 30))
    message = refused(llama, "--out", small_disk / "out", "--backend", "fake")
    assert message == f"{small_disk}: the disk is full; nothing was kept"


# --- the same in Python --------------------------------------------------------------------------


def test_python_raises_one_line(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(QplugError, match="no scheme 'W9A16'"):
        quantize(str(llama), tmp_path / "out", scheme="W9A16")
    assert list(tmp_path.iterdir()) == [llama]
