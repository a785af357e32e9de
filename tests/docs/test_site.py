"""The site builds strictly, without a network, and its pages ask nothing of another host."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest


@pytest.mark.filterwarnings("default")  # mkdocs' own dependencies warn
def test_the_site_is_whole_and_alone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    def no_network(*_: object) -> None:
        raise AssertionError("building the site asks another host")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    build(load_config(str(root / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    pages = [*tmp_path.rglob("*.html")]
    assert len(pages) > 20
    asked = re.compile(r"<(?:script|img|link|iframe|source)[^>]+(?:src|href)=[\"']?(?:https?:)?//")
    for page in pages:
        assert not asked.search(page.read_text(encoding="utf-8")), page
    gptq = (tmp_path / "theory/gptq.html").read_text(encoding="utf-8")
    assert "<math" in gptq
    assert "\\frac" not in gptq
