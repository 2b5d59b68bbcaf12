"""The fused loss beside its floor, plain torch and the peers: `python -m benchmarks loss`.

All named shapes, or those of --shape; --rows, --vocab and --dim make one of one's own; --inputs
takes hidden states, head and labels from a model. Writes `<out>/loss_<device>.json`, .csv, .md and
.svg. On a CPU with few rows and within 4.5 minutes: further rounds are dropped first, then cold
steps, then candidates, each with the reason.
"""

from __future__ import annotations

from benchmarks.gpu_gate.targets import gpu_targets
from benchmarks.machine import gpu_name

from .candidates import loss_candidates
from .suite import Suite

CPU_SECONDS = 270.0
FEWEST_ROWS = 512


def loss_targets(found: dict, machine: dict) -> list[dict]:
    """What a measured case must show: see `cpu_targets` and `gpu_targets`."""
    rows = {row["key"]: row for row in found["rows"]}
    if "gpu" in machine:
        shape = (found["rows_t"], found["vocab"], found["dim"])
        checks = gpu_targets(shape, rows, gpu_name(machine))
    else:
        checks = cpu_targets(rows, found["rows_t"])
    return [{"case": found["name"], **check} for check in checks]


def cpu_targets(rows: dict[str, dict], num_rows: int) -> list[dict]:
    """One pass against the products, plain torch and the peers; only for candidates that ran.

    The limits over products and plain torch are for `FEWEST_ROWS` and more: below, a d_weight that
    is made anew costs what a product does.
    """
    ran = {key: row for key, row in rows.items() if "missing" not in row}
    if "one_pass" not in ran:
        return []
    ours, checks = ran["one_pass"], []

    def check(text: str, limit: float, value: float) -> None:
        checks.append({"text": text, "limit": limit, "value": value, "met": value <= limit})

    def seconds(row: dict) -> float:
        return row["seconds"]["warm"]["median"]

    if num_rows >= FEWEST_ROWS:
        check("one pass / three products", 1.5, ours["over_products"])
        if "naive" in ran:
            check("one pass / plain torch, time", 0.4, ours["over_naive"])
        if "one_pass_eager" in ran:
            eager = ran["one_pass_eager"]["over_products"]
            check("without a C++ compiler / three products", 2.8, eager)
    if "naive" in ran:
        memory = ours["peak_bytes"] / max(ran["naive"]["peak_bytes"], 1)
        check("one pass / plain torch, peak memory", round(1 / 3, 3), memory)
    for row in ran.values():
        if row["kind"] == "peer" and row["num_products"] == 3:
            check(f"one pass / {row['title']}, time", 1.0, seconds(ours) / seconds(row))
    return checks


SUITE = Suite("loss", CPU_SECONDS, loss_candidates, loss_targets)
add_arguments, run, measure_loss = SUITE.add_arguments, SUITE.run, SUITE.measure
