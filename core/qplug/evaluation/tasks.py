"""Runs tasks of lm-eval on a quantized model, and on its float model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qplug.checkpoint.locate import find_model
from qplug.errors import QplugError
from qplug.evaluation.end_tokens import end_tokens
from qplug.evaluation.harness import LoadedTasks, Tasks, TaskScore, require_lm_eval
from qplug.evaluation.recovery import Recovery, recovery
from qplug.machine.memory import naming_memory
from qplug.machine.session import Session
from qplug.model.hollow import load_config
from qplug.model.tokenizer import load_tokenizer
from qplug.reading.engine import free_port, serve
from qplug.reading.folder import open_folder
from qplug.reading.load import load_folder
from qplug.reading.server import find_serving
from qplug.registry.registry import Registry

if TYPE_CHECKING:
    from lm_eval.api.model import LM

#: Called with the model, the requests done, all requests, and their kind.
Watch = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class TaskRow:
    """The scores of a quantized model and of its float model in one task, by one metric.

    ``base`` and ``recovery`` are None if no float model was given; ``recovery`` is None too if the
    float model scores zero.
    """

    quantized: TaskScore
    base: TaskScore | None
    recovery: Recovery | None


@dataclass(frozen=True)
class TaskScores:
    """The scores of ``model``, and of ``base`` if it was given, task by task.

    ``by``: what ran the models: ``reader``, the name of an engine, or a URL.
    """

    model: str
    base: str | None
    by: str
    rows: tuple[TaskRow, ...]


@dataclass(frozen=True)
class Runner:
    """What runs the models: qplug's reader, or an engine.

    ``engine`` names the backend whose engine is started, ``python`` its interpreter. ``url`` is the
    address of a server that runs the quantized model already. At most one of the two is given.
    """

    session: Session
    batch_size: int = 8
    engine: str | None = None
    python: str | None = None
    url: str | None = None

    @contextmanager
    def model(self, model: str, *, chat: bool, watch: Watch) -> Iterator[LM]:
        """A context with ``model`` as lm-eval asks it; at its end an engine is stopped.

        Raises QplugError if the model does not load, or if the engine does not start.
        """
        from qplug.evaluation.reader_model import ReaderModel

        trusted = self.session.trust_remote_code
        tokenizer = load_tokenizer(model, trust_remote_code=trusted)
        if chat and not tokenizer.chat_template:
            raise QplugError(f"{model}: its tokenizer has no chat template; leave --chat out")
        if self.url is not None:
            yield self._served(self.url, model, chat=chat)
        elif self.engine is not None:
            port = free_port()
            serving = find_serving(
                model, self.session, backend=self.engine, python=self.python, port=port
            )
            serving.require_engine()
            with serve(serving) as url:
                yield self._served(url, model, chat=chat)
        else:
            device = self.session.device
            what = f"{model} is held whole on {device}; use a smaller --batch-size, or --device cpu"
            with naming_memory(lambda: what):
                folder = open_folder(model, self.session, or_float=True)
                net: Any = load_folder(folder)
                net.to(device)
                ends = end_tokens(folder.checkpoint.folder, net, tokenizer)
                net.generation_config.eos_token_id = sorted(ends)
                yield ReaderModel(
                    net,
                    tokenizer,
                    batch_size=self.batch_size,
                    watch=lambda done, count, kind: watch(model, done, count, kind),
                )

    def _served(self, url: str, model: str, *, chat: bool) -> LM:
        from lm_eval.models.utils import resolve_max_length

        from qplug.evaluation.engine_model import engine_model

        trusted = self.session.trust_remote_code
        folder = find_model(model)
        config = load_config(folder, trust_remote_code=trusted)
        return engine_model(
            url,
            str(folder),
            load_tokenizer(model, trust_remote_code=trusted),
            max_length=resolve_max_length(config),
            chat=chat,
            trust_remote_code=trusted,
        )


def evaluate_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    base: str | None = None,
    include_path: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    batch_size: int = 8,
    engine: str | None = None,
    python: str | None = None,
    url: str | None = None,
    base_url: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    registry: Registry | None = None,
    watch: Watch = lambda *_: None,
) -> TaskScores:
    """Run ``tasks`` of lm-eval on ``model``, and on the float model ``base`` if it is given.

    ``tasks`` are names of lm-eval's tasks and groups, names of tasks that YAML files in
    ``include_path`` define, or paths of such files. ``limit`` is the most items of each task,
    ``shots`` the number of solved examples before an item. ``chat`` sends prompts through the chat
    template. qplug's reader computes in float32, in batches of ``batch_size`` texts; with
    ``engine`` the engine of that backend is started for each model, with ``url`` (and ``base_url``)
    running servers answer. Raises QplugError for mistakes that the user can mend, before a model is
    loaded where possible.
    """
    require_lm_eval()
    if engine is not None and url is not None:
        raise QplugError("--engine starts a server, and --url names one that runs: give one")
    if base_url is not None and (url is None or base is None):
        raise QplugError("--base-url: is the server of --base, beside the one that --url names")
    if url is not None and base is not None and base_url is None:
        raise QplugError("--url serves one model: give --base-url, where a server runs --base")
    session = Session.alone(device, registry=registry, trust_remote_code=trust_remote_code)
    for folder in (model, base):
        if folder is not None:
            open_folder(folder, session, or_float=True)  # a wrong name is reported at once
    asked = Tasks(tasks, include_path, limit, shots, chat)
    loaded = asked.load()

    def run(
        folder: str, served: str | None, loaded: LoadedTasks
    ) -> dict[tuple[str, str], TaskScore]:
        runner = Runner(session, batch_size, engine, python, served)
        with runner.model(folder, chat=chat, watch=watch) as lm:
            return loaded.run(lm)

    found = run(model, url, loaded)
    floats = run(base, base_url, asked.load()) if base is not None else {}
    rows = []
    for key, score in found.items():
        other = floats.get(key)
        kept = recovery(other.score, score.score) if other else None
        rows.append(TaskRow(score, other, kept))
    return TaskScores(model, base, url or engine or "reader", tuple(rows))
