"""``qplug eval --tasks``: tasks in files on the demo model, by the reader and by a server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from local_tasks import serving, write_tasks

import qplug
from qplug.evaluation import harness
from qplug.model.tokenizer import load_tokenizer

Cli = Callable[..., Result]
Values = dict[tuple[str, str], harness.TaskScore]

#: lm-eval comes with the extra "eval", which ``make test-slow`` installs.
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def demo() -> Any:
    return qplug.load("qplug:demo")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("qplug:demo")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "demo-w4"
    qplug.quantize("qplug:demo", str(out), scheme="W4A16", backend="vllm", device="cpu")
    return out


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return


@slow
@pytest.mark.parametrize("long", [False, True], ids=["short", "longer than the window"])
def test_the_reader_scores_as_the_model_class_of_lm_eval(
    demo: Any, tokenizer: Any, tmp_path: Path, long: bool
) -> None:
    from lm_eval.models.huggingface import HFLM

    from qplug.evaluation.reader_model import ReaderModel

    files = write_tasks(tmp_path, long=long)
    tasks = harness.Tasks([str(files[name]) for name in ("local_choice", "local_text")])
    ours = _answers(tasks, ReaderModel(demo, tokenizer, batch_size=3))
    theirs = _answers(tasks, HFLM(pretrained=demo, tokenizer=tokenizer, batch_size=3))
    assert len(ours) == 32
    for own, other in zip(ours, theirs, strict=True):
        assert own == pytest.approx(other, rel=1e-5)
    answers = harness.Tasks([str(files["local_answer"])])
    assert _answers(answers, ReaderModel(demo, tokenizer, batch_size=3)) == _answers(
        answers, HFLM(pretrained=demo, tokenizer=tokenizer, batch_size=3)
    )


def _answers(tasks: harness.Tasks, model: Any) -> list[Any]:
    """What ``model`` says to each request of ``tasks``."""
    from lm_eval.evaluator import evaluate

    loaded = tasks.load()
    for task in loaded.tasks.values():
        task.set_config(key="num_fewshot", value=0)
    with harness.quiet():
        told = evaluate(lm=model, task_dict={"tasks": loaded.tasks, "groups": {}, "group_map": {}})
    return [
        response[0]
        for samples in told["samples"].values()
        for sample in samples
        for response in sample["resps"]
    ]


@slow
def test_a_text_gets_one_bos(demo: Any, tokenizer: Any) -> None:
    from qplug.evaluation.reader_model import ReaderModel

    model = ReaderModel(demo, tokenizer)
    bos = tokenizer.bos_token_id
    tokens = model.tok_encode("import os")
    assert tokens.count(bos) == 1
    assert model.tok_encode(tokenizer.bos_token + "import os") == tokens
    assert bos not in model.tok_encode("import os", add_special_tokens=False)


@slow
def test_the_command_shows_base_and_quantized(cli: Cli, quantized: Path, tmp_path: Path) -> None:
    files = write_tasks(tmp_path)
    words = ("eval", quantized, "--base", "qplug:demo", "--device", "cpu")
    both = f"{files['local_choice']},{files['local_answer']}"
    result = cli(*words, "--tasks", both, "--limit", 6)
    assert result.exit_code == 0, result.output
    head, *rows = [re.split(r"  +", line) for line in result.stdout.splitlines()]
    assert head == ["task", "metric", "items", "base", "quantized", "recovery"]
    assert [row[:3] for row in rows] == [
        ["local_choice", "acc", "6"],
        ["local_choice", "acc_norm", "6"],
        ["local_answer", "exact_match", "6"],
    ]
    assert all(re.fullmatch(r"[\d.]+% ±[\d.]+|-", row[5]) for row in rows)
    # By name, from a folder; a group has the scores of its tasks, and is paired too.
    result = cli(*words, "--tasks", "local_group", "--include-path", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    assert (row["task"], row["metric"], row["items"]) == ("local_group", "acc", 16)


@slow
def test_a_server_scores_as_the_reader(cli: Cli, demo: Any, tokenizer: Any, tmp_path: Path) -> None:
    files = write_tasks(tmp_path)
    names = ",".join(str(files[name]) for name in ("local_choice", "local_text", "local_answer"))
    words = ("eval", "qplug:demo", "--tasks", names, "--device", "cpu", "--json")
    with serving(demo, tokenizer) as url:
        served = cli(*words, "--url", url, "--base", "qplug:demo", "--base-url", url)
    assert served.exit_code == 0, served.output
    read = {row["metric"]: row for row in json.loads(cli(*words).stdout)["rows"]}
    for row in json.loads(served.stdout)["rows"]:
        value = read[row["metric"]]["quantized"]["value"]
        assert row["quantized"]["value"] == pytest.approx(value, rel=1e-4)
        assert row["recovery"]["value"] == 1


@slow
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--tasks", "local_chioce", "--include-path", "."), "no task is called 'local_chioce'"),
        (("--tasks", "absent.yaml"), "absent.yaml: no such file"),
        (("--tasks", "x.yaml", "--include-path", "no"), "x.yaml: no such file"),
        (("--tasks", "broken.yaml"), "broken.yaml: "),
        (("--tasks", "local_choice.yaml", "--chat"), "no chat template; leave --chat out"),
        (("--tasks", "local_choice.yaml", "--url", "here"), "'here': give the address"),
        (("--tasks", "local_choice.yaml", "--url", "http://127.0.0.1:9"), "no server answers"),
        (("--tasks", "x", "--engine", "vllm", "--url", "http://x"), "give one"),
        (("--tasks", "x", "--url", "http://x", "--base", "qplug:demo"), "give --base-url"),
        (("--tasks", "x", "--base-url", "http://x"), "--base-url: is the server of --base"),
    ],
)
def test_mistakes_are_one_line(
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tasks(tmp_path)
    Path("broken.yaml").write_text("task: broken\ndataset_path: json\n")
    result = cli("eval", "qplug:demo", "--device", "cpu", *words)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert sentence in line


def test_without_lm_eval_one_line_says_what_to_install(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    result = cli("eval", "qplug:demo", "--tasks", "gsm8k")
    assert result.exit_code == 1
    assert result.stderr == "Error: tasks need lm-eval: pip install 'qplug[eval]'\n"


def test_options_of_another_measure_are_refused(cli: Cli) -> None:
    told = cli("eval", "qplug:demo", "--limit", 3)
    assert told.stderr == "Error: --limit: is for --tasks\n"
    told = cli("eval", "qplug:demo", "--tasks", "gsm8k", "--windows", 3)
    assert told.stderr == "Error: --windows: is for another measure than --tasks\n"
