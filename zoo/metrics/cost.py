import gc
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics import Metric

from zoo.metrics.base import Row


def timed(device: torch.device, function, *args, **kwargs):
    """What the function returns, and the seconds until the device has done its work."""
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda device: None
    wait(device)
    start = time.perf_counter()
    result = function(*args, **kwargs)
    wait(device)
    return result, time.perf_counter() - start


def reset_peak(device: torch.device) -> None:
    """Forget the peak of memory so far; on the CPU this is possible on Linux only, and elsewhere nothing happens."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        gc.collect()
        with suppress(OSError):  # not in every container
            Path("/proc/self/clear_refs").write_text("5")


def peak_of_process() -> int:
    """The largest resident size in bytes."""
    if sys.platform == "linux":  # where getrusage begins with that of the process which started this one
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Cost(Metric):
    """Images per second on one device for encode and for decode, and the peak of memory in MiB.

    Memory is what PyTorch allocated at the most on a CUDA device, and elsewhere the largest resident size of the whole
    process, since `reset_peak`; over several ranks it is that of the hungriest.
    """

    full_state_update = False

    def __init__(self):
        super().__init__()
        for name in ("images", "encode", "decode"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), "sum")
        self.add_state("peak", torch.zeros((), dtype=torch.float64), "max")

    @property
    def rows(self) -> tuple[Row, ...]:
        kind = "CUDA" if self.device.type == "cuda" else "process"
        return (
            Row("encode_per_second", "encode, images/s", "higher", ",.1f"),
            Row("decode_per_second", "decode, images/s", "higher", ",.1f"),
            Row(f"peak_{kind.lower()}_memory", f"peak of {kind} memory, MiB", "lower", ",.0f"),
        )

    def update(self, images: int, encode: float, decode: float) -> None:
        """Add a number of images and the seconds they took; decode: 0 where there is nothing to decode."""
        self.images += images
        self.encode += encode
        self.decode += decode
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else peak_of_process()
        self.peak.clamp_(min=peak / 2**20)

    def compute(self) -> dict[str, Tensor]:
        values = {"images": self.images, "encode_per_second": self.images / self.encode}
        if self.decode > 0:
            values["decode_per_second"] = self.images / self.decode
        return values | {self.rows[-1].name: self.peak}
