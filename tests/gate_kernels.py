"""Kernels that the compile gate must refuse, each beside one that it must let pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benchmarks.compile_gate.report import Job

BF16, F32 = torch.bfloat16, torch.float32


@triton.jit
def row_sum_kernel(z_ptr, out_ptr, pitch, vocab_size, BLOCK_V: tl.constexpr):
    """Full tiles without a mask, then one with."""
    row_ptr = z_ptr + tl.program_id(0).to(tl.int64) * pitch
    offs_v = tl.arange(0, BLOCK_V)
    num_full = vocab_size // BLOCK_V
    sums = tl.zeros([BLOCK_V], tl.float32)
    for i in range(num_full):
        sums += tl.load(row_ptr + i * BLOCK_V + offs_v).to(tl.float32)
    offs_v += num_full * BLOCK_V
    sums += tl.load(row_ptr + offs_v, offs_v < vocab_size, other=0.0).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), tl.sum(sums, 0))


@triton.jit
def masked_sum_kernel(z_ptr, out_ptr, pitch, vocab_size, BLOCK_V: tl.constexpr):
    """A mask on every tile: the usual way to lose the wide loads."""
    row_ptr = z_ptr + tl.program_id(0).to(tl.int64) * pitch
    sums = tl.zeros([BLOCK_V], tl.float32)
    for begin in range(0, vocab_size, BLOCK_V):
        offs_v = begin + tl.arange(0, BLOCK_V)
        sums += tl.load(row_ptr + offs_v, offs_v < vocab_size, other=0.0).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), tl.sum(sums, 0))


@triton.jit
def whole_row_kernel(z_ptr, out_ptr, BLOCK_V: tl.constexpr):
    """A softmax whose row stays in registers."""
    offs_v = tl.arange(0, BLOCK_V)
    z = tl.load(z_ptr + offs_v)
    e = tl.exp(z - tl.max(z, 0))
    tl.store(out_ptr + offs_v, e / tl.sum(e, 0) + z)


@triton.jit
def product_kernel(
    a_ptr, b_ptr, out_ptr, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One tile of a @ b.T, with K a multiple of BLOCK_K."""
    offs_m, offs_n, offs_k = (
        tl.arange(0, BLOCK_M),
        tl.arange(0, BLOCK_N),
        tl.arange(0, BLOCK_K),
    )
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + offs_m[:, None] * K + k + offs_k[None, :])
        b = tl.load(b_ptr + offs_n[None, :] * K + k + offs_k[:, None])
        sums = tl.dot(a, b, sums)
    tl.store(out_ptr + offs_m[:, None] * BLOCK_N + offs_n[None, :], sums)


@triton.jit
def clip_kernel(x_ptr, out_ptr, bound, KIND: tl.constexpr, BLOCK_T: tl.constexpr):
    """min(x, bound) of some kind."""
    offs_t = tl.arange(0, BLOCK_T)
    x = tl.load(x_ptr + offs_t)
    if KIND == "where":
        y = tl.where(bound < x, bound, x)
    elif KIND == "minimum":
        y = tl.minimum(x, bound)
    else:
        y = tl.clamp(x, -bound, bound)
    tl.store(out_ptr + offs_t, y)


@triton.jit
def wrong_kernel(x_ptr, BLOCK_T: tl.constexpr):
    """Shapes that do not fit."""
    tl.store(x_ptr + tl.arange(0, BLOCK_T), tl.arange(0, 2 * BLOCK_T))


def meta(*shape, dtype=F32):
    return torch.empty(shape, dtype=dtype, device="meta")


def row_job(name, kernel=row_sum_kernel, dtype=F32, pitch=50272, **options):
    arguments = {"z_ptr": meta(8, pitch, dtype=dtype), "out_ptr": meta(8), "pitch": pitch}
    arguments |= {"vocab_size": 50257, "BLOCK_V": 2048}
    return Job(name, kernel, arguments, {"num_warps": 4}, **{"streams_rows": True, **options})


def whole_job(name, size):
    arguments = {"z_ptr": meta(size), "out_ptr": meta(size), "BLOCK_V": size}
    return Job(name, whole_row_kernel, arguments, {"num_warps": 1})


def product_job(name, m, n, k, num_stages, num_warps=4, dtype=BF16):
    arguments = {"a_ptr": meta(m, 512, dtype=dtype), "b_ptr": meta(n, 512, dtype=dtype)}
    arguments |= {"out_ptr": meta(m, n), "K": 512, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    return Job(name, product_kernel, arguments, {"num_warps": num_warps, "num_stages": num_stages})


def clip_job(name, kind, is_objective=True):
    arguments = {"x_ptr": meta(256), "out_ptr": meta(256), "bound": 1.5}
    arguments |= {"KIND": kind, "BLOCK_T": 256}
    return Job(name, clip_kernel, arguments, {"num_warps": 1}, is_objective=is_objective)


def clean():
    """All of these pass on every target."""
    return [
        row_job("wide"),
        row_job("wide, bf16", dtype=BF16),
        row_job("the same again"),
        row_job("narrow, but not asked", masked_sum_kernel, streams_rows=False),
        whole_job("short row", 1024),
        product_job("tensor cores", 64, 64, 64, 2),
        clip_job("where", "where"),
        clip_job("minimum outside the objective", "minimum", is_objective=False),
    ]


def shipped():
    """Of the package's own launches the first of each kernel, mode and set of targets."""
    from benchmarks.compile_gate.shipped_calls import shipped_jobs

    first = {}
    for job in (job for job in shipped_jobs() if not job.is_exact):
        first.setdefault((job.kernel.__name__, job.name.split()[0], job.targets), job)
    return list(first.values())


def refused():
    """Each of these fails on sm_90."""
    return [
        row_job("mask on every tile", masked_sum_kernel),
        row_job("odd pitch", pitch=50257),
        whole_job("row of 16384 in one warp", 16384),
        product_job("four huge stages", 128, 256, 128, 4, num_warps=16),
        product_job("tile of 16", 16, 64, 64, 2),
        clip_job("minimum", "minimum"),
        clip_job("clamp", "clamp"),
        Job("wrong shapes", wrong_kernel, {"x_ptr": meta(64), "BLOCK_T": 32}),
        Job("missing argument", wrong_kernel, {"x_ptr": meta(64)}),
        Job("not a kernel", clean, {}),
    ]


def slow():
    """Takes seconds to compile."""
    return [whole_job("row of 16384 in one warp", 16384), clip_job("where", "where")]
