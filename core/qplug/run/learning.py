"""Lets algorithms learn on the whole float model, once, even if the run is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qplug.api import Algorithm, Checkpoint, FloatModel
from qplug.api.scheme import Scheme
from qplug.calibration.samples import Samples
from qplug.calibration.whole_model import InMemoryModel
from qplug.machine.session import Session
from qplug.output.shared_writer import SharedWriter
from qplug.run.stages import Stages

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class LearnOnce:
    """A function that returns the tensors that an algorithm learned on a model, by name.

    The first process learns on ``samples``. The learned tensors are
    stored with the unfinished output, so that a resumed run uses the same numbers.
    """

    stages: Stages
    schemes: Mapping[str, Scheme]
    samples: Samples
    output: SharedWriter
    session: Session

    def __call__(
        self, algorithm: Algorithm[Any], model: FloatModel, source: Checkpoint
    ) -> Mapping[str, Tensor]:
        calibration = self.stages.recipe.calibration

        def learn() -> Mapping[str, Tensor]:
            whole = InMemoryModel(
                source,
                model.view,
                self.schemes,
                self.samples,
                self.session,
                batch_size=calibration.batch_size if calibration else None,
            )
            return self.stages.learn(algorithm, model, whole)

        return self.output.cached(algorithm.name, learn)
