"""The tests that every exporter must pass."""

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


class ExporterContract(ComponentContract):
    """Tests an exporter. Subclass it as ``class TestMine(ExporterContract): exporter = Mine``.

    ``shape``: the shape (out, in) of the weights that the tests pack, ``linear``: the name of the
    linear that they belong to. ``model_config``: the
    config.json of the model that the weights belong to. ``served``: a scheme and a group size (or
    None) that the exporter takes for ``model``; the tests quantize ``model`` with them, unless
    ``served`` is None. ``digests``: the first digits of the SHA-256 of the tensors that ``pack``
    returns for the kit's weight, by scheme, so that the format on users' disks cannot change
    unnoticed.
    """

    exporter: ClassVar[type[Exporter[Any]]]
    shape: ClassVar[tuple[int, int]] = (128, 256)
    linear: ClassVar[str] = "model.layers.0.mlp.down_proj"
    model_config: ClassVar[Mapping[str, Any]] = {"model_type": "llama"}
    served: ClassVar[tuple[str, int | None] | None] = ("W8A16", 32)
    digests: ClassVar[Mapping[str, str]] = {}

    def component(self) -> type[Exporter[Any]]:
        return self.exporter

    def model(self, folder: Path) -> str:
        """The model that the whole run quantizes: by default a tiny Llama written to ``folder``."""
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
        exporter: Exporter[Any] = self.make()
        accepted = 0
        for label, scheme in _schemes():
            with demanding(f"{self._who}.refuses fails for {label}; it must return a sentence"):
                sentence = exporter.refuses(self._view(), {self.linear: scheme})
            accepted += sentence is None
            demand(
                sentence is None or (isinstance(sentence, str) and sentence.strip()),
                f"{self._who}.refuses must return None or a sentence for {label}, not {sentence!r}",
            )
            demand(
                sentence is None or "\n" not in sentence,
                f"{self._who}.refuses: users get one line; for {label} it returned several",
            )
        demand(accepted, f"{self._who}.refuses refuses every preset of qplug")

    def test_unpack_is_the_inverse_of_pack(self) -> None:
        for label, scheme, dtype, weight in self._weights():
            format_ = self._format()
            if not format_.is_lossless:
                continue
            with demanding(f"{self._format_name}: packing and unpacking {label} fails"):
                back = format_.unpack(format_.pack(weight, scheme, dtype), scheme)
            for field in ("codes", "scale", "zero", "input_scale", "global_scale"):
                demand(
                    same(getattr(back, field), getattr(weight, field)),
                    f"{self._format_name}: unpack(pack(w)) has other {field} than w, for {label} "
                    f"of a {dtype} model; if the format cannot store codes, set is_lossless = "
                    "False",
                )

    def test_stored_tensors_stand_for_the_weight(self) -> None:
        for label, scheme, dtype, weight in self._weights():
            exporter: Exporter[Any] = self.make()
            with demanding(f"{self._who}: dequantize or effective_weight fails for {label}"):
                stored = exporter.format.pack(weight, scheme, dtype)
                restored = exporter.format.dequantize(stored, scheme)
                effective = exporter.effective_weight(stored, scheme)
            packed = dequantize(weight)
            error = (restored - packed).norm() / packed.norm()
            demand(
                restored.dtype == torch.float32 and restored.shape == packed.shape and error < 0.01,
                f"{self._format_name}.dequantize must return the packed weight in float32; for "
                f"{label} its relative error is {float(error):.2g}",
            )
            demand(
                effective.dtype == torch.float32 and effective.shape == packed.shape,
                f"{self._who}: effective_weight must return a float32 weight of the packed shape; "
                f"for {label} it returns {effective.dtype} {list(effective.shape)}",
            )

    def test_scales_of_inputs_are_read_back(self) -> None:
        for label, scheme, dtype, weight in self._weights():
            if weight.input_scale is None:
                continue
            format_ = self._format()
            with demanding(f"{self._format_name}.input_scale fails for {label}"):
                read = format_.input_scale(format_.pack(weight, scheme, dtype), scheme)
            demand(
                same(read, weight.input_scale),
                f"{self._format_name}.input_scale must return the packed scale of static inputs; "
                f"for {label} it returns {read}",
            )

    def test_layout_is_what_pack_gives(self) -> None:
        for label, scheme, dtype, weight in self._weights():
            format_ = self._format()
            with demanding(f"{self._format_name}: layout or pack fails for {label}"):
                layout = format_.layout(self.shape, scheme, dtype)
                packed = format_.pack(weight, scheme, dtype)
            planned = {name: (spec.dtype, tuple(spec.shape)) for name, spec in layout.items()}
            written = {n: (str(t.dtype)[6:], tuple(t.shape)) for n, t in packed.items()}
            demand(
                planned == written,
                f"{self._format_name}: layout says {planned} for {label}, but pack returns "
                f"{written}",
            )
            demand(
                not any("." in name for name in packed),
                f"{self._format_name}.pack must return local names, such as weight_packed, not "
                f"{list(packed)}",
            )

    def test_pack_leaves_its_input_alone(self) -> None:
        for label, scheme, dtype, weight in self._weights():
            before = {n: t.clone() for n, t in _tensors(weight).items()}
            packed = self._format().pack(weight, scheme, dtype)
            for name, tensor in _tensors(weight).items():
                demand(
                    same(tensor, before[name]),
                    f"{self._format_name}.pack changes the {name} of its argument for {label}: "
                    "clone it first",
                )
            stored = {name: tensor.clone() for name, tensor in packed.items()}
            refusal(lambda p=packed, s=scheme: self._format().unpack(p, s))
            demand(
                all(same(packed[name], stored[name]) for name in stored),
                f"{self._format_name}.unpack changes the tensors of its argument for {label}: "
                "clone them first",
            )

    def test_config_is_json_and_is_understood(self) -> None:
        format_ = self._format()
        for label, scheme in self._accepted():
            with demanding(f"{self._format_name}.config fails for {label}"):
                config = format_.config(self._view(), {self.linear: scheme})
            if config is None:
                continue
            with demanding(f"{self._format_name}.config must be JSON; for {label} it is not"):
                read = json.loads(json.dumps(config))
            demand(
                read == config,
                f"{self._format_name}.config differs after JSON: use lists and strings",
            )
            with demanding(f"{self._format_name}.read_schemes fails on its own config for {label}"):
                schemes = format_.read_schemes(read, self._view())
            demand(
                set(schemes) == {self.linear},
                f"{self._format_name}.read_schemes must find {[self.linear]} in its own config for "
                f"{label}, and found {sorted(schemes)}",
            )

    def test_what_is_on_disk_does_not_change(self) -> None:
        compared = set()
        for label, scheme, dtype, weight in self._weights():
            expected = self.digests.get(label)
            if not expected or dtype != "bfloat16":
                continue
            compared.add(label)
            digest = hashlib.sha256()
            for name, tensor in sorted(self._format().pack(weight, scheme, dtype).items()):
                digest.update(name.encode() + bytes(tensor_bytes(tensor)))
            demand(
                digest.hexdigest().startswith(expected),
                f"{self._format_name}: pack returns other bytes for {label} than in the files that "
                f"users have. If that is intended, set digests = "
                f"{{{label!r}: {digest.hexdigest()[:16]!r}}}",
            )
        for label in self.digests:
            demand(
                label in compared,
                f"{type(self).__qualname__}.digests[{label!r}] is compared with nothing: it needs "
                f"digits, and a scheme that {self._who} takes",
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
            verified = verify(str(out), registry=registry)
        faults = "; ".join(map(str, verified.problems))
        demand(
            not verified.problems, f"{self._who}: qplug verify finds faults in its folder: {faults}"
        )
        demand(verified.errors, f"{self._who}: qplug verify finds no linear in its folder")

    # --- the exporter, and weights for it --------------------------------------------------------

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
            linears={self.linear: self.shape},
            quantizable=frozenset({self.linear}),
            blocks=("model.layers.0",),
            head=None,
        )

    def _accepted(self) -> Iterator[tuple[str, Scheme]]:
        """The schemes that the exporter takes, with names for messages."""
        exporter: Exporter[Any] = self.make()
        if not exporter.format.stores_float:
            for label, scheme in _schemes():
                if exporter.refuses(self._view(), {self.linear: scheme}) is None:
                    yield label, scheme

    def _weights(self) -> Iterator[tuple[str, Scheme, str, QuantizedWeight]]:
        """A random weight in each accepted scheme, for a model in each dtype."""
        exporter: Exporter[Any] = self.make()
        for label, scheme in self._accepted():
            for dtype in ("bfloat16", "float16"):
                stored = scheme.with_scale_dtype(exporter.format.scale_dtype(scheme, dtype))
                yield label, stored, dtype, _random(self.shape, stored)


def _schemes() -> Iterator[tuple[str, Scheme]]:
    """Every preset, and presets with groups also in other sizes, with names for messages."""
    for name, scheme in PRESETS.items():
        yield name, scheme
        if scheme.weights.strategy == "group":
            for size in (32, 64, -1):
                with suppress(QplugError):  # some presets fix the size
                    yield f"{name} in groups of {size}", scheme.with_group_size(size)


def _random(shape: tuple[int, int], scheme: Scheme) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    inputs = torch.tensor([0.25]) if scheme.static_inputs else None
    return replace(round_to_nearest(weight, scheme.weights), input_scale=inputs)


def _tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    values = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
