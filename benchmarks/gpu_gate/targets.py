"""What a GPU run must show: milliseconds on an H100, on other cards ratios to the same products.

The milliseconds assume products at 720 TFLOP/s, the best sustained rate that public kernels report
at these shapes on an H100; a limit divided by the products at that rate is the ratio that holds on
every card, against the products measured in the same run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.devices import ASSUMED_FLOPS

GIB = 2**30


@dataclass(frozen=True)
class Target:
    """The limits of one candidate at one shape.

    Attributes:
        key: of the candidate.
        num_products: its floor.
        milliseconds: on an H100.
        ratio: to the bare products, where one is demanded beside the milliseconds.
        gib: workspace beyond inputs and gradients.
    """

    key: str
    num_products: int
    milliseconds: float
    ratio: float | None = None
    gib: float | None = None


TARGETS: dict[tuple[int, int, int], tuple[Target, ...]] = {
    (8192, 131072, 4096): (
        Target("one_pass", 3, 41.0, 1.12, 2.6),
        Target("two_pass", 3, 42.0),
        Target("recompute", 3, 53.0),
        Target("frozen", 2, 28.5, gib=1.1),
        Target("scored", 1, 14.0),
    ),
    (8192, 151936, 4096): (
        Target("one_pass", 3, 47.0, 1.12, 3.0),
        Target("two_pass", 3, 49.0),
        Target("recompute", 3, 61.0),
    ),
    (4096, 131072, 1024): (
        Target("one_pass", 3, 7.0, 1.40, 1.6),
        Target("two_pass", 3, 7.5),
    ),
}


def gpu_targets(
    shape: tuple[int, int, int], rows: dict[str, dict], device_name: str = ""
) -> list[dict]:
    """The targets of a shape with what was measured; a candidate that did not run has none.

    Args:
        shape: T, V, D; one without targets has no rows.
        rows: by key, as in a report.
        device_name: milliseconds are demanded of an H100 alone.
    """
    checks = []

    def check(text: str, limit: float, value: float) -> None:
        found = {"text": text, "limit": limit, "value": value, "met": value <= limit}
        checks.append({**found, "key": target.key})

    product = 2.0 * math.prod(shape)
    for target in TARGETS.get(shape, ()):
        row = rows.get(target.key, {"missing": "not asked for"})
        if "missing" in row:
            continue
        title, products = row["title"], f"{target.num_products} bare products"
        bare = 1e3 * target.num_products * product / ASSUMED_FLOPS
        if "H100" in device_name:
            check(f"{title}, ms", target.milliseconds, 1e3 * row["seconds"]["warm"]["median"])
        if "over_products" in row:
            limit = target.ratio or round(target.milliseconds / bare, 3)
            check(f"{title} / {products}", limit, row["over_products"])
        if target.gib is not None:
            check(f"{title}, workspace in GiB", target.gib, row["peak_bytes"] / GIB)
    return checks


def target_state(checks: list[dict], key: str) -> str:
    """Whether all targets of a row hold, in a word."""
    met = [check["met"] for check in checks if check["key"] == key]
    if not met:
        return "-"
    return "no claim" if None in met else "met" if all(met) else "**missed**"
