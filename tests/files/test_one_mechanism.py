"""No module reads a stranger's file but through ``qplug.files`` and the reader of tensors."""

from __future__ import annotations

import ast
from pathlib import Path

#: Calls that read or parse a whole file without a limit, by the last parts of their names.
RAW = {
    *("json.load", "json.loads", "yaml.load", "yaml.safe_load", "yaml.SafeLoader", "torch.load"),
    *("load_file", "safe_open", "pickle.load", "pickle.loads", "tomllib.load", "numpy.load"),
    *(".read_text", ".read_bytes"),
}
#: What a module may call besides, and why.
ALLOWED = {
    "core/qplug/files/json_text.py": {"json.loads"},  # the mechanism itself
    "core/qplug/recipe/yaml_tree.py": {"yaml.SafeLoader"},  # of a text that the mechanism read
    # What a run has written itself.
    "core/qplug/output/writer.py": {"load_file"},
    "core/qplug/output/journal.py": {"json.loads"},
    "core/qplug/output/result_files.py": {"json.loads"},
    "core/qplug/output/unfinished.py": {".read_bytes"},
    # A plugin is code: who can change it need not break its reader.
    "core/qplug/output/fingerprint.py": {".read_bytes"},
    # The system's own files, qplug's own templates, an engine's log and its answer.
    "core/qplug/machine/neighbours.py": {".read_text"},
    "core/qplug/reading/engine.py": {".read_text", "json.load"},
    "core/qplug/registry/scaffold.py": {".read_text"},
    "core/qplug/testing/exporter.py": {"json.loads"},
    "plugins/backends/qplug_vllm/cpu.py": {".read_text"},
    "plugins/datasets/qplug_demo/python_text.py": {".read_text"},
}
ROOT = Path(__file__).parents[2]


def raw_calls(path: Path) -> set[str]:
    called = {
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
    }
    return RAW & {*called, *(f".{name.rpartition('.')[2]}" for name in called if "." in name)}


def test_no_other_module_reads_a_file_raw() -> None:
    files = sorted(file for folder in ("core", "plugins") for file in (ROOT / folder).rglob("*.py"))
    found = {file.relative_to(ROOT).as_posix(): raw_calls(file) for file in files}
    assert {file: calls for file, calls in found.items() if calls - ALLOWED.get(file, set())} == {}
