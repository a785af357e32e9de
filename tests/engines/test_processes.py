"""What a crash, a hang or an error of an engine costs: a load, tried twice, and no other."""

from __future__ import annotations

import sys
from pathlib import Path

from engine_processes import EnginePool, Launch

ENGINE = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {folder!r})
from engine_program import answer_loads

def measure(folder, dtype, prompts, options):
    print("loading", folder, flush=True)
    if folder == "crash":
        print("SomeError: it broke", flush=True)
        os._exit(3)
    if folder == "hang":
        time.sleep(60)
    if folder == "refuse":
        raise ValueError("no such scheme")
    if folder == "flaky" and not Path("tried").exists():
        Path("tried").touch()
        raise OSError("a neighbour was in the way")
    return {{"process": os.getpid(), "prompts": prompts, "options": options}}

answer_loads({{"device": "none"}}, measure)
"""


def started(
    base: Path,
    processes: int = 1,
    seconds: float = 60.0,
    each: float = 30.0,
    source: str = ENGINE,
) -> EnginePool:
    program, job = base / "engine.py", base / "job.json"
    program.write_text(source.format(folder=str(Path(__file__).parent)))
    job.write_text('{"prompts": [[1, 2]], "options": {"a": 1, "b": 1}}')
    environments = [{} for _ in range(processes)]
    return EnginePool(Launch((sys.executable, program, job), environments, each, seconds), base)


def load(folder: str) -> dict[str, object]:
    return {"folder": folder, "dtype": "auto", "options": {"b": 2}}


def test_what_fails_costs_itself_alone(tmp_path: Path) -> None:
    names = ("first", "crash", "second", "refuse", "third", "flaky")
    with started(tmp_path) as running:
        for name in names:
            running.give(name, load(name))
        found = running.answers()
    assert running.told == {"device": "none"}
    assert set(found) == set(names)
    assert found["first"]["prompts"] == [[1, 2]]
    assert found["first"]["options"] == {"a": 1, "b": 2}
    assert "ended with 3: SomeError: it broke" in found["crash"]["error"]
    assert found["refuse"]["error"] == "ValueError: no such scheme"
    assert found["flaky"]["at first"] == "OSError: a neighbour was in the way"
    assert "error" not in found["flaky"]
    # Each failure ended its process, and the next load had a new one.
    processes = {found[name]["process"] for name in ("first", "second", "third", "flaky")}
    assert len(processes) == 4


def test_processes_share_the_loads(tmp_path: Path) -> None:
    with started(tmp_path, processes=2) as running:
        for number in range(8):
            running.give(str(number), load(str(number)))
        found = running.answers()
    assert not [answer for answer in found.values() if "error" in answer]
    assert len(list(tmp_path.glob("answers-*.jsonl"))) == 2


def test_a_hang_ends(tmp_path: Path) -> None:
    with started(tmp_path, each=0.5) as running:
        running.give("hang", load("hang"))
        assert "no answer in time" in running.answers()["hang"]["error"]


def test_no_time_is_left(tmp_path: Path) -> None:
    with started(tmp_path, seconds=0.0) as running:
        running.give("late", load("late"))
        assert running.answers()["late"]["error"] == "there was no time left for it"


def test_an_error_ends_no_process_that_forks(tmp_path: Path) -> None:
    source = ENGINE.replace(
        'answer_loads({{"device": "none"}}, measure)',
        "from forked_loads import in_forks\n"
        'answer_loads({{"device": "none", "forks": True}}, in_forks(measure))',
    )
    names = ("first", "crash", "refuse", "third")
    with started(tmp_path, source=source) as running:
        found = {name: running.answer(name, load(name)) for name in names}
    assert found["crash"] == {"error": "RuntimeError: the load ended with status 3"}
    assert found["refuse"] == {"error": "ValueError: no such scheme"}
    assert found["first"]["process"] != found["third"]["process"]
    assert len(list(tmp_path.glob("answers-*.jsonl"))) == 1
