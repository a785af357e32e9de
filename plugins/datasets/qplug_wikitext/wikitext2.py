"""Reads WikiText-2 as GPTQ and later papers do: all rows, even empty, joined by blank lines.

Perplexities can be compared with published ones only if the text is joined in this way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qplug import Dataset
from qplug.text import HubParams, HubText

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qplug import Split

_REPO = "Salesforce/wikitext"
_TEXT: dict[Split, HubText] = {
    "calibration": HubText(_REPO, "wikitext-2-raw-v1/train-00000-of-00001.parquet", "train"),
    "evaluation": HubText(_REPO, "wikitext-2-raw-v1/test-00000-of-00001.parquet", "test"),
}


class WikiText2(Dataset[HubParams]):
    """WikiText-2 (raw): Wikipedia articles, the usual text for perplexity."""

    name = "wikitext2"
    Params = HubParams

    def documents(self, split: Split) -> Iterator[str]:
        return iter(_TEXT[split].rows(self.params.path))
