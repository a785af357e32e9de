"""Each check of the contracts fails on a plugin that breaks what it is about, and says so."""

from __future__ import annotations

import itertools
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from torch import Tensor

from qplug import (
    Algorithm,
    Block,
    Dataset,
    NoParams,
    Param,
    QuantizedWeight,
    Scheme,
    Split,
    Tokenizer,
)
from qplug.numerics.rounding import nearest, quantize
from qplug.numerics.scales import minmax_scale
from qplug.testing import AlgorithmContract, DatasetContract, ExporterContract
from qplug_compressed_tensors.exporter import CompressedTensorsExporter
from qplug_compressed_tensors.format import CompressedTensors
from qplug_rtn.rtn import RTN

Codes = Mapping[str, QuantizedWeight]


def trips(contract: Any, check: str, *arguments: Any) -> str:
    """What the failing ``check`` of ``contract`` says."""
    with pytest.raises(AssertionError) as caught:
        getattr(contract, check)(*arguments)
    return str(caught.value)


def algorithm(kind: type[Algorithm[Any]], **attributes: Any) -> AlgorithmContract:
    made = type("Contract", (AlgorithmContract,), {"algorithm": kind, **attributes})
    contract: AlgorithmContract = made()
    return contract


def changed(**fields: Any) -> type[Algorithm[Any]]:
    """RTN, with other values in what it gives; a value may be made of the old one."""

    class Broken(RTN):
        """Breaks what it gives."""

        def quantize(self, block: Block) -> Codes:
            made = super().quantize(block)
            return {
                name: replace(w, **{f: new(w) for f, new in fields.items()})
                for name, w in made.items()
            }

    return Broken


# --- all kinds ------------------------------------------------------------------------------------


def test_a_name_that_nobody_can_type() -> None:
    class Broken(RTN):
        """One."""

        name = "My Idea"

    assert "lower case, digits and hyphens" in trips(algorithm(Broken), "test_is_well_named")


def test_no_description() -> None:
    class Broken(RTN):
        pass

    assert "needs a docstring" in trips(algorithm(Broken), "test_is_described")


def test_parameters_that_are_no_options() -> None:
    @dataclass(frozen=True)
    class Bare:
        bits: int = 4

    @dataclass(frozen=True)
    class Unhelpful:
        bits: Annotated[int, Param("bits")] = 4

    for params, sentence in ((Bare, "cannot be offered"), (Unhelpful, "full stop")):
        kind = type("Broken", (RTN,), {"__doc__": "One.", "Params": params})
        assert sentence in trips(algorithm(kind), "test_parameters_are_options")


def test_a_parameter_without_default() -> None:
    @dataclass(frozen=True)
    class Params:
        path: Annotated[str, Param("Where.")]

    kind = type("Broken", (RTN,), {"__doc__": "One.", "Params": Params})
    contract = algorithm(kind)
    assert "has no default" in trips(contract, "test_parameters_without_default_are_given")
    contract.options = {"path": "here"}
    contract.test_parameters_without_default_are_given()


def test_a_face_that_imports_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "heavy_face"
    package.mkdir()
    (package / "__init__.py").write_text("import torch\n")
    (package / "mine.py").write_text(
        "from qplug_rtn.rtn import RTN\nclass Mine(RTN):\n    'One.'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from importlib import import_module

    kind = import_module("heavy_face.mine").Mine
    try:
        said = trips(algorithm(kind), "test_the_face_imports_nothing_heavy")
    finally:
        for name in ("heavy_face", "heavy_face.mine"):
            del sys.modules[name]
    assert "import heavy_face imports torch" in said


# --- algorithms -----------------------------------------------------------------------------------


class WithData(RTN):
    """Rounds, and reads data."""

    needs_data = True


def test_no_scheme_to_test_with() -> None:
    said = trips(algorithm(WithData, schemes=()), "test_codes_are_well_made")
    assert "names none to test WithData with" in said


def test_missing_codes() -> None:
    class Broken(RTN):
        """One."""

        def quantize(self, block: Block) -> Codes:
            return {}

    assert "must give codes for" in trips(algorithm(Broken), "test_codes_are_well_made")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"codes": lambda w: w.codes.float()}, "codes of linear must be torch.int8"),
        ({"codes": lambda w: w.codes[:1]}, "codes of linear must be torch.int8 [48, 64]"),
        ({"codes": lambda w: w.codes * 0 + 99}, "leave the range"),
        ({"scale": lambda w: w.scale.double()}, "scales of linear must be float32"),
        ({"scale": lambda w: w.scale * 0}, "positive and finite"),
        ({"scale": lambda w: w.scale * torch.nan}, "positive and finite"),
        ({"zero": lambda w: torch.zeros_like(w.scale, dtype=torch.uint8)}, "zero points"),
    ],
)
def test_codes_that_are_not_well_made(fields: dict[str, Any], sentence: str) -> None:
    contract = algorithm(changed(**fields), schemes=("W4A16",))
    assert sentence in trips(contract, "test_codes_are_well_made")


def test_scales_that_cannot_be_stored() -> None:
    from qplug.api.scheme import preset
    from qplug.testing.blocks import tiny_linear

    contract = algorithm(changed(scale=lambda w: w.scale * 1.0001))
    scheme = preset("W4A16").with_group_size(16).with_scale_dtype("float16")
    block = tiny_linear(scheme)
    codes = contract._run(block)
    assert "cannot be stored as float16" in trips(contract, "_check", scheme, block, codes)


def test_zero_points_of_another_dtype() -> None:
    contract = algorithm(changed(zero=lambda w: w.zero.int()), schemes=("W4A16_ASYM",))
    assert "must be uint8" in trips(contract, "test_codes_are_well_made")


def test_one_dtype_alone() -> None:
    class Broken(RTN):
        """One."""

        def quantize(self, block: Block) -> Codes:
            for linear in block.linears:
                if linear.weight.dtype == torch.float16:
                    linear.weight[0, 0] = torch.inf
            return super().quantize(block)

    with pytest.raises(Exception, match="infinite"):
        algorithm(Broken).test_float_dtypes_of_checkpoints()


def test_random_codes() -> None:
    class Broken(RTN):
        """One."""

        def quantize(self, block: Block) -> Codes:
            made = super().quantize(block)
            return {
                n: replace(w, codes=w.codes ^ torch.randint_like(w.codes, 2))
                for n, w in made.items()
            }

    assert "give different codes" in trips(algorithm(Broken), "test_same_input_same_codes")


def test_a_weight_changed_in_place() -> None:
    class Broken(WithData):
        """One."""

        def transform(self, block: Block) -> None:
            block.linears[0].weight.mul_(2)

    said = trips(algorithm(Broken), "test_the_block_is_left_as_it_was")
    assert "block.replace" in said


def test_a_weight_replaced_is_no_change() -> None:
    class Replacing(WithData):
        """One."""

        def transform(self, block: Block) -> None:
            block.replace(block.linears[0], block.linears[0].weight * 2)

    algorithm(Replacing).test_the_block_is_left_as_it_was()


def test_statistics_changed_in_place() -> None:
    class Broken(WithData):
        """One."""

        def transform(self, block: Block) -> None:
            block.groups[0].gram.diagonal().add_(1)

    said = trips(algorithm(Broken), "test_the_block_is_left_as_it_was")
    assert "InputGroup.gram" in said


def test_chosen_scales_dropped() -> None:
    class Broken(RTN):
        """One."""

        def quantize(self, block: Block) -> Codes:
            codes = {}
            for each in block.linears:
                scale, zero = minmax_scale(each.weight, each.args)
                made = quantize(each.weight, scale, zero, each.args)
                codes[each.name] = QuantizedWeight(made, scale, zero, each.args)
            return codes

    assert "scale_of(linear)" in trips(algorithm(Broken), "test_chosen_scales_are_kept")


def test_chosen_scales_overwritten() -> None:
    class Broken(RTN):
        """One."""

        def quantize(self, block: Block) -> Codes:
            for each in block.linears:
                each.scale, each.zero = minmax_scale(each.weight, each.args)
            return super().quantize(block)

    assert "scale_of(linear)" in trips(algorithm(Broken), "test_chosen_scales_are_kept")


def by_extremes(block: Block) -> Codes:
    """Scales from the least weight above zero: right until a row is zero."""
    codes = {}
    for each in block.linears:
        made = nearest(each)
        peak = each.weight.abs().amax(1, keepdim=True)
        codes[each.name] = replace(made, scale=made.scale * (peak / peak))
    return codes


def test_a_row_of_zeros_that_makes_nan() -> None:
    class Broken(WithData):
        """One."""

        def quantize(self, block: Block) -> Codes:
            return by_extremes(block)

    contract = algorithm(Broken)
    contract.test_codes_are_well_made()
    said = trips(contract, "test_dead_channels_and_zero_rows")
    assert "with a dead channel and a row of zeros: scales" in said


def test_a_mean_over_no_tokens() -> None:
    class Broken(WithData):
        """One."""

        def quantize(self, block: Block) -> Codes:
            made = {}
            for group in block.groups:
                share = group.gram.diagonal().sum() / group.gram.diagonal().sum()
                for linear in group.linears:
                    done = nearest(linear)
                    made[linear.name] = replace(done, scale=done.scale * share)
            return made

    said = trips(algorithm(Broken), "test_a_block_that_no_token_reached")
    assert "that no token reached: scales" in said


def test_one_row_that_is_squeezed() -> None:
    class Broken(RTN):
        """One."""

        def quantize(self, block: Block) -> Codes:
            made = super().quantize(block)
            return {n: replace(w, scale=w.scale.squeeze()) for n, w in made.items()}

    assert "of one row: scales" in trips(algorithm(Broken, schemes=("W8A8",)), "test_one_row")


def test_a_width_that_is_cut() -> None:
    class Broken(RTN):
        """One."""

        def quantize(self, block: Block) -> Codes:
            (linear,) = block.linears
            width = linear.weight.shape[1] // 16 * 16
            cut = replace(linear, weight=linear.weight[:, :width])
            return {linear.name: nearest(cut)}

    said = trips(algorithm(Broken), "test_a_width_that_groups_do_not_divide")
    assert "of 40 columns in groups of 16: codes" in said


def test_data_that_makes_it_worse() -> None:
    class Broken(WithData):
        """One."""

        def transform(self, block: Block) -> None:
            for linear in block.linears:
                linear.scale, linear.zero = minmax_scale(linear.weight * 2, linear.args)

    said = trips(algorithm(Broken), "test_is_no_worse_than_rounding_to_nearest")
    assert "worst_ratio" in said


def test_a_run_of_codes_that_do_not_belong(tmp_path: Path) -> None:
    kind = changed(codes=lambda w: w.codes.flip(0))
    said = trips(algorithm(kind), "test_a_whole_run", tmp_path)
    assert "do not belong together" in said


# --- datasets -------------------------------------------------------------------------------------


class Words(Dataset[NoParams]):
    """Numbered lines."""

    name = "words"

    def documents(self, split: Split) -> Iterator[str]:
        return iter([f"line {number} of {split}" for number in range(100)])


def dataset(kind: type[Dataset[Any]], **attributes: Any) -> DatasetContract:
    made = type("Contract", (DatasetContract,), {"dataset": kind, **attributes})
    contract: DatasetContract = made()
    return contract


def test_a_sound_dataset_passes() -> None:
    contract = dataset(Words)
    checks = [name for name in dir(contract) if name.startswith("test_")]
    assert len(checks) > 5
    for check in checks:
        getattr(contract, check)()


COUNTER = itertools.count()


@pytest.mark.parametrize(
    ("documents", "sentence"),
    [
        (lambda: [], "no text"),
        (lambda: ["  "], "no text"),
        (lambda: [b"bytes " * 9], "must give strings"),
        (lambda: [f"{next(COUNTER)} words"], "changes its order from call to call"),
    ],
)
def test_documents_that_are_no_text(documents: Any, sentence: str) -> None:
    kind = type("Broken", (Words,), {"documents": lambda self, split: iter(documents())})
    assert sentence in trips(dataset(kind), "test_documents_are_text_in_one_order")


@pytest.mark.parametrize(
    ("sample", "sentence"),
    [
        (lambda length, count, seed: [], "must give 8 samples"),
        (lambda length, count, seed: [torch.ones(length)] * count, "int64"),
        (lambda length, count, seed: [torch.ones(1, length).long()] * count, "one axis"),
        (lambda length, count, seed: [torch.ones(99).long()] * count, "a sample of 99 tokens"),
        (lambda length, count, seed: [torch.full((length,), 999)] * count, "does not have"),
    ],
)
def test_samples_that_are_not_as_asked(sample: Any, sentence: str) -> None:
    assert sentence in trips(dataset(sampling(sample)), "test_samples_are_as_asked_for")


def test_samples_that_the_seed_does_not_decide() -> None:
    same = sampling(lambda length, count, seed: [torch.ones(length).long()] * count)
    assert "ignores the seed" in trips(dataset(same), "test_the_seed_decides")
    dataset(same, random=False).test_the_seed_decides()
    other = sampling(lambda length, count, seed: [torch.full((length,), next(COUNTER))] * count)
    assert "same seed" in trips(dataset(other), "test_the_seed_decides")


def sampling(sample: Any) -> type[Dataset[Any]]:
    class Broken(Words):
        """Draws otherwise."""

        def samples(
            self, tokenizer: Tokenizer, *, length: int, count: int, seed: int
        ) -> Iterator[Tensor]:
            return iter(sample(length, count, seed))

    return Broken


def test_a_network_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("there is no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)

    class Broken(Words):
        """Fetches."""

        def documents(self, split: Split) -> Iterator[str]:
            socket.getaddrinfo("example.org", 80)
            return super().documents(split)

    said = trips(dataset(Broken), "test_without_text_it_says_so")
    assert "raise a QplugError" in said
    assert "no network" in said


# --- exporters ------------------------------------------------------------------------------------


def exporter(**methods: Any) -> ExporterContract:
    """The contract of an exporter whose format has ``methods``."""
    stored_as = type("Broken", (CompressedTensors,), methods)()
    return contract_of(
        type("Broken", (CompressedTensorsExporter,), {"__doc__": "One.", "format": stored_as})
    )


def contract_of(kind: type[CompressedTensorsExporter]) -> ExporterContract:
    made = type("Contract", (ExporterContract,), {"exporter": kind})
    contract: ExporterContract = made()
    return contract


def packing(change: Any) -> Any:
    def pack(self: Any, weight: QuantizedWeight, scheme: Scheme, dtype: str) -> dict[str, Tensor]:
        packed = CompressedTensors.pack(self, weight, scheme, dtype)
        return change(weight, packed) or packed

    return pack


def spoil(tensor: Tensor) -> None:
    tensor.view(-1).view(torch.uint8)[0] ^= 1


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda: True, "must return None or a sentence"),
        (lambda: " ", "must return None or a sentence"),
        (lambda: "no\nno", "one line"),
        (lambda: "no", "refuses every preset"),
        (lambda: {}["scheme"], "must return a sentence: KeyError"),
    ],
)
def test_refusals_that_say_nothing(answer: Any, sentence: str) -> None:
    contract = exporter(refuses=lambda self, model, schemes: answer())
    assert sentence in trips(contract, "test_refuses_by_a_sentence")


def test_packing_that_loses() -> None:
    def unpack(self: Any, tensors: Any, scheme: Scheme) -> QuantizedWeight:
        back = CompressedTensors.unpack(self, tensors, scheme)
        return replace(back, scale=back.scale * 2)

    contract = exporter(unpack=unpack)
    said = trips(contract, "test_unpack_is_the_inverse_of_pack")
    assert "has other scale than w" in said
    assert "its relative error is" in trips(contract, "test_stored_tensors_stand_for_the_weight")


def test_scales_of_inputs_that_get_lost() -> None:
    contract = exporter(input_scale=lambda self, tensors, scheme: None)
    said = trips(contract, "test_scales_of_inputs_are_read_back")
    assert "must return the packed scale of static inputs" in said


def test_a_layout_that_is_not_kept() -> None:
    more = exporter(pack=packing(lambda weight, packed: {**packed, "more": weight.scale}))
    assert "but pack returns" in trips(more, "test_layout_is_what_pack_gives")
    dotted = exporter(
        pack=packing(lambda weight, packed: {f"w.{n}": t for n, t in packed.items()}),
        layout=lambda self, shape, scheme, dtype: {
            f"w.{name}": spec
            for name, spec in CompressedTensors.layout(self, shape, scheme, dtype).items()
        },
    )
    assert "must return local names" in trips(dotted, "test_layout_is_what_pack_gives")


def test_tensors_changed_in_place() -> None:
    contract = exporter(pack=packing(lambda weight, packed: spoil(weight.scale)))
    assert "changes the scale" in trips(contract, "test_pack_leaves_its_input_alone")

    def unpack(self: Any, tensors: Any, scheme: Scheme) -> QuantizedWeight:
        spoil(tensors["weight_scale"])
        return CompressedTensors.unpack(self, tensors, scheme)

    contract = exporter(unpack=unpack)
    assert "unpack changes the tensors" in trips(contract, "test_pack_leaves_its_input_alone")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda config: {**config, "shape": torch.ones(1)}, "must be JSON"),
        (lambda config: {**config, "shape": (1, 2)}, "differs after JSON"),
        (lambda config: {**config, "config_groups": 3}, "fails on its own config"),
        (lambda config: {**config, "ignore": ["re:.*"]}, "must find"),
    ],
)
def test_configs_that_are_not_understood(change: Any, sentence: str) -> None:
    def config(self: Any, model: Any, schemes: Any) -> Any:
        return change(CompressedTensors.config(self, model, schemes))

    assert sentence in trips(exporter(config=config), "test_config_is_json_and_is_understood")


@pytest.mark.parametrize("part", ["input_scale", "global_scale"])
def test_packing_that_loses_a_scale(part: str) -> None:
    def unpack(self: Any, tensors: Any, scheme: Scheme) -> QuantizedWeight:
        return replace(CompressedTensors.unpack(self, tensors, scheme), **{part: None})

    said = trips(exporter(unpack=unpack), "test_unpack_is_the_inverse_of_pack")
    assert f"other {part} than w" in said


@pytest.mark.parametrize("digests", [{"W8A16": ""}, {"W8A17": "0000"}])
def test_digests_that_cannot_differ(digests: dict[str, str]) -> None:
    contract = exporter()
    contract.digests = digests
    said = trips(contract, "test_what_is_on_disk_does_not_change")
    (name,) = digests
    assert f"digests[{name!r}]" in said


def test_bytes_on_disk_that_change() -> None:
    contract = exporter()
    contract.digests = {"W8A16": "0000"}
    said = trips(contract, "test_what_is_on_disk_does_not_change")
    digest = said.rpartition(": '")[2].partition("'")[0]
    contract.digests = {"W8A16": digest}
    contract.test_what_is_on_disk_does_not_change()


def test_a_folder_that_is_not_sound(tmp_path: Path) -> None:
    def config(self: Any, model: Any, schemes: Any) -> Any:
        return {**CompressedTensors.config(self, model, schemes), "format": "naive-quantized"}

    said = trips(exporter(config=config), "test_a_whole_run", tmp_path)
    assert "qplug verify finds faults" in said or "cannot be opened" in said
