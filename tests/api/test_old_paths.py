"""Public names under the paths of 0.1: the same objects, and a warning that names the new path."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator

import pytest

import qplug
import qplug.numerics
import qplug.text
from qplug.api.old_paths import MOVED, RENAMED

#: What the documentation of 0.1 called public and what its plugins imported, by module. Only
#: ``laid_out.loading_problems`` is gone: its exporter is divided into a format and an engine now.
OLD = {
    "checkpoint": "Checkpoint",
    "clipping": "scaling_error search_clip unclipped_ratio",
    "hadamard": "exists matrix transform",
    "hub_text": "HubParams HubText",
    "laid_out": "layout_problems",
    "learning": "Learned SignSGD learn learns_ranges start_clips",
    "limits": "DEVICES Target beyond_limits shape_problem",
    "numerics": "per_column",
    "params": "Param",
    "registry": "Registry",
    "rotation": "Hadamard Random Rotation Written",
    "scheme": "E4M3_SCALES E8M0_SCALES FLOATS FLOAT_MAX PRESETS QuantArgs Scheme preset",
    "stored_scales": "as_stored global_scale largest_code power_of_two",
    "straight_through": "fake_quantize range_scale ranges round_inputs stretched",
    "turning": "rotations turned",
    "windows": "document_windows first_windows packed_windows random_windows sample",
}
PACKAGES = ("checkpoint", "numerics", "registry")
#: Names that did not move, in modules that did not either.
STAYED = {
    "numerics": "activation_top check_width clip_to_scale code_dtype dequantize "
    "fake_quantize_activations global_scale_of in_groups input_scale minmax_scale nearest "
    "out_of_groups output_error per_row_scale quantize range_scale relative_error "
    "relative_output_error round_codes round_floats round_to_nearest scale_of weight_range",
    "hookspecs": "hookimpl qplug_algorithms qplug_datasets qplug_exporters qplug_commands "
    "qplug_model_view qplug_block_done qplug_run_done",
    "errors": "PluginError PluginWarning QplugError",
}
CASES = [(module, name) for module, names in OLD.items() for name in names.split()]


@pytest.fixture(autouse=True)
def _not_imported_yet() -> Iterator[None]:
    for module in MOVED:
        sys.modules.pop(module, None)
    yield
    for module in MOVED:
        sys.modules.pop(module, None)


def test_every_old_path_is_tried() -> None:
    assert {f"qplug.{module}" for module in OLD} == {
        *MOVED,
        *(f"qplug.{package}" for package in PACKAGES),
    }
    assert set(RENAMED) <= {(f"qplug.{module}", name) for module, name in CASES}


@pytest.mark.parametrize(("module", "name"), CASES)
def test_an_old_name_is_the_new_object(module: str, name: str) -> None:
    path = f"qplug.{module}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        scope: dict[str, object] = {}
        exec(compile(f"from {path} import {name}", "plugin.py", "exec"), scope)
    (warning,) = caught
    assert warning.category is FutureWarning
    assert warning.filename == "plugin.py"
    text = str(warning.message)
    assert text.startswith(path)
    assert "will be removed in qplug 0.3" in text

    door = importlib.import_module(text.rpartition(" from ")[2])
    assert door in (qplug, qplug.numerics, qplug.text)
    renamed = {("qplug.numerics", "per_column"): "column_scales", **RENAMED}
    new = renamed.get((path, name), name)
    assert new in door.__all__
    assert scope[name] is getattr(door, new)


def test_an_old_module_warns_once() -> None:
    with pytest.warns(FutureWarning, match=r"qplug.clipping will .*: import from qplug.numerics"):
        import qplug.clipping
    assert qplug.clipping.search_clip is qplug.numerics.search_clip
    import qplug.clipping


def test_an_old_module_has_no_other_names() -> None:
    with pytest.warns(FutureWarning):
        import qplug.windows
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = qplug.windows.no_such_name
    with pytest.raises(ImportError, match="no_such_name"):
        exec("from qplug.checkpoint import no_such_name")


@pytest.mark.parametrize("module", STAYED)
def test_what_stayed_does_not_warn(module: str) -> None:
    stayed = importlib.import_module(f"qplug.{module}")
    for name in STAYED[module].split():
        assert getattr(stayed, name) is not None
