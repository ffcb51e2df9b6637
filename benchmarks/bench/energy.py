"""Joules that the processor's packages have used, where the system says so.

Linux shows the counters of Intel's and AMD's processors as files (Documentation/power/powercap in
the kernel's sources): ``energy_uj`` counts microjoules and starts again at ``max_energy_range_uj``.
Many systems let only the administrator read them, and virtual machines have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Reading:
    """Microjoules by counter, and where each starts again."""

    counters: dict[str, tuple[int, int]]

    def joules_since(self, earlier: Reading) -> float | None:
        """Return the joules of all packages between two readings; None without counters."""
        if not self.counters or self.counters.keys() != earlier.counters.keys():
            return None
        total = 0
        for name, (value, wrap) in self.counters.items():
            before = earlier.counters[name][0]
            total += value - before if value >= before else value + wrap - before
        return total / 1e6


def read(root: Path = ROOT) -> Reading:
    """Return the counters of whole packages, ``intel-rapl:0``, and not of parts,
    ``intel-rapl:0:0``.
    """
    counters = {}
    for zone in sorted(root.glob("*rapl*:[0-9]*")):
        if zone.name.count(":") != 1:
            continue
        try:
            value = int((zone / "energy_uj").read_text())
            counters[zone.name] = value, int((zone / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            continue
    return Reading(counters)
