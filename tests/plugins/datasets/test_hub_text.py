"""The three datasets of the Hub, read from local copies and from a Hub that this file plays."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING, Any

import datasets
import pytest

from qplug import Dataset, QplugError
from qplug.text import HubParams, random_windows
from qplug_c4.crawl import C4
from qplug_pileval.pile import PileVal
from qplug_wikitext.wikitext2 import WikiText2

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from qplug import Split, Tokenizer

pytestmark = pytest.mark.usefixtures("no_hub")

HUB_DATASETS: list[type[Dataset[HubParams]]] = [WikiText2, C4, PileVal]
SPLITS: list[Split] = ["calibration", "evaluation"]


def text_of(window: Tensor) -> str:
    return "".join(map(chr, window.tolist()))


def saved(folder: Path, **splits: list[str]) -> Path:
    """A folder as ``DatasetDict.save_to_disk`` writes it."""
    tables = {split: datasets.Dataset.from_dict({"text": rows}) for split, rows in splits.items()}
    datasets.DatasetDict(tables).save_to_disk(str(folder))
    return folder


def repository(folder: Path) -> Path:
    """The files of wikitext and c4, as they lie in their repositories."""
    for split, rows in {"train": ["a train row", ""], "test": ["a test row", ""]}.items():
        path = folder / f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict({"text": rows}).to_parquet(str(path))
    for name in ("c4-train.00000-of-01024", "c4-validation.00000-of-00008"):
        path = folder / f"en/{name}.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"text": f"{name} {i}", "url": "x"}) for i in range(3)]
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder


def read(dataset: type[Dataset[HubParams]], path: Path, split: Split) -> list[str]:
    return list(dataset(HubParams(path)).documents(split))


# --- local copies --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "names"),
    [
        (WikiText2, ("train", "test")),
        (C4, ("train", "validation")),
        (PileVal, ("validation", "validation")),
    ],
)
def test_a_saved_dataset_dict_is_read_by_split(
    tmp_path: Path, dataset: type[Dataset[HubParams]], names: tuple[str, str]
) -> None:
    every = {split: [f"{split} row", ""] for split in ("train", "test", "validation")}
    folder = saved(tmp_path / "copy", **every)
    for split, name in zip(SPLITS, names, strict=True):
        assert read(dataset, folder, split) == [f"{name} row", ""]


@pytest.mark.parametrize("dataset", HUB_DATASETS)
@pytest.mark.parametrize("split", SPLITS)
def test_a_saved_table_serves_both_splits(
    tmp_path: Path, dataset: type[Dataset[HubParams]], split: Split
) -> None:
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(str(tmp_path / "copy"))
    assert read(dataset, tmp_path / "copy", split) == ["one", "two"]
    assert read(dataset, saved(tmp_path / "dict", only=["one"]), split) == ["one"]


def test_a_downloaded_repository_is_read(tmp_path: Path) -> None:
    folder = repository(tmp_path / "repository")
    assert read(WikiText2, folder, "calibration") == ["a train row", ""]
    assert read(WikiText2, folder, "evaluation") == ["a test row", ""]
    assert read(C4, folder, "calibration")[2] == "c4-train.00000-of-01024 2"
    assert read(C4, folder, "evaluation")[2] == "c4-validation.00000-of-00008 2"


def test_pileval_is_read_from_zstandard(tmp_path: Path) -> None:
    pytest.importorskip("zstandard", reason="part of the extra 'datasets'")
    assert read(PileVal, pile(tmp_path), "calibration") == ["a document"] * 3


def test_pileval_without_zstandard_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(path: str) -> None:
        raise ValueError("Compression type zstd not supported")

    monkeypatch.setattr(datasets.Dataset, "from_json", unsupported)
    monkeypatch.setattr("qplug.text.hub.find_spec", lambda name: None)
    with pytest.raises(QplugError, match=r"zstandard is needed: pip install 'qplug\[datasets\]'"):
        read(PileVal, pile(tmp_path), "calibration")


def pile(folder: Path) -> Path:
    import pyarrow

    with pyarrow.CompressedOutputStream(str(folder / "val.jsonl.zst"), "zstd") as stream:
        stream.write(b'{"text": "a document", "meta": {"pile_set_name": "x"}}\n' * 3)
    return folder


@pytest.mark.parametrize("dataset", [C4, PileVal])
def test_evaluation_reads_the_first_1100_documents(
    tmp_path: Path, dataset: type[Dataset[HubParams]]
) -> None:
    rows = [str(i) for i in range(1200)]
    folder = saved(tmp_path / "copy", train=rows, validation=rows)
    assert read(dataset, folder, "evaluation") == rows[:1100]
    assert read(dataset, folder, "calibration") == rows


# --- how the text is put together ----------------------------------------------------------------


def test_wikitext2_rows_are_joined_by_a_blank_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = saved(tmp_path / "copy", train=["ab", "", "cd"])
    samples = random_windows(WikiText2(HubParams(folder)), tokenizer, length=8, count=2, seed=0)
    assert [text_of(sample) for sample in samples] == ["ab\n\n\n\ncd"] * 2


def test_c4_samples_are_from_anywhere_in_one_page(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pages = [f"{chr(65 + i) * 40}" for i in range(20)]
    dataset = C4(HubParams(saved(tmp_path / "copy", train=["too short", *pages])))
    samples = [text_of(s) for s in dataset.samples(tokenizer, length=10, count=20, seed=0)]
    assert sorted(samples) == [page[:10] for page in pages]
    with pytest.raises(QplugError, match="20 of 21 documents have 10 tokens or more, 21"):
        dataset.samples(tokenizer, length=10, count=21, seed=0)
    assert dataset.separator == " "


def test_pileval_samples_begin_where_a_document_does(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = [f"{i:02} begins here and goes on" for i in range(20)]
    dataset = PileVal(HubParams(saved(tmp_path / "copy", validation=documents)))
    samples = [text_of(s) for s in dataset.samples(tokenizer, length=9, count=5, seed=0)]
    assert all(sample.endswith(" begins") for sample in samples)
    assert len(set(samples)) == 5


# --- what the user is told -----------------------------------------------------------------------


@pytest.mark.parametrize("dataset", HUB_DATASETS)
@pytest.mark.parametrize("split", SPLITS)
def test_without_the_hub_the_way_out_is_named_at_once(
    dataset: type[Dataset[HubParams]], split: Split
) -> None:
    start = time.monotonic()
    with pytest.raises(QplugError, match="--dataset-opt path=FOLDER") as caught:
        list(dataset(HubParams()).documents(split))
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value)


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for params in (HubParams(), HubParams(tmp_path)):
        with pytest.raises(QplugError, match=r"pip install 'qplug\[datasets\]'"):
            list(C4(params).documents("calibration"))


def test_a_wrong_path_says_what_is_wrong(tmp_path: Path) -> None:
    def complaint(folder: Path) -> str:
        with pytest.raises(QplugError) as caught:
            read(WikiText2, folder, "evaluation")
        assert "\n" not in str(caught.value)
        return str(caught.value).removeprefix(f"{folder}: ")

    assert complaint(tmp_path / "nowhere") == "no such folder"
    assert complaint(tmp_path).startswith("neither a copy of Salesforce/wikitext (it has no wiki")
    both = saved(tmp_path / "both", train=["x"], validation=["x"])
    assert complaint(both) == "no split 'test'; its splits: train, validation"
    datasets.Dataset.from_dict({"body": ["x"]}).save_to_disk(str(tmp_path / "column"))
    assert complaint(tmp_path / "column") == "no column 'text'; its columns: body"


@pytest.mark.parametrize(
    "content",
    [b"junk", b"", gzip.compress(b"{nonsense"), gzip.compress(b"")],
    ids=["junk", "empty", "no JSON", "nothing compressed"],  # gzip writes the time
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "en/c4-train.00000-of-01024.json.gz"
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(QplugError, match="cannot be read") as caught:
        read(C4, tmp_path, "calibration")
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


# --- the Hub itself ------------------------------------------------------------------------------


class Hub(SimpleHTTPRequestHandler):
    """``/datasets/OWNER/NAME/resolve/main/FILE`` of the Hub, out of one folder."""

    protocol_version = "HTTP/1.1"

    def translate_path(self, path: str) -> str:
        return super().translate_path(path.partition("/resolve/main/")[2])

    def end_headers(self) -> None:
        self.send_header("ETag", f'"{abs(hash(self.path)):040x}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: what is asked for is no one's business."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    handler = partial(Hub, directory=str(repository(tmp_path / "repository")))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


DOWNLOAD = """
from qplug.text import HubParams, random_windows
from qplug_c4.crawl import C4
from qplug_wikitext.wikitext2 import WikiText2

for dataset in (WikiText2, C4):
    for split in ("calibration", "evaluation"):
        print(list(dataset(HubParams()).documents(split)))
"""

FAIL = """
import time
from qplug import QplugError
from qplug.text.hub import HubText

start = time.monotonic()
try:
    HubText("someone/something", "a.jsonl", "train").rows()
except QplugError as error:
    print(error, time.monotonic() - start < 15)
"""


def run(script: str, home: Path, **variables: str) -> str:
    """What ``script`` prints. A process of its own, for the Hub's settings are read at import."""
    environment = {**os.environ, "HF_HOME": str(home), "NO_PROXY": "*", "HF_HUB_OFFLINE": "0"}
    environment |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **variables}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_downloaded_once_is_there_without_a_network(hub: str, tmp_path: Path) -> None:
    first = run(DOWNLOAD, tmp_path / "home", HF_ENDPOINT=hub)
    assert "a test row" in first
    assert "c4-validation.00000-of-00008 2" in first
    assert run(DOWNLOAD, tmp_path / "home", HF_HUB_OFFLINE="1") == first


def test_a_file_the_hub_does_not_have(hub: str, tmp_path: Path) -> None:
    told = run(FAIL, tmp_path / "home", HF_ENDPOINT=hub)
    assert told.startswith("someone/something: cannot be downloaded from the Hub (")
    assert told.endswith(" True\n")


def test_an_unreachable_hub_is_not_tried_again_and_again(tmp_path: Path) -> None:
    told = run(FAIL, tmp_path / "home", HF_ENDPOINT="http://127.0.0.1:9")
    assert "path=FOLDER" in told
    assert told.count("\n") == 1
    assert told.endswith(" True\n")
