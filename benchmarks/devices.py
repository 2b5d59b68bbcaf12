"""Datasheet rates of the devices that the cost model knows. Nothing here was measured.

Sources (dense rates, without sparsity; one device):

    h100    NVIDIA H100 Tensor Core GPU datasheet, SXM: 989.4 TFLOP/s bf16, 67 fp32,
            3.35 TB/s, 80 GB, 50 MB L2 cache, 132 multiprocessors
    h200    NVIDIA H200 Tensor Core GPU datasheet, SXM: the same arithmetic, 4.8 TB/s, 141 GB
    a100    NVIDIA A100 datasheet, SXM 80 GB: 312 bf16, 19.5 fp32, 2.039 TB/s
    b200    NVIDIA DGX B200 datasheet, an eighth of it: 2250 bf16, 75 fp32, 8 TB/s, 180 GB
    mi300x  AMD Instinct MI300X datasheet: 1307.4 bf16, 163.4 fp32, 5.3 TB/s, 192 GB

fp32 products are counted at the fp32 rate of the vector units: torch uses no TF32 unless asked.

The sustained figures are ASSUMPTIONS of the model, no datasheet's: clocks fall under load and no
kernel reaches the peak. h100: 720 TFLOP/s and 3.0 TB/s, what the best public kernels report at
these shapes; the others: the same share of their datasheet.
"""

from __future__ import annotations

from dataclasses import dataclass

ASSUMED_FLOPS = 720e12  # bf16 products of an H100; see above
SUSTAINED_PRODUCTS = ASSUMED_FLOPS / 989.4e12  # share of the datasheet's rate
SUSTAINED_BANDWIDTH = 3.0 / 3.35


@dataclass(frozen=True)
class Device:
    """What the model knows of a device.

    Attributes:
        title: name and form.
        half_flops: bf16 products, floating-point operations per second.
        single_flops: fp32 arithmetic, operations per second.
        bandwidth: of device memory, bytes per second.
        memory: bytes.
        target: its row of `crpo_kernels.linear_tiles.TILES`.
        units: multiprocessors (AMD: compute units).
    """

    title: str
    half_flops: float
    single_flops: float
    bandwidth: float
    memory: float
    target: str
    units: int

    def product_flops(self, dtype: str) -> float:
        """The rate of products with operands of ``dtype``."""
        return self.single_flops if dtype == "float32" else self.half_flops


DEVICES = {
    "h100": Device("NVIDIA H100 SXM", 989.4e12, 67e12, 3.35e12, 80e9, "sm_90", 132),
    "h200": Device("NVIDIA H200 SXM", 989.4e12, 67e12, 4.8e12, 141e9, "sm_90", 132),
    "a100": Device("NVIDIA A100 SXM 80 GB", 312e12, 19.5e12, 2.039e12, 80e9, "sm_80", 108),
    "b200": Device("NVIDIA B200", 2250e12, 75e12, 8e12, 180e9, "sm_100", 148),
    "mi300x": Device("AMD Instinct MI300X", 1307.4e12, 163.4e12, 5.3e12, 192e9, "gfx942", 304),
}
