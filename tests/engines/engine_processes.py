"""Processes of an engine that share folders to load: what crashes or hangs costs one load.

Each process loads one folder after another, since starting one takes most of a minute. After a
load that failed it is ended, and the next load is of a new one: an engine that has failed is not
to be asked again. Not so where the process says that it ``forks``, for each load. What failed is
tried once more when all else is done.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


class Failed(Exception):
    """An engine's process ended, or did not answer in time."""


@dataclass(frozen=True)
class Launch:
    """How a process of an engine is started, and how long it may take."""

    command: Sequence[str | Path]
    environments: Sequence[Mapping[str, str]]  # one for each process
    seconds_each: float  # for a load, and for the start before it
    seconds: float  # for all of them


class EngineProcess:
    """One process; its answers and its log are files in ``base`` that stay."""

    def __init__(self, launch: Launch, environment: Mapping[str, str], base: Path, name: str):
        self.log = base / f"log-{name}.txt"
        answers = base / f"answers-{name}.jsonl"
        answers.touch()
        self._answers = answers.open(encoding="utf-8")
        with self.log.open("wb") as stream:
            self._process = subprocess.Popen(
                [*launch.command, answers],
                cwd=base,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                text=True,
            )
        self.told: Answer | None = None

    def ask(self, load: Mapping[str, Any], until: float) -> Answer:
        """What it finds of ``load``; Failed if it ends, or it is ``until`` before it answers."""
        if self.told is None:
            self.told = self._next_line(until)
        assert self._process.stdin is not None
        try:
            print(json.dumps(load), file=self._process.stdin, flush=True)
        except OSError as error:
            raise Failed(f"ended: {self._last_words()}") from error
        return self._next_line(until)

    def _next_line(self, until: float) -> Answer:
        line = ""
        while not line.endswith("\n"):
            read = self._answers.readline()
            line += read
            if read:
                continue
            if self._process.poll() is not None:
                raise Failed(f"ended with {self._process.returncode}: {self._last_words()}")
            if time.monotonic() > until:
                raise Failed(f"no answer in time: {self._last_words()}")
            time.sleep(0.1)
        found: Answer = json.loads(line)
        return found

    def _last_words(self) -> str:
        lines = self.log.read_text("utf-8", errors="replace").splitlines()
        errors = [line.strip() for line in lines if "Error" in line]
        return " | ".join([*errors[-2:], *(line.strip() for line in lines[-1:])])[-1000:]

    def stop(self) -> None:
        """End it and what it started: they are in a session of their own."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._answers.close()


@dataclass
class EnginePool:
    """Loads by name, shared among processes as these become free. Use it with ``with``."""

    launch: Launch
    base: Path
    told: Answer = field(default_factory=dict)
    _loads: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    _found: dict[str, Answer] = field(default_factory=dict)

    def __enter__(self) -> EnginePool:
        self._until = time.monotonic() + self.launch.seconds
        self._waiting: queue.Queue[str | None] = queue.Queue()
        self._numbers = itertools.count(1)
        self._threads = [
            threading.Thread(target=self._work, args=(environment,), daemon=True)
            for environment in self.launch.environments
        ]
        for thread in self._threads:
            thread.start()
        return self

    def give(self, name: str, load: Mapping[str, Any]) -> None:
        self._loads[name] = load
        self._waiting.put(name)

    def answer(self, name: str, load: Mapping[str, Any]) -> Answer:
        """What is found of ``load``, now, and with no second try."""
        self.give(name, load)
        self._waiting.join()
        return self._found[name]

    def answers(self) -> dict[str, Answer]:
        """What was found of each load that was given, when all are done."""
        self._waiting.join()
        for name, found in list(self._found.items()):
            if "error" in found:
                self._waiting.put(name)
        self._waiting.join()
        return self._found

    def __exit__(self, *_: object) -> None:
        self._until = 0.0
        for _thread in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self, environment: Mapping[str, str]) -> None:
        process = None
        while (name := self._waiting.get()) is not None:
            now = time.monotonic()
            if now > self._until:
                self._found.setdefault(name, {"error": "there was no time left for it"})
                self._waiting.task_done()
                continue
            try:
                if process is None:
                    number = str(next(self._numbers))
                    process = EngineProcess(self.launch, environment, self.base, number)
                until = min(now + self.launch.seconds_each, self._until)
                found = process.ask(self._loads[name], until)
                self.told = process.told or self.told
                spoilt = "error" in found and not self.told.get("forks")
            except (Failed, OSError, ValueError) as error:
                found, spoilt = {"error": str(error)}, True
            if name in self._found:
                found.setdefault("at first", self._found[name]["error"])
            self._found[name] = found
            if spoilt and process is not None:
                process.stop()
                process = None
            self._waiting.task_done()
        if process is not None:
            process.stop()
