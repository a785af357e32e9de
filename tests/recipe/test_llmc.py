"""Every key of an LLMC file: what becomes of it, what is warned of, what is refused and where."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qplug import PRESETS, QplugError, QuantArgs, Scheme, preset
from qplug.api.scheme import CACHES
from qplug.recipe.files import ReadJob
from qplug.recipe.recipe import Export, Measurement

Read = Callable[..., ReadJob]
Llmc = Callable[..., str]

INT8 = "{bit: 8, symmetric: True, granularity: per_channel, group_size: -1}"
TOKEN8 = "{bit: 8, symmetric: True, granularity: per_token}"
E4M3 = "{quant_type: float-quant, bit: e4m3, symmetric: True, granularity: %s, use_qtorch: True}"


def told(read: ReadJob) -> tuple[str, ...]:
    """The warnings, but not that there is no data: few files here have any."""
    return tuple(warning for warning in read.warnings if "no calib section" not in warning)


# --- schemes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "act", "scheme"),
    [
        ("{bit: 4, symmetric: True, granularity: per_group, group_size: 128}", "", "W4A16"),
        ("{bit: 4, symmetric: False, granularity: per_group, group_size: 128}", "", "W4A16_ASYM"),
        ("{bit: 3, symmetric: False, granularity: per_group, group_size: 128}", "", "W3A16_ASYM"),
        ("{bit: 8, symmetric: True, granularity: per_group, group_size: 128}", "", "W8A16"),
        (INT8, TOKEN8, "W8A8"),
        (INT8, TOKEN8.replace("per_token", "per_channel"), "W8A8"),
        (INT8.replace("8", "4", 1), TOKEN8.replace("8", "4"), "W4A4"),
        (E4M3 % "per_channel", E4M3 % "per_token", "FP8_DYNAMIC"),
        (
            (E4M3 % "per_block").replace("}", ", block_size: 128}"),
            (E4M3 % "per_group").replace("}", ", group_size: 128}"),
            "FP8_BLOCK",
        ),
    ],
)
def test_a_scheme_that_has_a_name(
    read_text: Read, llmc: Llmc, weight: str, act: str, scheme: str
) -> None:
    read = read_text(llmc(weight=weight, act=act))
    assert read.job.recipe.scheme == preset(scheme)
    assert read.warnings == ()


def test_another_group(read_text: Read, llmc: Llmc) -> None:
    weight = "{bit: 4, symmetric: True, granularity: %s}"
    job = read_text(llmc(weight=weight % "per_group, group_size: 64")).job
    assert job.recipe.scheme == preset("W4A16").with_group_size(64)
    assert read_text(llmc(weight=weight % "per_channel")).job.recipe.scheme == preset(
        "W4A16"
    ).with_group_size(-1)


def test_groups_beside_rounded_inputs_have_a_name_of_their_own(read_text: Read, llmc: Llmc) -> None:
    """Backends go by the name, and none has a kernel for this."""
    weight = "{bit: 8, symmetric: True, granularity: per_group, group_size: 64}"
    scheme = read_text(llmc(weight=weight, act=TOKEN8)).job.recipe.scheme
    assert scheme.name == "W8A8_G64"
    assert scheme.weights == QuantArgs("int8", "group", 64)


@pytest.mark.parametrize(
    ("weights", "inputs", "name"),
    [
        (True, False, "W6A6_ASYM_INPUTS"),
        (False, False, "W6A6_ASYM_BOTH"),
        (False, True, "W6A6_ASYM"),
    ],
)
def test_asymmetric_inputs(
    read_text: Read, llmc: Llmc, weights: bool, inputs: bool, name: str
) -> None:
    weight = f"{{bit: 6, symmetric: {weights}, granularity: per_channel, group_size: -1}}"
    act = f"{{bit: 6, symmetric: {inputs}, granularity: per_token}}"
    scheme = read_text(llmc(weight=weight, act=act)).job.recipe.scheme
    assert scheme == Scheme(
        name,
        QuantArgs("int6", "channel", symmetric=weights),
        QuantArgs("int6", "token", symmetric=inputs, dynamic=True),
    )


@pytest.mark.parametrize("spelling", ["float-quant", "float_quant"])
def test_quant_type_further_out_as_older_files_have_it(
    read_text: Read, llmc: Llmc, spelling: str
) -> None:
    weight = "{bit: e4m3, symmetric: True, granularity: per_channel, use_qtorch: True}"
    act = weight.replace("per_channel", "per_token")
    outside = llmc(weight=weight, act=act, quant=f"quant_type: {spelling}")
    assert read_text(outside).job.recipe.scheme == PRESETS["FP8_DYNAMIC"]
    assert read_text(outside).warnings == ()
    special = llmc(weight=weight, act=act, special=f"quant_type: {spelling}")
    assert read_text(special).job.recipe.scheme == PRESETS["FP8_DYNAMIC"]
    # LLMC itself takes bit: e4m3 without any quant_type for an integer, and fails.
    assert read_text(llmc(weight=weight, act=act)).job.recipe.scheme == PRESETS["FP8_DYNAMIC"]


def test_ranges_are_those_of_the_format(read_text: Read, llmc: Llmc) -> None:
    weight = "{bit: 4, symmetric: True, granularity: per_channel, int_range: [%s]}"
    assert read_text(llmc(weight=weight % "-8, 7")).warnings == ()
    with pytest.raises(QplugError, match=r"int_range: \[-7, 7\] is not the range of int4"):
        read_text(llmc(weight=weight % "-7, 7"))


@pytest.mark.parametrize(
    ("weight", "complaint"),
    [
        ("{bit: 9, symmetric: True, granularity: per_channel}", "weight.bit: 9 is wrong"),
        ("{bit: '4', symmetric: True, granularity: per_channel}", "weight.bit: '4' is wrong"),
        ("{bit: 48, symmetric: True, granularity: per_channel}", "two levels of scales"),
        ("{bit: 4, symmetric: 1, granularity: per_channel}", "symmetric: 1 is wrong; allowed: Tr"),
        ("{bit: 4, granularity: per_channel}", "weight: the required key 'symmetric'"),
        ("{bit: 4, symmetric: True, granularity: per_row}", "'per_row' is wrong.* allowed: per_"),
        ("{bit: 4, symmetric: True, granularity: per_head}", "'per_head' is not supported here"),
        ("{bit: 4, symmetric: True, granularity: per_group}", "the required key 'group_size'"),
        (
            "{bit: 4, symmetric: True, granularity: per_group, group_size: -1}",
            "group_size: -1 is wrong; allowed: a whole number of 1 or more",
        ),
        (
            "{bit: 4, quant_type: float-quant, symmetric: True, granularity: per_channel}",
            "bit: 4 does not go with float-quant; allowed: e4m3",
        ),
        (
            "{bit: e4m3, quant_type: int-quant, symmetric: True, granularity: per_channel}",
            "'e4m3' does not go with int-quant",
        ),
        (
            "{bit: 4, symmetric: True, granularity: per_channel, calib_algo: kl}",
            "calib_algo: 'kl' is wrong; allowed: minmax, mse",
        ),
        (
            "{bit: 4, symmetric: True, granularity: per_channel, calib_algo: mse}",
            "rtn searches no clips",
        ),
    ],
)
def test_wrong_weights(read_text: Read, llmc: Llmc, weight: str, complaint: str) -> None:
    with pytest.raises(QplugError, match=complaint) as caught:
        read_text(llmc(weight=weight))
    assert re.match(r".*f\.yml:5: quant\.weight", str(caught.value))  # its line in the file


@pytest.mark.parametrize(
    ("act", "complaint"),
    [
        (TOKEN8.replace("per_token", "per_tensor"), "one scale for all tokens"),
        (TOKEN8.replace("per_token", "per_token, static: True"), "does not go with static: True"),
        (TOKEN8.replace("}", ", quant_attn: True}"), "qplug rounds only inputs of linear layers"),
    ],
)
def test_wrong_inputs(read_text: Read, llmc: Llmc, act: str, complaint: str) -> None:
    with pytest.raises(QplugError, match=complaint):
        read_text(llmc(weight=INT8, act=act))


def test_static_inputs(read_text: Read, llmc: Llmc) -> None:
    """The scheme is asked for by its name, and an observer comes along."""
    text = llmc(
        weight=E4M3 % "per_tensor",
        act=(E4M3 % "per_tensor").replace("}", ", static: True, calib_algo: static_hist}"),
    )
    if "FP8" not in PRESETS:
        with pytest.raises(QplugError, match="no scheme 'FP8'"):
            read_text(text)
        return
    job = read_text(text).job
    assert job.recipe.scheme == PRESETS["FP8"]
    assert job.recipe.calibration.observer == "histogram"
    usual = read_text(text.replace("static_hist", "minmax")).job
    assert usual.recipe.calibration.observer == "minmax"
    with pytest.raises(QplugError, match="allowed: minmax, static_minmax, static_moving"):
        read_text(text.replace("static_hist", "kl"))


def test_kv_caches(read_text: Read, llmc: Llmc) -> None:
    cache = "kvcache: {method: Naive, bit: %s, symmetric: True, granularity: %s}"
    text = llmc(quant=cache % ("e4m3, quant_type: float-quant", "per_tensor"))
    assert read_text(text).job.recipe.kv_cache == CACHES["fp8"]
    with pytest.raises(QplugError, match="a cache of int8, per_token: no engine reads one; allow"):
        read_text(llmc(quant=cache % ("8", "per_token")))
    kivi = text.replace("Naive", "Kivi")
    with pytest.raises(QplugError, match=r"f\.yml:6: quant\.kvcache\.method: 'Kivi' is wrong; all"):
        read_text(kivi)


# --- methods --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("RTN", "rtn"),
        ("Awq", "awq"),
        ("awq", "awq"),
        ("GPTQ", "gptq"),
        ("SmoothQuant", "smoothquant"),
        ("OsPlus", "osplus"),
        ("OmniQuant", "omniquant"),
        ("TesseraQ", "signround"),
        ("GPTBRECQ", "signround"),
    ],
)
def test_methods(read_text: Read, llmc: Llmc, method: str, name: str) -> None:
    assert read_text(llmc(method=method)).job.recipe.algorithms == (name,)


def test_methods_that_are_not_there(read_text: Read, llmc: Llmc) -> None:
    with pytest.raises(
        QplugError, match=r"f\.yml:4: quant\.method: qplug has no method 'SpQR'; allowed"
    ) as e:
        read_text(llmc(method="SpQR"))
    assert "OWQ" not in str(e.value)  # of LLMC's methods, those that there are
    with pytest.raises(QplugError, match="quant: the required key 'method'"):
        read_text("quant:\n    weight: {bit: 4}\n")


def test_options_of_algorithms(read_text: Read, llmc: Llmc) -> None:
    """By LLMC's names; in the native recipe they have qplug's."""
    job = read_text(
        llmc(method="Awq", special="trans: True\ntrans_version: v1\nweight_clip: False")
    ).job
    assert job.recipe.algorithm_options == {"awq": {"scale": True, "version": "v1", "clip": False}}
    gptq = "actorder: True\nstatic_groups: True\npercdamp: 0.01\nblocksize: 64"
    read = read_text(llmc(method="GPTQ", special=gptq))
    assert read.job.recipe.algorithm_options == {
        "gptq": {"act_order": True, "damp": 0.01, "block_size": 64}
    }
    assert told(read) == ()
    assert read_text(
        llmc(method="SmoothQuant", special="alpha: 0.8")
    ).job.recipe.algorithm_options == {"smoothquant": {"alpha": 0.8}}


def test_options_of_omniquant(read_text: Read, llmc: Llmc) -> None:
    """As the second step of LLMC's combination with AWQ has them."""
    special = (
        "aug_loss: False\nlet: False\nlwc: True\nlwc_lr: 0.01\nlet_lr: 0.005\nuse_shift: False\n"
        "alpha: 0.5\ndeactive_amp: True\nepochs: 5\nwd: 0\nsearch_clip_init: True"
    )
    read = read_text(llmc(method="OmniQuant", special=special))
    assert read.job.recipe.algorithm_options == {
        "omniquant": {
            **{"aug_loss": False, "let": False, "lwc": True, "lwc_lr": 0.01, "let_lr": 0.005},
            **{"shift": False, "alpha": 0.5, "epochs": 5, "weight_decay": 0},
        }
    }
    assert told(read) == ()


def test_the_options_of_hqq_and_quarot(read_text: Read, llmc: Llmc) -> None:
    special = "axis: 1\nlp_norm: 0.5\nbeta: 20\nkappa: 1.02\niters: 7"
    read = read_text(llmc(method="HQQ", special=special))
    wanted = {"lp_norm": 0.5, "beta": 20, "kappa": 1.02, "iterations": 7}
    assert read.job.recipe.algorithm_options == {"hqq": wanted}
    assert told(read) == ()
    read = read_text(llmc(method="Quarot", special="rotate_mode: random\nfp32_had: True"))
    assert read.job.recipe.algorithm_options == {"quarot": {"rotation": "random"}}
    assert told(read) == ()
    read = read_text(llmc(method="Quarot", special="online_rotate: True"))
    assert read.job.recipe.algorithm_options == {"quarot": {"online": True}}
    assert told(read) == ()


def test_a_wrong_option(read_text: Read, llmc: Llmc) -> None:
    with pytest.raises(QplugError, match=r"f\.yml:7: quant.special.trans_version: v3: must be one"):
        read_text(llmc(method="Awq", special="trans_version: v3"))
    with pytest.raises(QplugError, match="percdamp: 2: must be float >= 0 <= 1"):
        read_text(llmc(method="GPTQ", special="percdamp: 2"))


@pytest.mark.parametrize(
    ("method", "special", "what"),
    [
        ("GPTQ", "static_groups: False", "static_groups: no effect"),
        ("RTN", "weight_clip: True", "weight_clip: no effect: this algorithm searches no clips"),
        ("Awq", "clip_sym: False", "clip_sym: no effect"),
        ("Awq", "save_clip: True", "save_clip: no effect"),
        ("Awq", "wieght_clip: True", "wieght_clip: no effect: awq has no such option"),
        ("RTN", "online_rotate: True", "online_rotate: no effect"),
        ("HQQ", "axis: 0", "axis: no effect: groups always consist of neighbouring columns"),
    ],
)
def test_what_special_says_in_vain(
    read_text: Read, llmc: Llmc, method: str, special: str, what: str
) -> None:
    (warning,) = told(read_text(llmc(method=method, special=special)))
    assert re.match(rf".*f\.yml:7: quant\.special\.{what}", warning)


@pytest.mark.parametrize(
    "special",
    [
        "static_groups: True",
        "clip_sym: True",
        "save_mem: False",
        "awq_bs: 4",
        "clip_version: v2",
        "owq: False\nn_outs: [6, 6]",
        "fp32_had: True\nonline_rotate: False",
        "save_scale: False\nsave_clip: False",
    ],
)
def test_what_changes_nothing_needs_no_word(read_text: Read, llmc: Llmc, special: str) -> None:
    assert read_text(llmc(method="RTN", special=special)).warnings == ()


def test_what_awq_found_before_is_found_in_this_run(read_text: Read, llmc: Llmc) -> None:
    text = llmc(method="GPTQ", special="load_clip: True\nclip_path: a/b")
    read = read_text(text)
    assert read.job.recipe.algorithms == ("awq", "gptq")
    assert "qplug reads no such file: awq runs first" in read.warnings[0]
    assert read_text(text.replace("load_clip: True", "load_clip: False")).job.recipe.algorithms == (
        "gptq",
    )


def test_ranges_of_least_error(read_text: Read, llmc: Llmc) -> None:
    weight = "{bit: 4, symmetric: True, granularity: per_channel, calib_algo: mse}"
    job = read_text(llmc(method="GPTQ", weight=weight)).job
    assert job.recipe.algorithm_options == {"gptq": {"clip": True}}


def test_special_misspelt(read_text: Read, llmc: Llmc) -> None:
    text = llmc(method="SmoothQuant", special="alpha: 0.8").replace("special", "speical")
    read = read_text(text)
    assert read.job.recipe.algorithm_options == {"smoothquant": {"alpha": 0.8}}
    assert told(read) == ()


def test_quant_out(read_text: Read, llmc: Llmc) -> None:
    assert read_text(llmc(quant="quant_out: True")).job.recipe.calibration.propagate == "quantized"
    assert read_text(llmc()).job.recipe.calibration.propagate == "float"


def test_parts_of_models_that_see(read_text: Read) -> None:
    inner = "{method: RTN, weight: {bit: 4, symmetric: True, granularity: per_channel}}"
    assert read_text(f"quant:\n    language: {inner}\n").job.recipe.algorithms == ("rtn",)
    with pytest.raises(QplugError, match=r"quant\.vision: qplug quantizes language models"):
        read_text(f"quant:\n    vision: {inner}\n    language: {inner}\n")
    with pytest.raises(QplugError, match=r":1: sparse: qplug quantizes"):
        read_text("sparse:\n    method: Wanda\n")


# --- layers ---------------------------------------------------------------------------------------


def test_mixed_bits(read_text: Read, llmc: Llmc) -> None:
    more = """
        mix_bits:
            setting_0:
                layer_name: [down_proj#0-1-31]
                weight: {bit: 8, symmetric: True, granularity: per_group, group_size: 128}
            setting_1:
                layer_name: [o_proj, k_proj]
                do_quant: False
    """
    job = read_text(llmc(quant=more)).job
    assert job.recipe.overrides == ((r"re:.*\.(0|1|31)\.(.*\.)?down_proj", preset("W8A16")),)
    assert job.recipe.ignore == ("*o_proj", "*k_proj")


def test_ignored_layers(read_text: Read, llmc: Llmc) -> None:
    from qplug.recipe.assign import matches

    more = """
        ignored_layers:
            block_ids: [4, 7-9]
            layer_names: [self_attn.q_proj, mlp.down_proj]
            speical_names: [model.layers.0.mlp.up_proj]
    """
    ignore = read_text(llmc(more=more)).job.recipe.ignore
    ignored = [
        name
        for layer in range(12)
        for local in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
        for name in [f"model.layers.{layer}.{local}"]
        if any(matches(pattern, name) for pattern in ignore)
    ]
    wanted = ["model.layers.0.mlp.up_proj"]
    wanted += [
        f"model.layers.{n}.{x}" for n in (4, 7, 8, 9) for x in ("self_attn.q_proj", "mlp.down_proj")
    ]
    assert ignored == wanted
    with pytest.raises(QplugError, match=r"block_ids\[0\]: 'x' is wrong; allowed: a number, or a"):
        read_text(llmc(more="ignored_layers: {block_ids: [x]}\n"))


# --- data -----------------------------------------------------------------------------------------

CALIB = "name: {name}\ndownload: {download}\npath: {path}\nn_samples: 16\nbs: -1\nseq_len: 64\n"


def calib(
    name: str = "pileval", path: Path | str = "x", download: bool = False, **more: Any
) -> str:
    extra = "".join(f"{key}: {value}\n" for key, value in more.items())
    return CALIB.format(name=name, path=path, download=download) + "seed: *seed\n" + extra


@pytest.mark.parametrize(
    ("name", "preproc", "dataset", "sampling"),
    [
        ("pileval", "txt_general_preproc", "pileval", "dataset"),
        ("pileval", "general", "pileval", "dataset"),
        ("pileval", "pileval_smooth", "pileval", "dataset"),
        ("pileval", "pileval_awq", "pileval", "packed"),
        ("pile", "pile_gptq", "pileval", "documents"),
        ("pileval", "pileval_omni", "pileval", "windows"),
        ("wikitext2", "wikitext2_gptq", "wikitext2", "dataset"),
        ("wikitext2", "txt_general_preproc", "wikitext2", "leading"),
        ("c4", "c4_gptq", "c4", "dataset"),
        ("c4", "txt_general_preproc", "c4", "leading"),
    ],
)
def test_preprocs(
    read_text: Read, llmc: Llmc, name: str, preproc: str, dataset: str, sampling: str
) -> None:
    read = read_text(llmc(calib=calib(name, download=True, preproc=preproc)))
    found = read.job.recipe.calibration
    assert (found.dataset, found.sampling) == (dataset, sampling)
    assert (found.options, found.samples, found.seq_len) == ({}, 16, 64)
    assert read.job.recipe.seed == 42
    assert read.warnings == ()


def test_a_wrong_preproc(read_text: Read, llmc: Llmc) -> None:
    with pytest.raises(QplugError, match=r"f\.yml:11: calib\.preproc: 'wiki' is wrong.*wikitext2_"):
        read_text(llmc(calib=calib(preproc="wiki")))


def test_a_folder_that_save_to_disk_wrote(read_text: Read, llmc: Llmc, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    found = read_text(llmc(calib=calib(path=folder, preproc="txt_general_preproc")))
    assert found.job.recipe.calibration.dataset == "pileval"
    assert found.job.recipe.calibration.options == {"path": str(folder)}


def test_a_file_of_text(read_text: Read, llmc: Llmc, tmp_path: Path) -> None:
    """It has no documents to choose among."""
    file = tmp_path / "some.txt"
    file.write_text("text")
    read = read_text(llmc(calib=calib(path=file, preproc="txt_general_preproc")))
    found = read.job.recipe.calibration
    assert (found.dataset, found.options, found.sampling) == (
        "text",
        {"path": str(file)},
        "dataset",
    )
    assert "the file is one document" in read.warnings[0]
    lines = tmp_path / "some.jsonl"
    lines.write_text('{"text": "a"}\n')
    read = read_text(llmc(calib=calib(path=lines, preproc="txt_general_preproc")))
    assert (read.job.recipe.calibration.dataset, read.job.recipe.calibration.sampling) == (
        "text",
        "leading",
    )
    assert read.warnings == ()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    assert read_text(llmc(calib=calib(path=folder))).job.recipe.calibration.dataset == "text"


def test_data_of_the_users_own(read_text: Read, llmc: Llmc, tmp_path: Path) -> None:
    read = read_text(
        llmc(
            calib=calib(
                "custom_txt",
                tmp_path,
                preproc="random_truncate_txt",
                padding=True,
                apply_chat_template=True,
            )
        )
    )
    options = {"path": str(tmp_path / "samples.json"), "field": "question", "role": "user"}
    assert read.job.recipe.calibration.dataset == "text"
    assert read.job.recipe.calibration.options == options
    assert read.warnings == ()


def test_data_that_cannot_be_a_chat_says_so(read_text: Read, llmc: Llmc, tmp_path: Path) -> None:
    given = calib("pileval", tmp_path, preproc="pileval_awq", apply_chat_template=True)
    (_, warning) = read_text(llmc(calib=given + "add_answer: True\n")).warnings
    assert "calib.add_answer: no effect" in warning


def test_data_from_the_hub_needs_no_path(read_text: Read, llmc: Llmc) -> None:
    text = llmc(calib=calib(download=True, preproc="pileval_awq").replace("path: x\n", ""))
    read = read_text(text)
    assert (read.job.recipe.calibration.dataset, read.job.recipe.calibration.options) == (
        "pileval",
        {},
    )
    assert read.warnings == ()


def test_a_path_that_is_not_there(read_text: Read, llmc: Llmc) -> None:
    (warning,) = read_text(llmc(calib=calib(path="calib data path"))).warnings
    assert warning.endswith("f.yml:6: calib.path: calib data path: no such file or folder")


def test_a_dataset_that_is_not_there(read_text: Read, llmc: Llmc) -> None:
    with pytest.raises(QplugError, match=r"f\.yml:3: calib: no dataset 'ptb'"):
        read_text(llmc(calib=calib("ptb", download=True)))
    with pytest.raises(QplugError, match=r"f\.yml:4: calib\.name: 'images' contains more than"):
        read_text(llmc(calib=calib("images", download=True)))


def test_without_data(read_text: Read, llmc: Llmc) -> None:
    assert read_text(llmc(method="RTN")).warnings == ()
    (warning,) = read_text(llmc(method="Awq")).warnings
    assert "no calib section: qplug calibrates on the dataset demo" in warning


# --- eval -----------------------------------------------------------------------------------------

EVAL = "eval_pos: [{at}]\nname: {name}\ndownload: True\nseq_len: 256\nbs: 1\n"


def test_stages(read_text: Read, llmc: Llmc) -> None:
    text = EVAL.format(at="pretrain, transformed, fake_quant", name="wikitext2")
    read = read_text(llmc(evaluate=text + "inference_per_block: False"))
    stages = ("pretrain", "transformed", "quantized")
    assert read.job.measurements == (Measurement(stages, "wikitext2", {}, 256, None),)
    assert read.warnings == ()
    older = read_text(llmc(evaluate=EVAL.format(at="fake-quant", name="c4"))).job.measurements
    assert older == (Measurement(("quantized",), "c4", {}, 256, 256),)


def test_several_names_lie_under_one_path(read_text: Read, llmc: Llmc, tmp_path: Path) -> None:
    text = EVAL.format(at="fake_quant", name="[wikitext2, c4]").replace("True", "False")
    for name in ("wikitext2", "c4"):
        (tmp_path / name).mkdir()
    found = read_text(llmc(evaluate=text + f"path: {tmp_path}")).job.measurements
    assert [measurement.options["path"] for measurement in found] == [
        str(tmp_path / "wikitext2"),
        str(tmp_path / "c4"),
    ]


def test_a_list_of_sections(read_text: Read, llmc: Llmc) -> None:
    text = """
        - {eval_pos: [pretrain], name: wikitext2, download: True, seq_len: 64, bs: 1}
        - {eval_pos: [fake_quant], name: wikitext2, type: token_acc, download: True, bs: 1}
        - {eval_pos: [nahh, fake_quant], name: c4, download: True, bs: 1, tasks: "piqa,arc"}
    """
    read = read_text(llmc(evaluate=text))
    assert [(m.at, m.dataset, m.seq_len) for m in read.job.measurements] == [
        (("pretrain",), "wikitext2", 64),
        (("quantized",), "c4", 2048),
    ]
    assert [warning.partition(": ")[2] for warning in read.warnings] == [
        "eval[1].type: left out: qplug measures perplexity (ppl), not token_acc",
        "eval[2].eval_pos[0]: 'nahh' is left out; allowed: pretrain, transformed, fake_quant, "
        "fake-quant",
        "eval[2].tasks: no effect: qplug measures perplexity",
    ]


# --- save and the rest ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        ("save_sgl: True", [("sglang", "")]),
        ("save_vllm: True", [("vllm", "")]),
        ("save_fake: True", [("fake", "fake_quant_model")]),
        ("save_trans: True", [("hf", "transformed_model")]),
        ("save_trans: True\nsave_sgl: True", [("sglang", ""), ("hf", "transformed_model")]),
        ("save_trans: False\nsave_fp: False\nsave_lightllm: False\nsave_autogptq: False", []),
    ],
)
def test_where_folders_lie(
    read_text: Read, llmc: Llmc, asked: str, written: list[tuple[str, str]]
) -> None:
    read = read_text(llmc(save=f"{asked}\nsave_path: some/where/"))
    exports = tuple(Export(Path("some/where") / folder, name) for name, folder in written)
    assert read.job.exports == exports
    assert read.warnings == ()


def test_one_folder_serves_both_engines(read_text: Read, llmc: Llmc) -> None:
    read = read_text(llmc(save="save_sgl: True\nsave_vllm: True\nsave_path: x"))
    assert read.job.exports == (Export(Path("x"), "sglang"),)
    assert "vLLM loads the folder for SGLang too" in read.warnings[0]


def test_formats_that_are_not_there(read_text: Read, llmc: Llmc) -> None:
    with pytest.raises(QplugError, match=r"f\.yml:7: save\.save_mlcllm: no backend 'mlcllm'"):
        read_text(llmc(save="save_mlcllm: True\nsave_path: x"))
    with pytest.raises(QplugError, match="save: save_sgl needs a save_path"):
        read_text(llmc(save="save_sgl: True"))


def test_the_model(read_text: Read, llmc: Llmc) -> None:
    text = "type: model_type\npath: some/model\ntokenizer_mode: slow\ntorch_dtype: %s\n"
    read = read_text(llmc(model=text % "auto"))
    assert (read.job.model, read.warnings) == ("some/model", ())
    assert read_text(llmc(model=text % "torch.float8_e4m3fn")).warnings == ()
    assert "weights keep the dtype" in read_text(llmc(model=text % "torch.bfloat16")).warnings[0]
    with pytest.raises(QplugError, match=r":7: model.torch_dtype: .*allowed: auto, torch.float16"):
        read_text(llmc(model=text % "__import__('os').abort()"))
    with pytest.raises(QplugError, match="tokenizer_mode: 'quick' is wrong; allowed: slow, fast"):
        read_text(llmc(model=(text % "auto").replace("slow", "quick")))


def test_unknown_and_obsolete_keys_are_told_by_name_and_line(read_text: Read, llmc: Llmc) -> None:
    weight = (
        "{bit: 4, symmetric: True, granularity: per_channel, qmax_to_tensor: True, "
        "pack_mode: vllm_pack, need_pack: True, gruop_size: 3}"
    )
    more = "opencompass: {cfg_path: x}\nnonsense: 1\n"
    text = llmc(weight=weight, quant="tp: 2\nquant_objects: [x]\nruns: 3", more=more)
    assert [warning.rpartition("/f.yml:")[2] for warning in read_text(text).warnings] == [
        "5: quant.weight.gruop_size: unknown key, ignored. Did you mean 'group_size'?",
        "6: quant.tp: no effect: engines split weights themselves",
        "7: quant.quant_objects: no effect: qplug quantizes linear layers",
        "8: quant.runs: unknown key, ignored.",
        "9: opencompass: no effect: qplug measures perplexity",
        "10: nonsense: unknown key, ignored.",
    ]


SEED_SNIPPETS = {
    "W4A16": """
        quant:
            method: Awq
            weight:
                bit: 4
                symmetric: True
                granularity: per_group
                group_size: 128
                need_pack: True
            special:
                trans: True
                trans_version: v2
                weight_clip: True
            quant_out: True
    """,
    "FP8_DYNAMIC": """
        quant:
            method: Awq
            quant_type: float_quant
            weight:
                # Support ["e4m3", "e5m2"]
                bit: e4m3
                symmetric: True
                granularity: per_channel
                use_qtorch: True
            act:
                bit: e4m3
                symmetric: True
                granularity: per_token
                use_qtorch: True
            special: {trans: True, trans_version: v2, weight_clip: True}
            quant_out: True
    """,
    "FP8": """
        quant:
            method: Awq
            quant_type: float-quant
            weight: {bit: e4m3, symmetric: True, granularity: per_tensor, use_qtorch: True}
            act:
                bit: e4m3
                symmetric: True
                granularity: per_tensor
                use_qtorch: True
                static: True
    """,
    "W8A8": """
        quant:
            method: Awq
            weight: {bit: 8, symmetric: True, granularity: per_channel, group_size: -1}
            act: {bit: 8, symmetric: True, granularity: per_token}
            special: {trans: True, trans_version: v2, weight_clip: True}
            quant_out: True
    """,
}


@pytest.mark.parametrize("scheme", SEED_SNIPPETS)
def test_snippets_of_the_manual(read_text: Read, scheme: str) -> None:
    read = read_text(SEED_SNIPPETS[scheme])
    assert read.job.recipe.scheme == PRESETS[scheme]
    assert read.job.recipe.algorithms == ("awq",)
    assert len(read.warnings) == 1  # no calib


def test_formats_of_other_widths_have_the_scales_that_are_said(read_text: Read, llmc: Llmc) -> None:
    """Groups of e2m1 under plain scales are neither NVFP4 nor MXFP4, whatever their size."""
    weight = "{bit: e2m1, symmetric: False, granularity: per_group, group_size: %s}"
    assert read_text(llmc(weight=weight % 128)).job.recipe.scheme == preset("WE2M1A16")
    for size in (16, 32):
        scheme = read_text(llmc(weight=weight % size)).job.recipe.scheme
        assert scheme == preset("WE2M1A16").with_group_size(size)


WHOLE = """
base: {seed: &seed 42}
model:
    type: model_type
    path: qplug:demo
    tokenizer_mode: slow
    torch_dtype: auto
calib:
    name: pileval
    download: True
    n_samples: 16
    bs: -1
    seq_len: 64
    preproc: txt_general_preproc
    seed: *seed
eval:
    - eval_pos: [pretrain, fake_quant]
      name: [wikitext2, c4]
      type: ppl
      download: True
      seq_len: 64
      bs: 1
quant:
    method: GPTQ
    quant_type: int-quant
    weight:
        bit: 8
        symmetric: True
        granularity: per_group
        group_size: 32
        calib_algo: mse
        need_pack: True
    act:
        bit: 8
        symmetric: True
        granularity: per_token
    special:
        actorder: True
        static_groups: True
        percdamp: 0.01
        blocksize: 128
        owq: False
        load_clip: False
    mix_bits:
        setting_0:
            layer_name: [down_proj#0-1]
            do_quant: True
            weight: {bit: 8, symmetric: True, granularity: per_channel}
            act: {bit: 8, symmetric: True, granularity: per_token}
    quant_out: True
    kvcache:
        method: Naive
        quant_type: float-quant
        bit: e4m3
        symmetric: True
        granularity: per_tensor
ignored_layers:
    block_ids: [4, 7-9]
    layer_names: [mlp.up_proj]
    speical_names: [lm_head]
save:
    save_vllm: True
    save_trans: False
    save_path: ./save
"""


def values_of(tree: Any) -> list[tuple[Any, Any]]:
    """Every mapping or list of ``tree`` with every key of it."""
    if not isinstance(tree, (dict, list)):
        return []
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    return [(tree, key) for key in keys] + [v for key in keys for v in values_of(tree[key])]


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    ["__import__('os').abort()", -3, 10**30, 0.5, True, None, [], [[1]], {}, {"a": {"b": 1}}],
)
def test_no_value_is_too_wrong_for_a_line(read_text: Read, wrong: Any) -> None:
    """Whatever stands anywhere, it is read, or refused in one line that tells where it stands."""
    tree = yaml.safe_load(WHOLE)
    assert read_text(WHOLE).job.recipe.algorithms == ("gptq",)
    refused = []
    for holder, key in values_of(tree):
        before, holder[key] = holder[key], wrong
        try:
            read_text(yaml.safe_dump(tree, sort_keys=False))
        except QplugError as error:
            refused.append(str(error))
        holder[key] = before
    assert len(refused) > 5
    for sentence in refused:
        assert re.match(r"[^\n]*f\.yml:\d+(: [\w.\[\]]+)?: [^\n]+$", sentence)


# --- YAML itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty"),
        ("quant: [", ":1: not YAML"),
        ("a: 1\nquant: {method: RTN\n", r":\d: not YAML"),
        ("quant: 4\n", "quant: 4 is wrong; allowed: a mapping"),
        ("- quant\n", r"f\.yml:1: \['quant'\] is wrong; allowed: a mapping"),
        ("quant: &q\n    method: *q\n", "contains itself"),
        ("quant:\n    method: RTN\n    method: Awq\n", ":3: quant.method: is repeated"),
        ("quant:\n    method: [RTN]\n", "quant.method: is a list, but must be a single value"),
        ("quant: !!python/object/apply:os.abort []\n", "quant: "),
        (
            "quant:\n    method: !!python/name:os.abort ''\n",
            ":2: not YAML: could not determine a co",
        ),
        ("? [a]\n: 1\nquant: {}\n", "a key must be a word"),
        ("quant: {}\n---\nquant: {}\n", "not YAML"),
    ],
)
def test_what_is_no_such_file(read_text: Read, text: str, complaint: str) -> None:
    with pytest.raises(QplugError, match=complaint):
        read_text(text)


def test_anchors_and_merges(read_text: Read) -> None:
    text = """
        base: {seed: &seed 7}
        quant:
            method: RTN
            weight: &int8 {bit: 8, symmetric: True, granularity: per_channel}
            act: {<<: *int8, granularity: per_token}
    """
    job = read_text(text).job
    assert job.recipe.scheme == preset("W8A8")
    assert job.recipe.seed == 7
