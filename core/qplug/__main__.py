"""``python -m qplug``, which is how several processes are started (torchrun -m qplug)."""

from __future__ import annotations

from qplug.cli.main import main

main()
