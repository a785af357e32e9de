"""Arithmetic that algorithms share: scales, rounding, clips, errors, rotations and learning.

The names in ``__all__`` are public; the modules of this package are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qplug.api.groups import dequantize, in_groups, out_of_groups, per_row_scale
from qplug.api.old_paths import moved_names
from qplug.numerics.activations import activation_top, fake_quantize_activations, input_scale
from qplug.numerics.alike import parts_side_by_side, side_by_side, together
from qplug.numerics.clipping import (
    candidate_errors,
    scaling_error,
    scaling_errors,
    search_clip,
    search_clips,
    unclipped_ratio,
)
from qplug.numerics.few_tokens import completed_experts, completed_gram, completed_grams
from qplug.numerics.hadamard import hadamard_exists, hadamard_matrix, hadamard_transform
from qplug.numerics.learning import Learned, SignSGD, learn, learns_ranges, start_clips
from qplug.numerics.losses import output_error, relative_error, relative_output_error
from qplug.numerics.rotation import ExplicitRotation, HadamardRotation, RandomRotation, Rotation
from qplug.numerics.rounding import (
    code_dtype,
    nearest,
    quantize,
    round_codes,
    round_floats,
    round_to_nearest,
)
from qplug.numerics.scale_formats import (
    as_stored,
    covering_global_scale,
    covering_power,
    largest_code,
    power_of_two,
)
from qplug.numerics.scales import (
    check_width,
    clip_to_scale,
    column_scales,
    global_scale_of,
    minmax_scale,
    range_scale,
    scale_of,
    weight_range,
)
from qplug.numerics.stored_scales import closest, search_scale, stored_candidates
from qplug.numerics.straight_through import (
    fake_quantize,
    range_scale_with_gradients,
    ranges_with_gradients,
    round_in_range,
    round_inputs,
    stretched,
)
from qplug.numerics.threads import one_thread
from qplug.numerics.turned_model import rotated_model, rotations

__all__ = [
    "ExplicitRotation",
    "HadamardRotation",
    "Learned",
    "RandomRotation",
    "Rotation",
    "SignSGD",
    "activation_top",
    "as_stored",
    "candidate_errors",
    "check_width",
    "clip_to_scale",
    "closest",
    "code_dtype",
    "column_scales",
    "completed_experts",
    "completed_gram",
    "completed_grams",
    "covering_global_scale",
    "covering_power",
    "dequantize",
    "fake_quantize",
    "fake_quantize_activations",
    "global_scale_of",
    "hadamard_exists",
    "hadamard_matrix",
    "hadamard_transform",
    "in_groups",
    "input_scale",
    "largest_code",
    "learn",
    "learns_ranges",
    "minmax_scale",
    "nearest",
    "one_thread",
    "out_of_groups",
    "output_error",
    "parts_side_by_side",
    "per_row_scale",
    "power_of_two",
    "quantize",
    "range_scale",
    "range_scale_with_gradients",
    "ranges_with_gradients",
    "relative_error",
    "relative_output_error",
    "rotated_model",
    "rotations",
    "round_codes",
    "round_floats",
    "round_in_range",
    "round_inputs",
    "round_to_nearest",
    "scale_of",
    "scaling_error",
    "scaling_errors",
    "search_clip",
    "search_clips",
    "search_scale",
    "side_by_side",
    "start_clips",
    "stored_candidates",
    "stretched",
    "together",
    "unclipped_ratio",
    "weight_range",
]

if not TYPE_CHECKING:  # a type checker would take any name for one of this module
    __getattr__ = moved_names(__name__, {"per_column": ("qplug.numerics", "column_scales")})


def __dir__() -> list[str]:
    return __all__
