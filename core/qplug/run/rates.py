"""What devices and disks do in a second, for the model of costs.

Each number is fitted to measured runs, which docs/scale.json lists; docs/scale.md compares these
with the estimates. Nothing here is a limit of the hardware.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rates:
    """The rates of one device and its host.

    Once: ``start`` seconds for imports and the device, ``bare`` of a run without data, ``data``
    seconds for the calibration text, ``kernels`` and ``expert_kernels`` seconds for the first use
    of kernels of a calibrated run, and of experts.

    FLOP/s: ``forward`` of dense products, ``gram`` of dense Gram matrices (``2 n in²`` for ``n``
    tokens), ``experts`` of both in experts, ``factoring`` of factorisations in float32 and of the
    updates by their factors, ``search`` of the products in a search for scales.

    Seconds for each weight: ``column`` to round column by column, ``nearest`` to round to nearest,
    ``trial`` to round in one step of a search, ``packing`` to measure errors and to pack.

    Seconds for each linear: ``linear``, for small kernels, Python, and files. Seconds for each set
    of linears that read the same: ``exchanged``, for what processes tell each other of it.

    Bytes/s: ``read`` and ``write`` of the disk with checksums, ``exchange`` of sums of processes.
    Bytes: ``base`` of a process without any tensor, ``streamed`` on the device for each weight of
    the largest step of a run without data.
    """

    name: str
    start: float
    bare: float
    data: float
    kernels: float
    expert_kernels: float
    forward: float
    gram: float
    experts: float
    factoring: float
    search: float
    column: float
    nearest: float
    trial: float
    packing: float
    linear: float
    read: float
    write: float
    exchange: float
    exchanged: float
    base: float
    streamed: float

    def of_cores(self, count: int) -> Rates:
        """The rates of ``count`` cores, which share products and searches of one process."""
        return replace(
            self,
            name=f"{count} {self.name}{'s' if count > 1 else ''}",
            forward=self.forward * count,
            gram=self.gram * count,
            experts=self.experts * count,
            factoring=self.factoring * count,
            search=self.search * count,
            trial=self.trial / count,
        )


#: One GPU and its host, fitted by hand to runs on H200s of 2026-11, with files in memory: ``start``
#: and the kernels to first and second runs of a process; ``experts``, ``packing`` and ``linear`` to
#: six layers of Qwen3-30B-A3B's shape; ``trial`` and ``column`` to these and to Llama-3-8B's;
#: ``factoring``, ``forward``, ``gram`` and ``search`` to rates that dense products were seen to
#: have on their own; ``bare``, ``nearest``, ``read`` and ``write`` to Llama-3-8B by ``rtn``, a run
#: that waits for reading alone; ``base`` is a guess, ``exchange`` is not measured, and
#: ``exchanged`` is of four GPUs and an earlier version. ``streamed`` is of one run.
H100 = Rates(
    name="H100",
    start=9.0,
    bare=1.0,
    data=1.0,
    kernels=1.5,
    expert_kernels=4.0,
    forward=6.4e14,
    gram=6.4e14,
    experts=1e14,
    factoring=2.6e13,
    search=1.1e15,
    column=0.28e-9,
    nearest=0.115e-9,
    trial=3.6e-12,
    packing=0.15e-9,
    linear=1e-3,
    read=2.3e9,
    write=0.9e9,
    exchange=1e11,
    exchanged=2.5e-3,
    base=2.0 * 2**30,
    streamed=23,
)

#: One core of a server CPU with AMX (bfloat16): CPU seconds of one thread on a shared machine,
#: 2026-11-27, models of 19 and 27 million weights; larger matrices may run at other rates. Neither
#: the disk nor ``exchange`` is measured.
CPU_CORE = Rates(
    name="CPU core",
    start=4.5,
    bare=4.5,
    data=0.3,
    kernels=0.0,
    expert_kernels=0.0,
    forward=2.4e11,
    gram=1.5e11,
    experts=7.5e10,
    factoring=5e10,
    search=1.5e11,
    column=1.3e-7,
    nearest=1e-8,
    trial=7.5e-9,
    packing=3e-8,
    linear=2e-4,
    read=1.33e9,
    write=0.36e9,
    exchange=1e9,
    exchanged=0.0,
    base=0.5 * 2**30,
    streamed=23,
)
