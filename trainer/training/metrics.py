"""What a step reports: sums gathered over micro-batches, reduced over ranks in one collective, turned into one line.

Values stay on their device until the reduction, so that accumulating never waits for a GPU.
"""

from __future__ import annotations

import dataclasses
import math
import re
import resource
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer.distributed.group import Group

OWN_STATUS = Path("/proc/self/status")


@dataclass
class BatchMetrics:
    """Named sums over the micro-batches of one step, of this rank alone until `reduce`; float64, on their device."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def accumulate(self, **values: float | torch.Tensor) -> None:
        """Add each value (number or scalar tensor) to the sum of its name."""
        for name, value in values.items():
            added = torch.as_tensor(value).detach().double()
            self.sums[name] = self.sums[name] + added if name in self.sums else added

    def reduce(self, group: Group) -> dict[str, float]:
        """Sum over ranks in one collective, reset the sums, return them as numbers. All ranks know the same names."""
        names = sorted(self.sums)
        sums = torch.stack([self.sums[name].to(group.device) for name in names])
        self.sums.clear()
        return dict(zip(names, group.sum_tensor(sums).tolist(), strict=True))


@dataclass(frozen=True)
class BatchCounts:
    """What a global batch holds over all ranks, as far as it is known before the step."""

    num_samples: int
    num_micro_batches: int  # of each rank
    num_operations: float  # floating-point operations of forward and backward, an estimate
    num_loss_tokens: int | None = None
    num_tokens: int | None = None
    packing_efficiency: float | None = None  # share of the token budgets of all ranks that holds tokens


@dataclass(frozen=True)
class StepReport:
    """One line of metrics.jsonl: what one optimizer step did, over all ranks."""

    step: int
    epoch: float
    learning_rate: float
    grad_norm: float
    loss: float  # mean over the loss tokens of the global batch; of a custom data set what the model calls its loss
    num_samples: int
    num_micro_batches: int
    samples_per_second: float
    data_seconds: float  # that the main rank waited for the batch, before the step
    step_seconds: float
    peak_memory_bytes: int  # of the main rank's device, or of its process on the CPU
    num_loss_tokens: int | None = None  # these four: of token data alone
    num_tokens: int | None = None
    packing_efficiency: float | None = None  # share of the token budgets of all ranks that held tokens
    tokens_per_second: float | None = None
    tflops_per_rank: float | None = None  # an estimate, see BatchCounts.num_operations
    mfu: float | None = None  # the same as share of the nominal rate of the GPU, where that is known
    seconds_left: float | None = None  # to the last step, at the pace of this one
    more: dict[str, float] = field(default_factory=dict)  # of what is switched on, such as osft/leak

    is_skipped: bool = False  # its loss or gradient was not finite, so that it was not taken

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, without those that are not known or not finite."""
        values = dataclasses.asdict(self)
        values |= values.pop("more")
        is_skipped = values.pop("is_skipped")
        known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        return known | ({"is_skipped": True} if is_skipped else {})


NOMINAL_TFLOPS = {  # of dense products in 16 bits, by part of the GPU's name; the first that fits counts
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "GH200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}


def nominal_tflops(device: torch.device, compute_dtype: torch.dtype) -> float | None:
    """Return the rate that the GPU's maker names for products in 16 bits; None where it is not known here."""
    if device.type != "cuda" or compute_dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in NOMINAL_TFLOPS.items() if part in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory held so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", OWN_STATUS.read_text()):
            return int(found[1]) * 1024
    # Where there is no /proc. Linux would hand on through exec what the parent had held.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
