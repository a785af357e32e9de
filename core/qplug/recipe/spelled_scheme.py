"""Finds the scheme for given weights and inputs: a preset, or a scheme with a systematic name."""

from __future__ import annotations

from dataclasses import replace

from qplug.api.scheme import PRESETS, QuantArgs, Scheme, preset
from qplug.errors import QplugError


def spelled(weights: QuantArgs, activations: QuantArgs | None) -> Scheme:
    """The scheme that stores ``weights`` and rounds ``activations``, under its usual name.

    ``activations`` is None if inputs stay float. Raises QplugError if qplug cannot round inputs in
    the way that ``activations`` describes.
    """
    _check_inputs(activations)
    for known in PRESETS.values():
        if (known.weights, known.activations) == (weights, activations):
            return known
        sized = activations is None or known.weights.strategy == "group"
        if sized and known.activations == activations and _grouped_alike(known.weights, weights):
            return replace(known, weights=weights)
    name = f"W{_letters(weights)}A{_letters(activations) if activations else '16'}"
    if _grid_is_known(weights) and _grid_is_known(activations):
        name += _asymmetric(weights, activations)
        # Of rounded inputs, only the schemes above have groups in engines; the suffix keeps such a
        # scheme out of their tables, which look schemes up by name.
        name += f"_G{weights.group_size}" if activations and weights.group_size else ""
        return Scheme(name, weights, activations)
    # Other float formats exist only in schemes that qplug knows by name.
    return Scheme(preset(name).name, weights, activations)


def _check_inputs(args: QuantArgs | None) -> None:
    if args is None:
        return
    if args.dynamic and args.strategy not in ("token", "group"):
        raise QplugError(
            f"inputs have one dynamic scale per token or per group, not per {args.strategy}"
        )
    if not args.dynamic:
        name = "FP8" if args.is_float else "W8A8_STATIC"
        if preset(name).activations != args:
            raise QplugError(
                f"inputs with a static scale must be as in {name}, with one scale for the tensor"
            )


def _grouped_alike(known: QuantArgs, given: QuantArgs) -> bool:
    """Whether both differ at most in the group size; a whole row counts as a group size."""
    rows = ("group", "channel")
    alike = (known.dtype, known.symmetric, known.scale_dtype) == (
        given.dtype,
        given.symmetric,
        given.scale_dtype,
    )
    return alike and known.strategy in rows and given.strategy in rows


def _asymmetric(weights: QuantArgs, activations: QuantArgs | None) -> str:
    if activations is None or activations.symmetric:
        return "" if weights.symmetric else "_ASYM"
    return "_ASYM_INPUTS" if weights.symmetric else "_ASYM_BOTH"


def _letters(args: QuantArgs) -> str:
    return args.dtype.upper() if args.is_float else str(args.bits)


def _grid_is_known(args: QuantArgs | None) -> bool:
    return args is None or not args.is_float or args.dtype in ("e4m3", "e5m2")


def scheme_text(scheme: Scheme) -> str:
    """Returns the name of ``scheme`` with the size of its groups, such as ``W4A16 g128``."""
    if scheme.activations is not None or scheme.weights.fixes_scales:
        return scheme.name
    size = scheme.weights.group_size
    if size is not None:
        return f"{scheme.name} g{size}"
    return f"{scheme.name} row" if scheme.weights.strategy == "channel" else scheme.name
