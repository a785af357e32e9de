"""The text files of a finished run: config.json, qplug.json and the model card."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from string import Template
from typing import Any

from qplug.api import Exporter, ModelView
from qplug.api.scheme import Scheme
from qplug.errors import QplugError
from qplug.output.checksums import CHECKSUMS, sealed
from qplug.output.fingerprint import versions
from qplug.output.manifest import MANIFEST, VERSION
from qplug.output.markdown import code_span, heading, yaml_word
from qplug.output.step_report import Report
from qplug.recipe.recipe import Calibration, Recipe
from qplug.registry.registry import Registry

_CARD = Template("""\
---
tags:
- qplug
- $tag
---
# $title, $scheme_title

$model $action by qplug $version: `$algorithms`, scheme $scheme, for `$backend`.

$summary
$data`$manifest` has the recipe, the versions, and the error of each layer.

Check this folder with `qplug verify .`$serve.
""")


def result_files(
    name: str,
    model: ModelView,
    recipe: Recipe,
    exporter: Exporter[Any],
    schemes: Mapping[str, Scheme],
    reports: Sequence[Report],
    registry: Registry,
    *,
    online: Sequence[str] = (),
    notes: Sequence[str] = (),
    kept_float: Mapping[str, str] | None = None,
) -> tuple[dict[str, str], dict[str, Any]]:
    """Returns the text files of a finished run by file name, and the content of qplug.json.

    ``manifest_text`` makes qplug.json of its content and of the checksums of all other files. The
    contents do not depend on time. ``name`` is the model as the user named it, ``schemes`` has
    the scheme of each quantized linear, ``reports`` the reports of all steps, in order. ``online``
    names the linears whose inputs must be rotated as the model runs; ``kept_float`` says of linears
    that no kernel takes why they are float.
    """
    config = dict(model.config)
    quantization = exporter.format.config(model, schemes)
    if recipe.kv_cache is not None:
        quantization = exporter.format.with_cache(quantization, recipe.kv_cache)
    if quantization is not None:
        config["quantization_config"] = quantization
    errors = {name: error for report in reports for name, error in report.errors.items()}
    losses = {name: loss for report in reports for name, loss in report.losses.items()}
    ranges = _ranges(reports)
    kinds = list(dict.fromkeys(schemes.values()))
    manifest = {
        "version": VERSION,
        "model": name,
        "recipe": recipe.to_dict(),
        "versions": versions(recipe, registry),
        "schemes": [scheme.to_dict() for scheme in kinds],
        "layers": {
            name: {
                "scheme": kinds.index(s),
                "error": errors[name],
                "loss": losses.get(name),
                **ranges.get(name, {}),
            }
            for name, s in schemes.items()
        },
        "rewritten": sorted(name for report in reports for name in report.rewritten),
        "online": list(online),
        "notes": [*notes, *(note for report in reports for note in report.notes)],
    }
    experts = {n: list(counts) for report in reports for n, counts in report.experts.items()}
    if experts:
        manifest["experts"] = experts
    if kept_float:
        manifest["kept_float"] = dict(kept_float)
    card = _card(name, recipe, exporter, errors, config)
    return {"config.json": _json(config), "README.md": card}, manifest


def manifest_text(record: Mapping[str, Any], checksums: Mapping[str, Any]) -> str:
    """Returns the text of qplug.json: ``record``, then the ``checksums`` of files and its own.

    Raises QplugError that names the first number that is not finite, which JSON cannot have.
    """
    where = next(_not_finite(record), None)
    if where is not None:
        raise QplugError(f"{MANIFEST}: {where}, so the result is not sound")
    # As it will be read: keys that are numbers become text.
    plain = json.loads(json.dumps({**record, CHECKSUMS: checksums}, allow_nan=False))
    return _json(sealed(plain))


def _not_finite(value: object, place: str = "") -> Iterator[str]:
    """Yields the place and the value of each number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{place} is {value}"
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _not_finite(part, f"{place}, {key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _not_finite(part, place)


def _ranges(reports: Sequence[Report]) -> dict[str, dict[str, Any]]:
    """The input ranges and clips that ``reports`` contain, as JSON values by name of the linear."""
    plain: dict[str, dict[str, Any]] = {}
    for report in reports:
        for name, (before, after) in report.inputs.items():
            ranges = {"before": before.to_list(), "after": after.to_list()}
            plain.setdefault(name, {})["inputs"] = ranges
        for name, counts in report.clips.items():
            plain.setdefault(name, {})["clips"] = list(counts)
    return plain


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _summary(errors: Mapping[str, float]) -> str:
    if not errors:
        return "Its weights are float, as the algorithms transformed them; none is quantized."
    mean = sum(errors.values()) / len(errors)
    return f"{len(errors)} linear layers hold codes; mean relative error of a weight: {mean:.4f}."


def _data(calibration: Calibration | None) -> str:
    """Returns a line on the calibration data, "" if the run had none."""
    if calibration is None:
        return ""
    masked = "; statistics leave prompts out" if calibration.mask == "prompts" else ""
    return (
        f"Calibrated on {calibration.samples} samples of up to {calibration.seq_len} tokens of "
        f"{code_span(calibration.dataset)}{masked}.\n"
    )


def _card(
    name: str,
    recipe: Recipe,
    exporter: Exporter[Any],
    errors: Mapping[str, float],
    config: Mapping[str, Any],
) -> str:
    engine, serve = exporter.engine, None
    if engine is not None and engine.serve_command is not None:
        serve = " ".join([engine.serve_command.format("."), *engine.serve_arguments(config)])
    return _CARD.substitute(
        tag=yaml_word(recipe.scheme.name.lower()),
        title=heading(name.rstrip("/").rpartition("/")[2]),
        model=code_span(name),
        scheme_title=heading(recipe.scheme.name),
        version=version("qplug"),
        algorithms="+".join(recipe.algorithms),
        scheme=code_span(recipe.scheme.name),
        backend=recipe.backend,
        action="transformed" if exporter.format.stores_float else "quantized",
        summary=_summary(errors),
        data=_data(recipe.calibration),
        manifest=MANIFEST,
        serve=f"; serve it with `{serve}`" if serve else "",
    )
