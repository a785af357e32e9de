"""Is a folder what it says it is? By the backend's own rules, and against the float model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from qplug.api import Problem
from qplug.api.tensors import Checkpoint
from qplug.checkpoint.locate import find_model
from qplug.checkpoint.names import module_of, split_name
from qplug.checkpoint.open import open_checkpoint
from qplug.checkpoint.tensor_file import tensor_bytes
from qplug.errors import QplugError
from qplug.machine.session import Session
from qplug.model.architectures import expected_tensors
from qplug.model.kv_cache import SCALES
from qplug.reading.folder import Folder, open_folder
from qplug.registry.registry import Registry


@dataclass(frozen=True)
class Verification:
    """What was found. ``errors``: ``||W' - W|| / ||W||`` of each linear, if there is a source.

    ``rewritten``: the linears that hold other weights than the source, with operations around them
    that make up for it; they have no error of their own.
    """

    folder: str
    backend: str
    against: str | None
    linears: int
    problems: tuple[Problem, ...]
    errors: Mapping[str, float]
    rewritten: int

    @property
    def ok(self) -> bool:
        """Whether the loader would take the folder: no problem was found."""
        return not self.problems


def verify(
    folder: str,
    *,
    against: str | None = None,
    backend: str | None = None,
    trust_remote_code: bool = False,
    registry: Registry | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> Verification:
    """Check ``folder`` as the loader of ``backend`` (that which wrote it) would, and unpack it.

    ``against`` is the float model; by default the one in ``qplug.json``, if it can be found.
    Raises QplugError if the folder cannot be opened at all, or is not quantized.
    """
    session = Session.alone(registry=registry, trust_remote_code=trust_remote_code)
    opened = open_folder(folder, session, backend=backend)
    if opened.exporter is None:
        raise QplugError(f"{folder}: is not quantized; there is nothing to verify")
    source_name, source = find_source(opened, against)
    problems = list(opened.exporter.check_folder(opened.checkpoint, opened.view))
    problems += _beside_the_weights(opened)
    problems += _architecture_lacks(opened, session)
    errors: dict[str, float] = {}
    rewritten = opened.manifest.rewritten if opened.manifest else frozenset()
    if not problems:
        if source is not None:
            problems += _floats_differ(opened, source)
            problems += _strays(opened, source)
            problems += _grown(opened, source)
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
    )


def find_source(opened: Folder, against: str | None) -> tuple[str | None, Checkpoint | None]:
    """The float model called ``against``, else the one that is recorded, if it can be found.

    Raises QplugError if ``against`` is given and is none.
    """
    if against is not None:
        return against, open_checkpoint(find_model(against))
    recorded = opened.manifest.model if opened.manifest else None
    if recorded is None:
        return None, None
    try:
        return recorded, open_checkpoint(find_model(recorded))
    except QplugError:
        return None, None  # the folder may have come from another machine


def _beside_the_weights(opened: Folder) -> list[Problem]:
    """A server needs a tokenizer, and a tensor for every weight that is not a linear's."""
    folder = opened.checkpoint.folder
    tokenizers = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if not any((folder / name).exists() for name in tokenizers):
        return [Problem("tokenizer", str(folder), "there is no tokenizer file")]
    return []


def _architecture_lacks(opened: Folder, session: Session) -> list[Problem]:
    """Every tensor that the architecture has is there, float or packed: norms, experts, head."""
    problems = []
    held, linears = opened.checkpoint.tensors, opened.view.linears
    expected = expected_tensors(
        opened.checkpoint, session.registry, trust_remote_code=session.trust_remote_code
    )
    for tensor, shape in expected.items():
        name, local = split_name(tensor)
        packed = local == "weight" and name in opened.schemes
        if not packed and tensor not in held:
            problems.append(Problem("missing", tensor, "is in the architecture, but not here"))
        elif (found := linears[name] if packed else held[tensor].spec.shape) != shape:
            problems.append(Problem("shape", tensor, f"is {list(found)}, not {list(shape)}"))
    return problems


def _floats_differ(opened: Folder, source: Checkpoint) -> list[Problem]:
    """What is not quantized is there, in shape; bit for bit where no algorithm rewrites it."""
    problems = []
    held = opened.checkpoint.tensors
    rewritten = opened.manifest.rewritten if opened.manifest else frozenset()
    for tensor, stored in source.tensors.items():
        name, local = split_name(tensor)
        if local == "weight" and name in opened.schemes:
            continue
        if tensor not in held:
            problems.append(Problem("missing", tensor, "is in the float model, but not here"))
        elif held[tensor].spec.shape != stored.spec.shape:
            problems.append(Problem("shape", tensor, f"is not {list(stored.spec.shape)}"))
        elif tensor in rewritten:
            continue
        elif tensor_bytes(held[tensor].read()) != tensor_bytes(stored.read()):
            problems.append(Problem("changed", tensor, "differs from the float model"))
    return problems


def _strays(opened: Folder, source: Checkpoint) -> list[Problem]:
    """Tensors that belong to nothing: buffers of algorithms, at which engines stop."""
    rewritten = opened.manifest.rewritten if opened.manifest else frozenset()
    known = {*source.tensors, *rewritten}
    return [
        Problem("unexpected", tensor, "belongs to no layer, and is not in the float model")
        for tensor in opened.checkpoint.tensors
        if tensor not in known
        and module_of(tensor) not in opened.schemes
        and not (opened.kv_cache and tensor.endswith(SCALES))
    ]


def _grown(opened: Folder, source: Checkpoint) -> list[Problem]:
    """A linear in codes is smaller than it was as floats."""
    assert opened.exporter is not None
    if (
        not opened.exporter.format.is_lossless
        or opened.checkpoint.config.get("quantization_config") is None
    ):
        return []  # floats are stored
    stored: dict[str, int] = {}
    for tensor, held in opened.checkpoint.tensors.items():
        name = module_of(tensor)
        stored[name] = stored.get(name, 0) + held.nbytes
    problems = []
    for name in opened.schemes:
        before = source.tensors.get(f"{name}.weight")
        if before is not None and stored[name] > before.nbytes:
            told = f"takes {stored[name]} bytes, more than the {before.nbytes} it took before"
            problems.append(Problem("size", name, told))
    return problems


def float_weight(source: Checkpoint, name: str, shape: Sequence[int]) -> torch.Tensor:
    """The weight ``[out, in]`` of a linear in the float model, float32.

    Raises QplugError if there is none of this ``shape``.
    """
    tensor = f"{name}.weight"
    if tensor not in source.tensors:
        raise QplugError(f"{source.folder}: has no {tensor}; it is not the model this came from")
    weight = source.read(tensor).float()
    if tuple(weight.shape) != tuple(shape):
        raise QplugError(f"{source.folder}: {tensor} has another shape; it is another model")
    return weight


def relative_distance(restored: torch.Tensor, weight: torch.Tensor) -> float:
    """``||W' - W|| / ||W||`` (Frobenius) of float32 matrices."""
    return _norm(restored - weight) / max(_norm(weight), torch.finfo().tiny)


def _norm(matrix: torch.Tensor) -> float:
    """In float64: summed in float32, that of a large matrix is off by half a percent."""
    norm: float = torch.linalg.vector_norm(matrix, dtype=torch.float64).item()
    return norm


def _errors_differ(opened: Folder, errors: Mapping[str, float]) -> list[Problem]:
    """Each layer is as far from the float model as it was when it was written."""
    if opened.manifest is None or opened.exporter is None or not opened.exporter.format.is_lossless:
        return []
    told, rewritten = opened.manifest.errors, opened.manifest.rewritten
    return [
        Problem("error", name, f"is {error:.4g} off the float model, not {told[name]:.4g} as told")
        for name, error in errors.items()
        if f"{name}.weight" not in rewritten
        and name in told
        and not abs(error - told[name]) <= 0.01 * told[name] + 1e-6  # NaN too
    ]
