"""The text files of a finished run: config.json, qplug.json and the model card."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qplug.api import Exporter, ModelView
from qplug.api.events import RaisedBlock
from qplug.api.scheme import Scheme
from qplug.errors import QplugError
from qplug.output.card import CARD, model_card
from qplug.output.checksums import CHECKSUMS, sealed
from qplug.output.fingerprint import versions
from qplug.output.manifest import MANIFEST, VERSION
from qplug.output.origins import public_name, public_values
from qplug.output.step_report import Report
from qplug.recipe.recipe import Recipe
from qplug.registry.registry import Registry


def result_files(
    model_name: str,
    source: Path,
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
    raised: Sequence[RaisedBlock] = (),
) -> tuple[dict[str, str], dict[str, Any]]:
    """Returns the text files of a finished run by file name, and the content of qplug.json.

    ``manifest_text`` makes qplug.json of its content and of the checksums of all other files. The
    contents do not depend on time, and say of local paths only the last part. ``model_name`` is the
    model as the user named it, and ``source`` its folder. ``schemes`` has the scheme of each
    quantized linear, ``reports`` the reports of all steps, in order. ``online`` names the linears
    whose inputs must be rotated as the model runs; ``kept_float`` says of linears that no kernel
    takes why they are float; ``raised`` are blocks that were given more bits.
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
        "model": public_name(model_name),
        "recipe": public_values(recipe.to_dict()),
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
    card = model_card(model_name, source, recipe, exporter, model, schemes, errors, config, raised)
    return {"config.json": _json(config), CARD: card}, manifest


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
