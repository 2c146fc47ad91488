"""What a chip can do, by its maker's public datasheet: for MFU, and for `fact-train plan`.

Peaks are dense bfloat16 with float32 sums, bandwidths those of the main memory.
"""

import dataclasses
import re

GB, GIB = 1e9, 2**30
TERA = 1e12
_TPU = "https://cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
_ADA = "NVIDIA Ada GPU Architecture whitepaper, appendix A"
_RTX = "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator: FLOP/s, bytes, bytes a second.

    ``kinds`` are beginnings of JAX's ``device_kind``, in whole words; ``devices`` is how many of
    them JAX shows on one chip.
    """

    name: str
    kinds: tuple[str, ...]
    peak: float
    memory: float
    bandwidth: float
    source: str
    devices: int = 1

    @property
    def is_gpu(self) -> bool:
        return self.kinds[0].startswith("NVIDIA")


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", ("TPU v4",), 275 * TERA, 32 * GIB, 1228 * GB, _TPU + "v4"),
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197 * TERA, 16 * GIB, 819 * GB, _TPU + "v5e"),
        Chip("v5p", ("TPU v5p", "TPU v5"), 459 * TERA, 95 * GIB, 2765 * GB, _TPU + "v5p"),
        Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918 * TERA, 32 * GIB, 1638 * GB, _TPU + "v6e"),
        Chip("tpu7x", ("TPU7x", "TPU v7"), 2307 * TERA, 192 * GIB, 7380 * GB, _TPU + "tpu7x", 2),
        Chip("a100", ("NVIDIA A100",), 312 * TERA, 80 * GIB, 2039 * GB, _NVIDIA + "a100/"),
        Chip("h100", ("NVIDIA H100",), 989 * TERA, 80 * GIB, 3350 * GB, _NVIDIA + "h100/"),
        Chip("h200", ("NVIDIA H200",), 989 * TERA, 141 * GB, 4800 * GB, _NVIDIA + "h200/"),
        # Of eight: 36 PFLOP/s with sparsity, 1,440 GB, 64 TB/s.
        Chip("b200", ("NVIDIA B200",), 2250 * TERA, 180 * GB, 8000 * GB, _NVIDIA + "dgx-b200/"),
        Chip("a10", ("NVIDIA A10",), 125 * TERA, 24 * GB, 600 * GB, _NVIDIA + "products/a10-gpu/"),
        Chip("l4", ("NVIDIA L4",), 121 * TERA, 24 * GB, 300 * GB, _NVIDIA + "l4/"),
        Chip("l40s", ("NVIDIA L40S",), 362 * TERA, 48 * GB, 864 * GB, _NVIDIA + "l40s/"),
        # Twice as fast with float16 sums, which training does not use.
        Chip("rtx4090", ("NVIDIA GeForce RTX 4090",), 165.2 * TERA, 24 * GIB, 1008 * GB, _ADA),
        Chip("rtx5090", ("NVIDIA GeForce RTX 5090",), 209.5 * TERA, 32 * GIB, 1792 * GB, _RTX),
    )
}
# Variants that share a chip's name but not its peak.
_SLOWER = re.compile(r"Laptop|[45]090 D\b|H[12]00 (PCIe|NVL)")


def chip_of(device_kind: str) -> Chip | None:
    """The chip behind a JAX device's ``device_kind``, or None for one that is not in the table."""
    fitting = [
        (len(kind), chip)
        for chip in CHIPS.values()
        for kind in chip.kinds
        if re.match(rf"{kind}(?!\w)", device_kind) and not _SLOWER.search(device_kind)
    ]
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None


def per_device(chip: Chip) -> Chip:
    """A JAX device's share of a chip, as if it were one itself."""
    peak, memory, bandwidth = (
        size / chip.devices for size in (chip.peak, chip.memory, chip.bandwidth)
    )
    return dataclasses.replace(chip, peak=peak, memory=memory, bandwidth=bandwidth, devices=1)
