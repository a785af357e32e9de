"""Checks a folder by the rules of its backend, and compares it with the float model."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qplug.api import Problem
from qplug.api.tensors import Checkpoint
from qplug.checkpoint.config_file import CONFIG
from qplug.checkpoint.locate import find_at_hand, find_model, may_be_on_hub
from qplug.checkpoint.names import module_of, split_name
from qplug.checkpoint.open import check_companions, open_checkpoint
from qplug.checkpoint.stacked import stacked_again
from qplug.checkpoint.tensor_file import tensor_bytes
from qplug.errors import QplugError
from qplug.files.damage import naming_damage
from qplug.machine.session import Session
from qplug.model.architectures import by_linear, expected_tensors
from qplug.model.kv_cache import STORED_SCALES
from qplug.model.skeleton import Skeleton
from qplug.output.origins import find_origin
from qplug.reading.built import built_otherwise, share_of
from qplug.reading.damage import find_damage, missing_files
from qplug.reading.drafts import drafts_missing, dropped_drafts
from qplug.reading.engine_version import EngineVersion, choose_version
from qplug.reading.finite import not_finite
from qplug.reading.folder import Folder, open_folder
from qplug.registry.registry import Registry


@dataclass(frozen=True)
class Verification:
    """The result of ``verify``.

    ``linears``: the number of quantized linears. ``against``: the float model, None if it was not
    found. ``errors``: ``||W' - W|| / ||W||`` by name of the linear, empty without a float model.
    ``rewritten``: the number of linears whose weights an algorithm rewrote, together with the
    operations around them; ``errors`` leaves them out. ``float_share`` is the share of the weights
    in decoder blocks that is float, 0 to 1; ``floats`` are its parts, by name of the weights with a
    star for each number. ``checksums``: the number of checksums that were compared with the files,
    0 if the folder has none. ``missing``: the float model that ``qplug.json`` names, if it is not
    on this machine and no other was given. ``rules`` says by the rules of which version of the
    engine the folder was checked, and why; it is empty for a backend without versions.
    """

    folder: str
    backend: str
    against: str | None
    linears: int
    problems: tuple[Problem, ...]
    errors: Mapping[str, float]
    rewritten: int
    float_share: float = 0.0
    floats: Mapping[str, float] = field(default_factory=dict)
    checksums: int = 0
    missing: str | None = None
    rules: str = ""

    @property
    def ok(self) -> bool:
        """Whether no check found a problem, so that the loader takes the folder."""
        return not self.problems


def verify(
    folder: str,
    *,
    against: str | None = None,
    backend: str | None = None,
    engine_version: str | None = None,
    python: str | None = None,
    trust_remote_code: bool = False,
    registry: Registry | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> Verification:
    """Check ``folder`` by its checksums and its loader's rules, and unpack its codes.

    ``engine_version`` is the version of the engine whose rules are checked, by default that of
    ``choose_version``; ``python`` has the engine. By default ``backend`` is the one that wrote the
    folder, and ``against`` the float model that
    ``qplug.json`` names, if it is on this machine. ``watch`` is called with the linears done and
    all linears. Raises QplugError if the folder cannot be opened, or is not quantized.
    """
    session = Session.alone(registry=registry, trust_remote_code=trust_remote_code)
    opened, version = open_as_loaded(
        folder, session, backend=backend, asked=engine_version, python=python
    )
    assert opened.exporter is not None
    source_name, source = find_source(opened, against, session)
    damage = find_damage(opened.checkpoint.folder)
    with naming_damage(str(opened.checkpoint.folder / CONFIG), opened.exporter.name):
        broken = list(opened.exporter.check_folder(opened.checkpoint, opened.view))
    problems = [
        *damage.problems,
        *broken,
        *built_otherwise(opened),
        *drafts_missing(opened, source),
        *not_finite(opened),
        *_tokenizer_missing(opened),
        *_companions_unsound(opened),
        *_architecture_lacks(opened, session),
    ]
    share = share_of(opened)
    errors: dict[str, float] = {}
    rewritten = opened.manifest.rewritten if opened.manifest else frozenset()
    if not problems:
        if source is not None:
            problems += _floats_differ(opened, source)
            problems += _strays(opened, source)
        for done, name in enumerate(opened.schemes, start=1):
            weight = opened.dequantized(name)
            if not torch.isfinite(weight).all():
                problems.append(Problem("values", name, "has NaN or infinite weights"))
            if source is not None and f"{name}.weight" not in rewritten:
                original = float_weight(source, name, weight.shape)
                errors[name] = relative_distance(weight, original)
            if watch is not None:
                watch(done, len(opened.schemes))
        problems += _errors_differ(opened, errors)
    return Verification(
        folder=folder,
        backend=opened.exporter.name,
        against=source_name,
        linears=len(opened.schemes),
        problems=tuple(problems),
        errors=errors,
        rewritten=sum(f"{name}.weight" in rewritten for name in opened.schemes),
        float_share=share.total,
        floats=share.kinds,
        checksums=damage.compared,
        missing=opened.manifest.model if opened.manifest and source is None else None,
        rules=str(version or ""),
    )


def open_as_loaded(
    name: str,
    session: Session,
    *,
    backend: str | None = None,
    asked: str | None = None,
    python: str | None = None,
) -> tuple[Folder, EngineVersion | None]:
    """Returns the folder ``name`` as the version of its engine loads it, and this version.

    ``asked`` and ``python``: as in ``choose_version``. The version is None if the backend has no
    engine with versions. Raises QplugError if the folder cannot be opened or is not quantized, or
    if there is no table for the version.
    """
    opened = open_folder(name, session, backend=backend)
    if opened.exporter is None:
        raise QplugError(f"{name}: is not quantized; there is nothing to verify")
    engine = opened.exporter.engine
    if engine is None or not engine.releases:
        if asked is not None:
            raise QplugError(f"the engine of {opened.exporter.name} has no versions to choose from")
        return opened, None
    backend = opened.exporter.name
    version = choose_version(engine, backend, opened.manifest, asked=asked, python=python)
    if version.version != engine.version:
        opened = open_folder(name, session, backend=backend, engine=version.version)
    return opened, version


def quick_problems(
    name: str, registry: Registry, *, trust_remote_code: bool = False
) -> list[Problem]:
    """Returns what is wrong with the folder ``name`` by its headers alone: no weight is read.

    The rules of the loader, the sizes of files, the tokenizer and files of JSON are checked. Raises
    QplugError if the folder cannot be opened, or is not quantized.
    """
    session = Session.alone(registry=registry, trust_remote_code=trust_remote_code)
    opened, _ = open_as_loaded(name, session)
    assert opened.exporter is not None
    with naming_damage(str(opened.checkpoint.folder / CONFIG), opened.exporter.name):
        rules = list(opened.exporter.check_folder(opened.checkpoint, opened.view))
    return [
        *missing_files(opened.checkpoint.folder),
        *rules,
        *_tokenizer_missing(opened),
        *_companions_unsound(opened),
    ]


def find_source(
    opened: Folder, against: str | None, session: Session
) -> tuple[str | None, Checkpoint | None]:
    """Find the float model of a folder: its name and its checkpoint, or None and None.

    The model is ``against``, or by default the one that the run read, if it is still where it was,
    or else the one that the manifest records, if it is on this machine: a stranger's folder must
    not make qplug ask the Hub. Raises QplugError if ``against``
    is given and is no model. Experts that the model stacks in one tensor are read one by one if the
    folder has their codes.
    """
    if against is not None:
        return against, _open_source(find_model(against), opened, session)
    recorded = opened.manifest.model if opened.manifest else None
    noted = find_origin(opened.manifest.identity) if opened.manifest else None
    folder = noted or (find_at_hand(recorded) if recorded is not None else None)
    if folder is None:
        return None, None
    try:
        return str(noted or recorded), _open_source(folder, opened, session)
    except QplugError:
        return None, None  # something else may have its name on this machine


def _open_source(folder: Path, opened: Folder, session: Session) -> Checkpoint:
    source = open_checkpoint(folder, readers=session.registry.sources)
    skeleton = Skeleton(source.folder, trust_remote_code=session.trust_remote_code)
    source = by_linear(source, session.registry, skeleton)
    return stacked_again(source, opened.schemes)


def not_at_hand(model: str) -> str:
    """Returns a sentence for the user of a folder that names ``model``, which was not found."""
    to_download = may_be_on_hub(model)
    how = f"{shlex.quote(model)} to download it" if to_download else "MODEL to compare with it"
    return f"the float model {model} is not at hand; pass --against {how}"


def _tokenizer_missing(opened: Folder) -> list[Problem]:
    """A problem if the folder has no tokenizer, which servers need."""
    folder = opened.checkpoint.folder
    tokenizers = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if not any((folder / name).exists() for name in tokenizers):
        return [Problem("tokenizer", str(folder), "there is no tokenizer file")]
    return []


def _companions_unsound(opened: Folder) -> list[Problem]:
    """A problem if a file of JSON that servers read is none."""
    try:
        check_companions(opened.checkpoint.folder)
    except QplugError as error:
        return [Problem("companion", str(opened.checkpoint.folder), str(error))]
    return []


def _architecture_lacks(opened: Folder, session: Session) -> list[Problem]:
    """A problem for each tensor of the architecture that is missing or has the wrong shape.

    Tensors may be float or packed; the check covers norms, experts and the head too.
    """
    problems = []
    tensors, linears = opened.checkpoint.tensors, opened.view.linears
    expected = expected_tensors(
        opened.checkpoint,
        opened.float_names(),
        session.registry,
        trust_remote_code=session.trust_remote_code,
    )
    for tensor, shape in expected.items():
        name, local = split_name(tensor)
        packed = local == "weight" and name in opened.schemes
        if not packed and tensor not in tensors:
            problems.append(Problem("missing", tensor, "is in the architecture, but not here"))
        elif (stored := linears[name] if packed else tensors[tensor].spec.shape) != shape:
            problems.append(Problem("shape", tensor, f"is {list(stored)}, not {list(shape)}"))
    return problems


def _floats_differ(opened: Folder, source: Checkpoint) -> list[Problem]:
    """A problem for each float tensor that is missing, has another shape, or has changed.

    Tensors that an algorithm rewrote may differ from the float model; all others must be equal to
    the bit.
    """
    problems = []
    tensors = opened.checkpoint.tensors
    rewritten = opened.manifest.rewritten if opened.manifest else frozenset()
    dropped = dropped_drafts(opened, source)
    for tensor, stored in source.tensors.items():
        name, local = split_name(tensor)
        if tensor in dropped or (local == "weight" and name in opened.schemes):
            continue
        if tensor not in tensors:
            problems.append(Problem("missing", tensor, "is in the float model, but not here"))
        elif tensors[tensor].spec.shape != stored.spec.shape:
            problems.append(Problem("shape", tensor, f"is not {list(stored.spec.shape)}"))
        elif tensor in rewritten:
            continue
        elif tensor_bytes(tensors[tensor].read()) != tensor_bytes(stored.read()):
            problems.append(Problem("changed", tensor, "differs from the float model"))
    return problems


def _strays(opened: Folder, source: Checkpoint) -> list[Problem]:
    """A problem for each tensor that belongs to no module: engines refuse such folders."""
    rewritten = opened.manifest.rewritten if opened.manifest else frozenset()
    known = {*source.tensors, *rewritten}
    return [
        Problem("unexpected", tensor, "belongs to no layer, and is not in the float model")
        for tensor in opened.checkpoint.tensors
        if tensor not in known
        and module_of(tensor) not in opened.schemes
        and not (opened.kv_cache and tensor.endswith(STORED_SCALES))
    ]


def float_weight(source: Checkpoint, name: str, shape: Sequence[int]) -> torch.Tensor:
    """The weight of the linear ``name`` in the float model, float32 ``[out, in]``.

    Raises QplugError if the float model has no such weight, or if its shape is not ``shape``.
    """
    tensor = f"{name}.weight"
    if tensor not in source.tensors:
        raise QplugError(f"{source.folder}: has no {tensor}; it is a different model")
    weight = source.read(tensor).float()
    if tuple(weight.shape) != tuple(shape):
        raise QplugError(f"{source.folder}: {tensor} has another shape; it is a different model")
    return weight


def relative_distance(restored: torch.Tensor, weight: torch.Tensor) -> float:
    """The relative error ``||W' - W|| / ||W||`` (Frobenius norm) of two float32 matrices."""
    norm = _norm(weight)
    return _norm(restored - weight) / (norm or 1.0)


def _norm(matrix: torch.Tensor) -> float:
    """The Frobenius norm, summed in float64: float32 is wrong by half a percent on large ones."""
    norm: float = torch.linalg.vector_norm(matrix, dtype=torch.float64).item()
    return norm


def _errors_differ(opened: Folder, errors: Mapping[str, float]) -> list[Problem]:
    """A problem for each linear whose error differs from the error that the manifest records."""
    if opened.manifest is None or opened.exporter is None or not opened.exporter.format.is_lossless:
        return []
    recorded, rewritten = opened.manifest.errors, opened.manifest.rewritten
    return [
        Problem("error", name, f"has error {error:.4g}, but qplug.json says {recorded[name]:.4g}")
        for name, error in errors.items()
        if f"{name}.weight" not in rewritten
        and name in recorded
        and not abs(error - recorded[name]) <= 0.01 * recorded[name] + 1e-6  # a problem for NaN
    ]
