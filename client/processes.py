"""Processor time as the operating system counts it, from /proc."""

import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
# The columns of /proc/stat that are no work: idle, and waiting for a disk (proc(5)).
_IDLE_COLUMNS = (3, 4)
# Guests' time is part of user time already.
_COLUMNS = 8


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used; OSError if it is gone. A step is 10 ms as a rule."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    # The program's name stands in brackets and may hold anything; the fields are counted from behind it.
    fields = stat[stat.rindex(")") + 2 :].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def machine_cpu_seconds() -> float:
    """Return the CPU time that all programs of this machine have used, and what its host took from it (steal)."""
    first = Path("/proc/stat").read_text().partition("\n")[0].split()
    columns = [int(column) for column in first[1 : 1 + _COLUMNS]]
    return sum(ticks for number, ticks in enumerate(columns) if number not in _IDLE_COLUMNS) / _TICKS
