"""Reads the validation split of The Pile, as the authors of AWQ and SmoothQuant do."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from qplug import Dataset
from qplug.text import HubParams, HubText

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from qplug import Split, Tokenizer

_VALIDATION = HubText("mit-han-lab/pile-val-backup", "val.jsonl.zst", "validation")

#: As many documents as for C4; all 214,670 would take hours.
_EVALUATION_DOCUMENTS = 1100


class PileVal(Dataset[HubParams]):
    """The Pile, validation split: prose, code, papers and mail (470 MB to download).

    There is no other split: calibration draws from all documents, evaluation reads the first 1100
    of them. In the whole split that is one document in two hundred; in a small copy it is more.
    """

    name = "pileval"
    Params = HubParams

    def documents(self, split: Split) -> Iterator[str]:
        rows = _VALIDATION.rows(self.params.path)
        return iter(rows) if split == "calibration" else islice(rows, _EVALUATION_DOCUMENTS)

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int
    ) -> Iterator[Tensor]:
        # This imports torch, which listing datasets does not need.
        from qplug.text import document_windows

        rows = _VALIDATION.rows(self.params.path)
        return document_windows(
            rows, tokenizer, length=length, count=count, seed=seed, start="leading"
        )
