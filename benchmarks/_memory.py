"""How benchmarks measure memory (Linux)."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def extra_memory(call: Callable) -> float:
    """MiB that one call holds at its peak (VmHWM) beyond what was there before; the libraries should be warm."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = peak()
    call()
    return peak() - before


def peak() -> float:
    """MiB; not ru_maxrss, which a process takes over from the one that starts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def in_a_process_of_its_own(script: str, *arguments) -> float:
    """The number that `python script arguments` prints."""
    command = [sys.executable, script, *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
