"""The algorithms that ship with qplug keep the contract that third parties are held to."""

from __future__ import annotations

from qplug.testing import AlgorithmContract
from qplug_awq.awq import AWQ
from qplug_gptq.gptq import GPTQ
from qplug_osplus.osplus import OSPlus
from qplug_quarot.quarot import QuaRot
from qplug_rtn.rtn import RTN
from qplug_smoothquant.smoothquant import SmoothQuant


class TestRTN(AlgorithmContract):
    algorithm = RTN


class TestAWQ(AlgorithmContract):
    algorithm = AWQ


class TestGPTQ(AlgorithmContract):
    algorithm = GPTQ


class TestSmoothQuant(AlgorithmContract):
    algorithm = SmoothQuant
    schemes = ("W8A8",)


class TestOSPlus(AlgorithmContract):
    algorithm = OSPlus
    schemes = ("W8A8",)


class TestQuaRot(AlgorithmContract):
    algorithm = QuaRot
