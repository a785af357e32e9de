"""Reads the first shard of each split of C4, as GPTQ's authors do."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from qplug import Dataset
from qplug.text import HubParams, HubText

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from qplug import Split, Tokenizer

_TRAIN = HubText("allenai/c4", "en/c4-train.00000-of-01024.json.gz", "train")
_VALIDATION = HubText("allenai/c4", "en/c4-validation.00000-of-00008.json.gz", "validation")

#: Published perplexities are measured on the first 1100 pages.
_EVALUATION_PAGES = 1100


class C4(Dataset[HubParams]):
    """C4: web pages in English (the first shard: 320 MB to download)."""

    name = "c4"
    Params = HubParams
    separator = " "

    def documents(self, split: Split) -> Iterator[str]:
        if split == "calibration":
            return iter(_TRAIN.rows(self.params.path))
        return islice(_VALIDATION.rows(self.params.path), _EVALUATION_PAGES)

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int
    ) -> Iterator[Tensor]:
        # This imports torch, which listing datasets does not need.
        from qplug.text import document_windows

        pages = _TRAIN.rows(self.params.path)
        return document_windows(pages, tokenizer, length=length, count=count, seed=seed)
