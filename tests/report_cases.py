"""Made-up reports of `python -m benchmarks loss` and `score`, with every kind of row."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

MACHINE = {
    "date": "2026-01-02 03:04 UTC",
    "cpu": "Some CPU (family 1 model 2), 2 cores, no avx512",
    "threads": 2,
    "memory_gib": 16.0,
    "python": "3.11.7",
    "versions": {"torch": "2.13.0+cpu"},
    "commit": "0123456789ab",
}
GPU = {
    "name": "Some GPU",
    "memory_gib": 80.0,
    "driver": "1.2",
    "cuda": "13.0",
    "clocks_and_power": "x",
}
ERRORS = {
    "logprobs": {"rms": 0.0196, "max": 0.071},
    "entropy": {"rms": 0.00915, "max": 0.0312},
    "d_hidden": {"rms": 0.0108, "max": 0.052},
    "d_weight": {"rms": 0.00937, "max": 0.0445},
}
FLOOR = 1.2  # seconds


def times(median: float, count: int = 5) -> dict[str, Any]:
    """Warm and cold times around a median."""
    warm = {"median": median, "low": 0.99 * median, "high": 1.02 * median, "count": count}
    return {"warm": warm, "cold": {name: 1.1 * value for name, value in warm.items()}}


def measured(key: str, title: str, kind: str, median: float, **changed: Any) -> dict[str, Any]:
    """A row that ran."""
    return {
        "key": key,
        "title": title,
        "version": "",
        "kind": kind,
        "num_products": 3,
        "note": "",
        "seconds": times(median),
        "all_seconds": {"warm": [median], "cold": [1.1 * median]},
        "floor": "products",
        "floor_share": FLOOR / median,
        "over_products": median / FLOOR,
        "over_naive": median / 2.4,
        "tflops": 1.0 / median,
        "peak_bytes": int(median * 2**28),
        "extra_bytes": int(median * 2**29),
        "errors": deepcopy(ERRORS),
        "lacks": {},
        "has_entropy_gradient": True,
        "wrong": "",
        **changed,
    }


def rows() -> list[dict[str, Any]]:
    """Floor, ours, plain torch; peers that run, lack something, are wrong, or are not there."""
    no_entropy = {"logprobs": ERRORS["logprobs"], "d_hidden": ERRORS["d_hidden"]}
    lacks = {
        "entropy": "returns no entropy",
        "entropy_gradient": "has no entropy term",
        "d_weight": "keeps d_weight to itself | always",
    }
    return [
        measured("products", "three bare products", "floor", FLOOR, errors={}, peak_bytes=0),
        measured("one_pass", "crpo_kernels, one pass", "ours", 1.25),
        measured("naive", "plain torch", "plain", 2.4, note="fp32 logits of all tokens"),
        measured(
            "liger",
            "Liger chunked GRPO",
            "peer",
            3.1,
            version="0.8.5",
            errors=no_entropy,
            lacks=lacks,
            has_entropy_gradient=False,
        ),
        measured("bad", "A filtered loss", "peer", 1.1, wrong="d_weight rms .9, limit .03"),
        {
            "key": "gone",
            "title": "A GPU kernel",
            "version": "",
            "kind": "peer",
            "num_products": 3,
            "note": "",
            "missing": "needs a CUDA device",
        },
    ]


def case(name: str = "qwen3-0.6b", num_rows: int = 512, dim: int = 1024) -> dict[str, Any]:
    """One shape."""
    return {
        "name": name,
        "case": f"T{num_rows} V151936 D{dim} bfloat16",
        "rows_t": num_rows,
        "vocab": 151936,
        "dim": dim,
        "dtype": "bfloat16",
        "inputs": "spectrum",
        "product_tflops": 0.35,
        "entropy_quantiles": [0.4, 2.8],
        "error_rows": 32,
        "rows": rows(),
    }


def report(kind: str = "loss", *, is_gpu: bool = False) -> dict[str, Any]:
    """Two shapes."""
    target = {"text": "one pass / three products", "limit": 1.5, "value": 1.04, "met": True}
    return {
        "command": f"python -m benchmarks {kind} --device cpu",
        "kind": kind,
        "machine": {**MACHINE, **({"gpu": GPU} if is_gpu else {})},
        "cases": [case(), case("qwen3-8b", 128, 4096)],
        "targets": [target],
        "seconds": 100.0,
    }
