"""What every exporter must keep."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qplug.api import Engine, Exporter, Format, ModelView, QuantizedWeight
from qplug.api.groups import dequantize
from qplug.api.scheme import PRESETS, Scheme
from qplug.checkpoint.tensor_file import tensor_bytes
from qplug.errors import QplugError
from qplug.numerics.rounding import round_to_nearest
from qplug.testing.checking import ComponentContract, demand, demanding, refusal, same
from qplug.testing.models import write_tiny_model
from qplug.testing.registries import registry_with

_NAME = "model.layers.0.mlp.down_proj"


class ExporterContract(ComponentContract):
    """Subclass it as ``class TestMine(ExporterContract): exporter = Mine``.

    ``shape`` is that of the weights that are packed, (out, in), and ``model_config`` the
    config.json of the model that they are said to be of. ``served``: a scheme and a group size, or
    None, that it takes of ``model``, for a whole run; None makes no run. ``digests``: the first
    digits of the SHA-256 of what ``pack`` gives for the kit's weight, by scheme: what is on users'
    disks must not change unseen.
    """

    exporter: ClassVar[type[Exporter[Any]]]
    shape: ClassVar[tuple[int, int]] = (128, 256)
    model_config: ClassVar[Mapping[str, Any]] = {"model_type": "llama"}
    served: ClassVar[tuple[str, int | None] | None] = ("W8A16", 32)
    digests: ClassVar[Mapping[str, str]] = {}

    def component(self) -> type[Exporter[Any]]:
        return self.exporter

    def model(self, folder: Path) -> str:
        """The model of the whole run, which may be written into ``folder``: a tiny Llama."""
        return str(write_tiny_model(folder))

    def test_names_a_format_and_an_engine(self) -> None:
        kind = self.exporter
        demand(
            isinstance(getattr(kind, "format", None), Format),
            f"{kind.__qualname__}.format must be an object of a subclass of qplug.Format",
        )
        demand(
            isinstance(kind.engine, Engine | None),
            f"{kind.__qualname__}.engine must be an object of a subclass of qplug.Engine, or None",
        )

    def test_the_engine_tells_what_it_serves(self) -> None:
        engine = self.exporter.engine
        if engine is None:
            return
        with demanding(f"{type(engine).__qualname__}.capabilities fails"):
            rows = engine.capabilities()
        for row in rows:
            demand(
                row.engine in engine.releases,
                f"{type(engine).__qualname__}.capabilities must name a release of its table in "
                f"engine, not {row.engine!r}",
            )

    def test_refuses_by_a_sentence(self) -> None:
        made: Exporter[Any] = self.make()
        accepted = 0
        for label, scheme in _schemes():
            with demanding(f"{self._who}.refuses fails for {label}; it must return a sentence"):
                sentence = made.refuses(self._view(), {_NAME: scheme})
            accepted += sentence is None
            demand(
                sentence is None or (isinstance(sentence, str) and sentence.strip()),
                f"{self._who}.refuses must return None or a sentence for {label}, not {sentence!r}",
            )
            demand(
                sentence is None or "\n" not in sentence,
                f"{self._who}.refuses: users get one line; for {label} it returned several",
            )
        demand(accepted, f"{self._who}.refuses refuses every scheme that qplug has a name for")

    def test_unpack_is_the_inverse_of_pack(self) -> None:
        for label, scheme, dtype, weight in self._weights():
            made = self._format()
            if not made.is_lossless:
                continue
            with demanding(f"{self._format_name}: packing and unpacking {label} fails"):
                back = made.unpack(made.pack(weight, scheme, dtype), scheme)
            for part in ("codes", "scale", "zero", "input_scale", "global_scale"):
                demand(
                    same(getattr(back, part), getattr(weight, part)),
                    f"{self._format_name}: unpack(pack(w)) has other {part} than w, for {label} of "
                    f"a {dtype} model; if it stores less than codes, say is_lossless = False",
                )

    def test_stored_tensors_stand_for_the_weight(self) -> None:
        for label, scheme, dtype, weight in self._weights():
            made: Exporter[Any] = self.make()
            with demanding(f"{self._who}: dequantize or effective_weight fails for {label}"):
                stored = made.format.pack(weight, scheme, dtype)
                found = made.format.dequantize(stored, scheme)
                read = made.effective_weight(stored, scheme)
            meant = dequantize(weight)
            off = (found - meant).norm() / meant.norm()
            demand(
                found.dtype == torch.float32 and found.shape == meant.shape and off < 0.01,
                f"{self._format_name}.dequantize must give the float32 weight back that was "
                f"packed; for {label} it is off by {float(off):.2g}",
            )
            demand(
                read.dtype == torch.float32 and read.shape == meant.shape,
                f"{self._who}: effective_weight must give a float32 weight of the shape that was "
                f"packed; for {label} it gives {read.dtype} {list(read.shape)}",
            )

    def test_scales_of_inputs_are_read_back(self) -> None:
        for label, scheme, dtype, weight in self._weights():
            if weight.input_scale is None:
                continue
            made = self._format()
            with demanding(f"{self._format_name}.input_scale fails for {label}"):
                read = made.input_scale(made.pack(weight, scheme, dtype), scheme)
            demand(
                same(read, weight.input_scale),
                f"{self._format_name}.input_scale must give the scale of static inputs back that "
                f"was packed; for {label} it gives {read}",
            )

    def test_layout_is_what_pack_gives(self) -> None:
        for label, scheme, dtype, weight in self._weights():
            made = self._format()
            with demanding(f"{self._format_name}: layout or pack fails for {label}"):
                planned = made.layout(self.shape, scheme, dtype)
                packed = made.pack(weight, scheme, dtype)
            told = {name: (spec.dtype, tuple(spec.shape)) for name, spec in planned.items()}
            given = {n: (str(t.dtype)[6:], tuple(t.shape)) for n, t in packed.items()}
            demand(
                told == given,
                f"{self._format_name}: layout says {told} for {label}, but pack gives {given}",
            )
            demand(
                not any("." in name for name in packed),
                f"{self._format_name}.pack must give local names, such as weight_packed: "
                f"{list(packed)}",
            )

    def test_pack_leaves_its_input_alone(self) -> None:
        for label, scheme, dtype, weight in self._weights():
            kept = {n: t.clone() for n, t in _tensors(weight).items()}
            packed = self._format().pack(weight, scheme, dtype)
            for name, tensor in _tensors(weight).items():
                demand(
                    same(tensor, kept[name]),
                    f"{self._format_name}.pack changes the {name} it is given, for {label}: clone "
                    "first",
                )
            stored = {name: tensor.clone() for name, tensor in packed.items()}
            refusal(lambda p=packed, s=scheme: self._format().unpack(p, s))
            demand(
                all(same(packed[name], stored[name]) for name in stored),
                f"{self._format_name}.unpack changes the tensors it is given, for {label}: clone "
                "first",
            )

    def test_config_is_json_and_is_understood(self) -> None:
        made = self._format()
        for label, scheme in self._accepted():
            with demanding(f"{self._format_name}.config fails for {label}"):
                config = made.config(self._view(), {_NAME: scheme})
            if config is None:
                continue
            with demanding(f"{self._format_name}.config must be JSON; for {label} it is not"):
                read = json.loads(json.dumps(config))
            demand(
                read == config,
                f"{self._format_name}.config is another after JSON: use lists and strings",
            )
            with demanding(f"{self._format_name}.read_schemes fails on its own config for {label}"):
                told = made.read_schemes(read, self._view())
            demand(
                set(told) == {_NAME},
                f"{self._format_name}.read_schemes must find {[_NAME]} in its own config for "
                f"{label}, and found {sorted(told)}",
            )

    def test_what_is_on_disk_does_not_change(self) -> None:
        compared = set()
        for label, scheme, dtype, weight in self._weights():
            wanted = self.digests.get(label)
            if not wanted or dtype != "bfloat16":
                continue
            compared.add(label)
            digest = hashlib.sha256()
            for name, tensor in sorted(self._format().pack(weight, scheme, dtype).items()):
                digest.update(name.encode() + bytes(tensor_bytes(tensor)))
            demand(
                digest.hexdigest().startswith(wanted),
                f"{self._format_name}: what pack gives for {label} has changed: users have such "
                f"files. If it is meant, say digests = {{{label!r}: {digest.hexdigest()[:16]!r}}}",
            )
        for label in self.digests:
            demand(
                label in compared,
                f"{type(self).__qualname__}.digests[{label!r}] is compared with nothing: give the "
                f"digits, for a scheme that {self._who} takes",
            )

    def test_a_whole_run(self, tmp_path: Path) -> None:
        from qplug.reading.verify import verify
        from qplug.run.quantize import quantize

        if self.served is None:
            return
        (name, size), registry = self.served, registry_with(self.exporter)
        model = self.model(tmp_path / "model")
        with demanding(f"{self._who}: a run with --backend {self.exporter.name} fails"):
            out = quantize(
                model,
                tmp_path / "out",
                scheme=name,
                group_size=size,
                backend=self.exporter.name,
                backend_options=dict(self.options),
                device="cpu",
                registry=registry,
            ).out
        if self.exporter.format.stores_float:
            return
        with demanding(f"{self._who}: the folder it wrote cannot be opened"):
            found = verify(str(out), registry=registry)
        told = "; ".join(map(str, found.problems))
        demand(not found.problems, f"{self._who}: qplug verify finds faults in its folder: {told}")
        demand(found.errors, f"{self._who}: none of the linears in its folder can be told")

    # --- how -------------------------------------------------------------------------------------

    @property
    def _who(self) -> str:
        return self.exporter.__qualname__

    @property
    def _format_name(self) -> str:
        return type(self.exporter.format).__qualname__

    def _format(self) -> Format:
        exporter: Exporter[Any] = self.make()
        return exporter.format

    def _view(self) -> ModelView:
        return ModelView(
            config=self.model_config,
            dtype="bfloat16",
            linears={_NAME: self.shape},
            quantizable=frozenset({_NAME}),
            blocks=("model.layers.0",),
            head=None,
        )

    def _accepted(self) -> Iterator[tuple[str, Scheme]]:
        made: Exporter[Any] = self.make()
        if not made.format.stores_float:
            for label, scheme in _schemes():
                if made.refuses(self._view(), {_NAME: scheme}) is None:
                    yield label, scheme

    def _weights(self) -> Iterator[tuple[str, Scheme, str, QuantizedWeight]]:
        """A random weight in each scheme that is not refused, of models of each dtype."""
        made: Exporter[Any] = self.make()
        for label, scheme in self._accepted():
            for dtype in ("bfloat16", "float16"):
                stored = scheme.with_scale_dtype(made.format.scale_dtype(scheme, dtype))
                yield label, stored, dtype, _random(self.shape, stored)


def _schemes() -> Iterator[tuple[str, Scheme]]:
    """Every preset, and those of groups in other sizes, with names for messages."""
    for name, scheme in PRESETS.items():
        yield name, scheme
        if scheme.weights.strategy == "group":
            for size in (32, 64, -1):
                with suppress(QplugError):  # some have no size to choose
                    yield f"{name} in groups of {size}", scheme.with_group_size(size)


def _random(shape: tuple[int, int], scheme: Scheme) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    inputs = torch.tensor([0.25]) if scheme.static_inputs else None
    return replace(round_to_nearest(weight, scheme.weights), input_scale=inputs)


def _tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    values = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
