"""The events that plugins receive when they watch a run: its start, a finished step, its end."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from qplug.api import Block, QuantizedWeight


@dataclass(frozen=True)
class Estimate:
    """What a run would take, by a model of costs: the page docs/scale.md says how good it is.

    ``device`` names the device with whose rates it is computed, ``processes`` is their number.
    ``seconds`` are those of the whole command, of which ``stages`` has the parts. In bytes:
    ``gpu_memory`` on each GPU at most, None for a run on a CPU; ``memory`` of each process on its
    host; ``disk`` for the result.
    """

    device: str
    processes: int
    seconds: float
    stages: Mapping[str, float]
    gpu_memory: int | None
    memory: int
    disk: int


@dataclass(frozen=True)
class RunPlan:
    """What a run does, as it is known before the first step.

    ``architecture`` is the class that config.json names, ``parameters`` the number of weights of
    the source and ``blocks`` the number of its decoder blocks. ``algorithm`` and ``scheme`` are
    names (``awq+gptq``, ``W4A16 and W8A16``), ``backend`` the exporter's. ``serve`` is the
    command that serves a folder of this backend, with ``{}`` for the folder; "" if no engine does.
    ``dataset`` is "" for a run without calibration data; else ``samples`` are its windows and
    ``seq_len`` the tokens of a window. ``device`` is the name of the device in words.
    ``source_bytes`` and ``bytes`` are the sizes of all tensors before and after. ``estimate`` says
    what the run takes, None if the time of an algorithm is not known, and ``block_seconds`` what
    each block takes; empty if not known. With ``--on-stop raise``, ``raises_to`` are the schemes
    that a block gets, in this order, whose output is more than ``stop_at`` from the float model's.
    """

    model: str
    architecture: str
    parameters: int
    blocks: int
    algorithm: str
    scheme: str
    backend: str
    serve: str
    dataset: str
    samples: int
    seq_len: int
    device: str
    source_bytes: int
    bytes: int
    estimate: Estimate | None = None
    block_seconds: tuple[float, ...] = ()
    stop_at: float | None = None
    raises_to: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunStart:
    """A run that is checked and is about to compute its first step.

    ``out`` is the folder that the run writes, ``count`` the number of all steps, and ``done`` the
    number of steps that an earlier run, which was stopped, had finished. A decoder block is one
    step or several: ``block_ends`` has for each block the number of steps after which it is
    complete. ``plan`` says what the run does.
    """

    out: Path
    count: int
    done: int
    block_ends: tuple[int, ...] = field(default=(), compare=False)
    plan: RunPlan | None = field(default=None, compare=False)

    @property
    def blocks(self) -> int:
        """The number of decoder blocks."""
        return len(self.block_ends)

    def blocks_after(self, steps: int) -> int:
        """The number of decoder blocks that are complete after ``steps`` finished steps."""
        return bisect_right(self.block_ends, steps)


@dataclass(frozen=True)
class BlockReport:
    """The result of one step of a run: a decoder block, or one tensor of a data-free run.

    ``number`` counts finished steps from 1, including steps of an earlier run that was stopped;
    ``count`` is the number of all steps. ``errors`` are ``||W' - W|| / ||W||`` by linear, where
    ``W'`` is the dequantized weight. ``losses`` are the relative errors of the linears' outputs on
    calibration data, by linear; empty without data. ``notes`` are messages of algorithms to the
    user. ``seconds`` is the time since the previous step was finished.

    ``block`` is the block after all transforms, with the statistics of its input groups; its
    weights are float32 in a calibrated run. ``codes`` are by linear, as the exporter receives them.
    Both are freed when the hook returns: keep numbers, not tensors, and change nothing. If the step
    only copies tensors, ``block`` is None and ``codes`` are empty. A block that ``--on-stop raise``
    quantizes again comes once for each scheme, with the same ``number``; the last report counts.
    """

    name: str
    number: int
    count: int
    errors: Mapping[str, float] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    block: Block | None = field(default=None, repr=False)
    codes: Mapping[str, QuantizedWeight] = field(default_factory=dict, repr=False)

    @property
    def loss(self) -> float | None:
        """The mean of ``losses``; None if they are empty."""
        return sum(self.losses.values()) / len(self.losses) if self.losses else None


@dataclass(frozen=True)
class StageCost:
    """The time and the peak memory of one stage of a run.

    ``seconds`` excludes nested stages. ``memory`` is the resident memory of the process and
    ``gpu_memory`` the memory that torch allocated on the GPU, in bytes, including nested stages;
    None if it cannot be measured. Both are peaks if no earlier stage had a higher peak; else they
    are the larger amount of the stage's beginning and end.
    """

    name: str
    seconds: float
    memory: int | None
    gpu_memory: int | None


#: How far a quantized model is from its float model, in a word: see docs/how-to/quality.md.
Verdict: TypeAlias = Literal["good", "noticeable", "broken"]


@dataclass(frozen=True)
class Quality:
    """How far a quantized model is from its float model, on text that calibration did not use.

    ``perplexity`` and ``float_perplexity`` are those of the two models. ``kl`` is the mean KL
    divergence of the next-token probabilities from the float model's, in nats per token. Both are
    measured on ``windows`` windows of ``seq_len`` tokens of ``dataset``.
    """

    perplexity: float
    float_perplexity: float
    kl: float
    verdict: Verdict
    windows: int
    seq_len: int
    dataset: str


@dataclass(frozen=True)
class ChosenGroup:
    """The choice for linears that share a scheme: ``name`` stands for all of them.

    ``scheme`` is the name of the scheme with the size of its groups, or ``float``. ``weights`` is
    the number of weights, ``bits`` the mean bits of one, scales included, and ``loss`` the
    estimated divergence that the scheme causes, in nats a token.
    """

    name: str
    scheme: str
    weights: int
    bits: float
    loss: float


@dataclass(frozen=True)
class Choice:
    """What ``--scheme auto`` chose, and for which budget.

    ``limits`` is the budget as text, by option. ``sensitivity`` says how losses were estimated, on
    ``tokens`` tokens. ``loss`` is the sum of the losses of ``groups``, in nats a token; no choice
    within the budget is estimated below ``bound``. For ``--max-kl``, ``bytes`` are minimized, and
    ``bound`` is in bytes. ``bits`` is the mean over all weights of ``groups``, and ``bytes`` is
    what the weights of ``groups`` take.
    """

    limits: Mapping[str, str]
    sensitivity: str
    tokens: int
    groups: tuple[ChosenGroup, ...]
    bits: float
    bytes: int
    loss: float
    bound: float


@dataclass(frozen=True)
class RaisedBlock:
    """A decoder block that ``--on-stop raise`` gave more bits than the recipe does.

    ``schemes`` are the names of the schemes that were tried: first the recipe's, last the one that
    is stored; ``float`` stands for float weights. ``distances`` are how far the hidden states after
    the block were from the float model's under each of them, None where they were not finite, and
    ``limit`` is the ``stop_at`` of the run.
    """

    name: str
    schemes: tuple[str, ...]
    distances: tuple[float | None, ...]
    limit: float

    @property
    def sentence(self) -> str:
        """What was raised and why, in words."""
        away = ["infinitely" if d is None else f"{d:.3f}" for d in self.distances]
        tried = [f"{s} ({d} away)" for s, d in zip(self.schemes, away, strict=True)]
        first, *between, last = tried
        through = f" through {' and '.join(between)}" if between else ""
        return f"{self.name}: raised from {first}{through} to {last}, limit {self.limit:g}"


@dataclass(frozen=True)
class Result:
    """The result of a finished run.

    ``out`` is the folder that the run wrote. ``errors`` are ``||W' - W|| / ||W||`` by quantized
    linear, where ``W'`` is the dequantized weight. ``losses`` are the relative errors of the
    linears' outputs on calibration data, empty without data. ``notes`` are messages of algorithms
    to the user.

    ``source_bytes`` and ``bytes`` are the sizes of all tensors before and after. ``resumed`` is the
    number of steps that an earlier run had finished. ``stages`` are the costs of the stages, in the
    first process if there are several. After a dry run nothing is written, and only sizes and
    shares are known. ``float_share`` is the share of the weights in decoder blocks that stays
    float, 0 to 1; ``floats`` are its parts, by name of the weights with a star for each number.
    ``kept_float`` says of linears that no kernel takes, by name, why they stay float.
    ``source_format`` says in words how the source was quantized; it is empty for a float source.
    ``plan`` says after a dry run what the run would do; None after other runs. ``quality`` is None
    unless somebody measured the result, as the command ``qplug quantize`` does.
    ``choice`` says what ``--scheme auto`` chose; None for other schemes. ``raised`` are the blocks
    that ``--on-stop raise`` gave more bits, in order.
    """

    out: Path
    errors: Mapping[str, float]
    losses: Mapping[str, float]
    notes: tuple[str, ...]
    source_bytes: int
    bytes: int
    seconds: float
    resumed: int
    dry_run: bool = False
    stages: tuple[StageCost, ...] = ()
    float_share: float = 0.0
    floats: Mapping[str, float] = field(default_factory=dict)
    kept_float: Mapping[str, str] = field(default_factory=dict)
    source_format: str = ""
    plan: RunPlan | None = None
    quality: Quality | None = None
    choice: Choice | None = None
    raised: tuple[RaisedBlock, ...] = ()

    @property
    def estimate(self) -> Estimate | None:
        """What the run would take, after a dry run; None if that is not known."""
        return None if self.plan is None else self.plan.estimate
