"""The shape of a mesh of devices, as a setting: no JAX here, so that reading settings is quick."""

import dataclasses
from typing import Annotated, Literal

from fact_jax.utils.errors import UserError
from fact_jax.utils.ranges import CheckedFields, Count, Range

AXES = ("data", "fsdp", "tensor")
BATCH_AXES, TENSOR_AXIS = ("data", "fsdp"), "tensor"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(CheckedFields):
    """Sizes of the mesh axes; ``data`` -1 takes all devices that are left.

    ``slices`` > 1 is for several TPU slices: the ``data`` axis then runs over them, so that only
    one sum of gradients crosses the slower network between them. ``base`` says whether the frozen
    parameters are whole on every device or split over ``fsdp``.
    """

    data: Annotated[int, Range(-1)] = -1
    fsdp: Count = 1
    tensor: Count = 1
    slices: Count = 1
    base: Literal["replicated", "fsdp"] = "replicated"

    def __post_init__(self) -> None:
        if isinstance(self.data, int) and (self.data == 0 or self.data < -1):
            raise ValueError(
                f"data must be at least 1, or -1 for all devices that are left, not {self.data}"
            )
        super().__post_init__()

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) on this many devices; UserError if they do not come out even."""
        inner = self.fsdp * self.tensor
        data = devices // inner if self.data == -1 else self.data
        shape = f"{self.data}x{self.fsdp}x{self.tensor}"
        if data * inner != devices:
            raise UserError(
                f"mesh {shape} (data x fsdp x tensor) does not divide {devices} devices: the "
                f"product must be {devices}; mesh.data=-1 takes all that are left"
            )
        if data % self.slices:
            raise UserError(
                f"mesh {shape} on {devices} devices: data = {data} does not divide over "
                f"mesh.slices = {self.slices}"
            )
        return data, self.fsdp, self.tensor
