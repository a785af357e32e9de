"""The model card of a result, README.md, as the Hub reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from math import prod
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, cast

import yaml

from qplug.api import Exporter, ModelView
from qplug.api.events import RaisedBlock
from qplug.api.scheme import Scheme
from qplug.errors import QplugError
from qplug.files.regular import read_text
from qplug.output.manifest import MANIFEST
from qplug.output.markdown import code_span, heading
from qplug.output.measured import Measured
from qplug.output.origins import hub_name, public_name
from qplug.recipe.recipe import Calibration, Recipe
from qplug.recipe.spelled_scheme import scheme_text
from qplug.recipe.yaml_tree import parse_yaml

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

CARD = "README.md"
#: The longest card that is read, in bytes.
LONGEST = 1 << 20
#: The keys of a source's card that hold for its quantized model too.
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
#: The task of an architecture, by the end of its name, where the source's card names none.
_TASKS = {"ForCausalLM": "text-generation", "ForConditionalGeneration": "image-text-to-text"}

_QUALITY = "## Quality"

_BODY = Template("""\
# $title, $scheme_title

$model $action by qplug $version: `$algorithms`, scheme $scheme, for `$backend`.

$summary
$mix$raised$data`$manifest` has the recipe, the versions, and the error of each layer.

Check this folder with `qplug verify .`$serve.
""")


def model_card(
    model: str,
    source: Path,
    recipe: Recipe,
    exporter: Exporter[Any],
    view: ModelView,
    schemes: Mapping[str, Scheme],
    errors: Mapping[str, float],
    config: Mapping[str, Any],
    raised: Sequence[RaisedBlock] = (),
) -> str:
    """Returns the text of README.md.

    ``model`` is the float model as the user named it, ``source`` its folder, and ``view`` its
    structure. ``schemes`` and ``errors`` are by quantized linear, and ``config`` is the config.json
    of the result. ``raised`` are the blocks that were given more bits than the recipe does.
    """
    engine, serve = exporter.engine, None
    if engine is not None and engine.serve_command is not None:
        serve = " ".join([engine.serve_command.format("."), *engine.serve_arguments(config)])
    name, mix = public_name(model), _mix(view, schemes)
    body = _BODY.substitute(
        title=heading(name.rpartition("/")[2]),
        model=code_span(name),
        scheme_title="mixed precision" if mix else heading(recipe.scheme.name),
        version=version("qplug"),
        algorithms="+".join(recipe.algorithms),
        scheme=f"{code_span(recipe.scheme.name)}{' and others' if mix else ''}",
        backend=recipe.backend,
        action="transformed" if exporter.format.stores_float else "quantized",
        summary=_summary(errors),
        mix=mix,
        raised=_raised(raised),
        data=_data(recipe.calibration),
        manifest=MANIFEST,
        serve=f"; serve it with `{serve}`" if serve else "",
    )
    return _card(_metadata(model, source, recipe, exporter, config), body)


def with_quality(card: str, measured: Measured, name: str) -> str:
    """Returns ``card`` with a section on what was ``measured``, in place of an older one.

    The Hub reads the perplexity from the head of the card, as a result of the model ``name``.
    Raises QplugError if ``card`` is no model card.
    """
    from huggingface_hub import EvalResult, ModelCard

    try:
        read = ModelCard(card, ignore_metadata_errors=True)
        data = cast("ModelCardData", read.data)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise QplugError(f"{CARD}: its head is not YAML; quantize the model again") from error
    if measured.perplexity is not None:
        text, _, dataset = measured.text.rpartition(" of ")
        result = EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=f"{dataset}, {text}",
            metric_type="perplexity",
            metric_value=round(measured.perplexity, 4),
        )
        data.model_name, data.eval_results = name, [result]
    lines = [f"Verdict: {measured.verdict}. {measured.reason}".rstrip()] if measured.verdict else []
    lines += [*measured.sentences, f"Measured on {measured.text}."]
    body = read.text.partition(f"\n{_QUALITY}\n")[0].strip("\n")
    return _card(data, "\n".join([body, "", _QUALITY, "", *lines, ""]))


def _card(data: ModelCardData, body: str) -> str:
    return f"---\n{data.to_yaml(line_break=chr(10))}\n---\n{body}"


def _metadata(
    model: str,
    source: Path,
    recipe: Recipe,
    exporter: Exporter[Any],
    config: Mapping[str, Any],
) -> ModelCardData:
    """Returns the head of the card: keys that the Hub knows."""
    from huggingface_hub import ModelCardData

    base, told = hub_name(model, config), _source_card(source)
    method = (config.get("quantization_config") or {}).get("quant_method")
    tags = ["qplug", recipe.scheme.name.lower(), *([method] if isinstance(method, str) else [])]
    engine = exporter.engine
    if engine is not None:
        tags += sorted(server.lower() for server in engine.servers)
    task = told.pop("pipeline_tag", None) or _task(config.get("architectures") or ())
    return ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        library_name="transformers",  # the Hub knows no engine as a library; it knows their tags
        pipeline_tag=task,
        tags=tags,
        **told,
    )


def _task(architectures: Sequence[Any]) -> str | None:
    names = [name for name in architectures if isinstance(name, str)]
    return next((t for end, t in _TASKS.items() for name in names if name.endswith(end)), None)


def _source_card(source: Path) -> dict[str, Any]:
    """Returns what the card of the float model says that holds for the result; {} without one."""
    try:
        head = read_text(source / CARD, LONGEST, within=source).split("---\n", 2)
        told = parse_yaml(head[1], CARD).plain() if len(head) == 3 and not head[0] else None
    except (FileNotFoundError, QplugError):
        return {}
    if not isinstance(told, dict):
        return {}
    found = {key: told[key] for key in _KEPT if _is_word(told.get(key))}
    if isinstance(languages := told.get("language"), list) and all(map(_is_word, languages)):
        found["language"] = languages
    return found


def _is_word(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= 200


def _summary(errors: Mapping[str, float]) -> str:
    if not errors:
        return "Its weights are float, as the algorithms transformed them; none is quantized."
    mean = sum(errors.values()) / len(errors)
    return f"{len(errors)} linear layers hold codes; mean relative error of a weight: {mean:.4f}."


def _mix(view: ModelView, schemes: Mapping[str, Scheme]) -> str:
    """Returns a line on the schemes of the weights, "" if all quantized weights have the same one.

    Shares are those of the weights of quantizable linears.
    """
    if len({*schemes.values()}) < 2:
        return ""
    weights: Counter[str] = Counter()
    for name in view.linears:
        if name in schemes or name in view.quantizable:
            scheme = schemes.get(name)
            stored = "float" if scheme is None else code_span(scheme_text(scheme))
            weights[stored] += prod(view.linears[name])
    total = sum(weights.values())
    shares = ", ".join(f"{_percent(n / total)} {what}" for what, n in weights.most_common())
    return f"A mix of schemes, by weights: {shares}.\n"


def _raised(blocks: Sequence[RaisedBlock]) -> str:
    """Returns a list of raised blocks, "" if there are none."""
    if not blocks:
        return ""
    lines = [f"- {block.sentence}" for block in blocks]
    why = (
        "Blocks that were given more bits, since the hidden states after them were too far from "
        "the float model's (the distance is the mean over tokens of the relative error):"
    )
    return "\n".join(["", why, "", *lines, "", ""])


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %"


def _data(calibration: Calibration | None) -> str:
    """Returns a line on the calibration data, "" if the run had none."""
    if calibration is None:
        return ""
    masked = "; statistics leave prompts out" if calibration.mask == "prompts" else ""
    return (
        f"Calibrated on {calibration.samples} samples of up to {calibration.seq_len} tokens of "
        f"{code_span(calibration.dataset)}{masked}.\n"
    )
