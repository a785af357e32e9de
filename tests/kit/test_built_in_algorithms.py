"""The algorithms that ship with qplug keep the contract that third parties are held to."""

from __future__ import annotations

from typing import ClassVar

from qplug.registry.registry import Registry
from qplug.testing import AlgorithmContract
from qplug_awq.awq import AWQ
from qplug_gptq.gptq import GPTQ
from qplug_hqq.hqq import HQQ
from qplug_omniquant.omniquant import OmniQuant
from qplug_osplus.osplus import OSPlus
from qplug_quarot.quarot import QuaRot
from qplug_rtn.rtn import RTN
from qplug_signround.signround import SignRound
from qplug_smoothquant.smoothquant import SmoothQuant
from qplug_spinquant.spinquant import SpinQuant


class TestRTN(AlgorithmContract):
    algorithm = RTN


class TestAWQ(AlgorithmContract):
    algorithm = AWQ


class TestGPTQ(AlgorithmContract):
    algorithm = GPTQ


class TestHQQ(AlgorithmContract):
    algorithm = HQQ


class TestSmoothQuant(AlgorithmContract):
    algorithm = SmoothQuant
    schemes = ("W8A8",)
    whole_run = "W8A8"


class TestOSPlus(AlgorithmContract):
    algorithm = OSPlus
    schemes = ("W8A8",)
    whole_run = "W8A8"


class TestQuaRot(AlgorithmContract):
    algorithm = QuaRot


class TestSpinQuant(AlgorithmContract):
    algorithm = SpinQuant
    schemes = ("W8A8",)
    whole_run = "W8A8"
    options: ClassVar = {"steps": 2}


class TestOmniQuant(AlgorithmContract):
    algorithm = OmniQuant
    schemes = ("W3A16",)
    options: ClassVar = {"epochs": 1}


class TestSignRound(AlgorithmContract):
    algorithm = SignRound
    schemes = ("W4A16",)
    options: ClassVar = {"epochs": 1}


def test_every_algorithm_has_one() -> None:
    """Nothing ships that is not held to it."""
    classes = [kind for kind in AlgorithmContract.__subclasses__() if kind.__module__ == __name__]
    held = {kind.algorithm.name for kind in classes}
    assert held >= set(Registry.installed(only_shipped=True).algorithms)
