"""What a chip can do, by its maker's public datasheet: for MFU, and for `fact-train plan`.

Peaks are dense bfloat16 with float32 sums. Bandwidths are bytes a second; ``link`` and ``network``
count one direction (datasheets often give both directions together), all links of a chip at once.
"""

import dataclasses
import re

GB, GIB = 1e9, 2**30
TERA = 1e12
_TPU = "https://cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator.

    ``link`` joins the ``domain`` chips of a full slice or node, ``network`` joins those (None where
    none is published). ``kinds`` are beginnings of JAX's ``device_kind``, in whole words;
    ``devices`` is how many of them JAX shows on one chip.
    """

    name: str
    kinds: tuple[str, ...]
    peak: float
    memory: float
    bandwidth: float
    link: float
    domain: int
    network: float | None
    devices: int = 1
    source: str


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            kinds=("TPU v4",),
            peak=275 * TERA,
            memory=32 * GIB,
            bandwidth=1228 * GB,
            link=300 * GB,
            domain=4096,
            network=None,
            source=_TPU + "v4",
        ),
        Chip(
            name="v5e",
            kinds=("TPU v5 lite", "TPU v5e"),
            peak=197 * TERA,
            memory=16 * GIB,
            bandwidth=819 * GB,
            link=200 * GB,
            domain=256,
            network=3.125 * GB,  # 6.4 Tbit/s a pod
            source=_TPU + "v5e",
        ),
        Chip(
            name="v5p",
            kinds=("TPU v5p", "TPU v5"),
            peak=459 * TERA,
            memory=95 * GIB,
            bandwidth=2765 * GB,
            link=600 * GB,
            domain=8960,
            network=6.25 * GB,
            source=_TPU + "v5p",
        ),
        Chip(
            name="v6e",
            kinds=("TPU v6 lite", "TPU v6e"),
            peak=918 * TERA,
            memory=32 * GIB,
            bandwidth=1638 * GB,
            link=400 * GB,
            domain=256,
            network=12.5 * GB,
            source=_TPU + "v6e",
        ),
        Chip(
            name="tpu7x",
            kinds=("TPU7x", "TPU v7"),
            peak=2307 * TERA,
            memory=192 * GIB,
            bandwidth=7380 * GB,
            link=600 * GB,
            domain=9216,
            network=12.5 * GB,
            devices=2,
            source=_TPU + "tpu7x",
        ),
        # Eight GPUs a node behind NVLink switches, one network card each (DGX).
        Chip(
            name="a100",
            kinds=("NVIDIA A100",),
            peak=312 * TERA,
            memory=80 * GIB,
            bandwidth=2039 * GB,
            link=300 * GB,
            domain=8,
            network=25 * GB,
            source=_NVIDIA + "a100/",
        ),
        Chip(
            name="h100",
            kinds=("NVIDIA H100",),
            peak=989 * TERA,
            memory=80 * GIB,
            bandwidth=3350 * GB,
            link=450 * GB,
            domain=8,
            network=50 * GB,
            source=_NVIDIA + "h100/",
        ),
        Chip(
            name="h200",
            kinds=("NVIDIA H200",),
            peak=989 * TERA,
            memory=141 * GB,
            bandwidth=4800 * GB,
            link=450 * GB,
            domain=8,
            network=50 * GB,
            source=_NVIDIA + "h200/",
        ),
        Chip(
            name="b200",
            kinds=("NVIDIA B200",),
            peak=2250 * TERA,
            memory=180 * GB,
            bandwidth=8000 * GB,
            link=900 * GB,
            domain=8,
            network=50 * GB,
            source=_NVIDIA + "dgx-b200/",  # of eight: 36 PFLOP/s with sparsity, 1,440 GB, 64 TB/s
        ),
        # Cards that talk over PCIe alone: 16 lanes of generation 4 (of 5: RTX 5090).
        Chip(
            name="a10",
            kinds=("NVIDIA A10",),
            peak=125 * TERA,
            memory=24 * GB,
            bandwidth=600 * GB,
            link=32 * GB,
            domain=8,
            network=None,
            source=_NVIDIA + "products/a10-gpu/",
        ),
        Chip(
            name="l4",
            kinds=("NVIDIA L4",),
            peak=121 * TERA,
            memory=24 * GB,
            bandwidth=300 * GB,
            link=32 * GB,
            domain=8,
            network=None,
            source=_NVIDIA + "l4/",
        ),
        Chip(
            name="l40s",
            kinds=("NVIDIA L40S",),
            peak=362 * TERA,
            memory=48 * GB,
            bandwidth=864 * GB,
            link=32 * GB,
            domain=8,
            network=None,
            source=_NVIDIA + "l40s/",
        ),
        # Twice as fast with float16 sums, which training does not use.
        Chip(
            name="rtx4090",
            kinds=("NVIDIA GeForce RTX 4090",),
            peak=165.2 * TERA,
            memory=24 * GIB,
            bandwidth=1008 * GB,
            link=32 * GB,
            domain=8,
            network=None,
            source="NVIDIA Ada GPU Architecture whitepaper, appendix A",
        ),
        Chip(
            name="rtx5090",
            kinds=("NVIDIA GeForce RTX 5090",),
            peak=209.5 * TERA,
            memory=32 * GIB,
            bandwidth=1792 * GB,
            link=64 * GB,
            domain=8,
            network=None,
            source="NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A",
        ),
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
    n = chip.devices
    return dataclasses.replace(
        chip,
        peak=chip.peak / n,
        memory=chip.memory / n,
        bandwidth=chip.bandwidth / n,
        link=chip.link / n,
        domain=chip.domain * n,
        network=chip.network and chip.network / n,
        devices=1,
    )
