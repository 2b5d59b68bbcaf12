"""The launches that the compile gate compiles: real launchers, called with tensors on "meta"."""

from __future__ import annotations

from itertools import product

import torch

from crpo_kernels.spec import KL_ESTIMATORS, POLICIES, RHO_MODES

from .compile_report import Job


def shipped_jobs() -> list[Job]:
    """Everything that the package can launch, and the objective by itself."""
    return [*stage_jobs(), *objective_jobs()]


def stage_jobs() -> list[Job]:
    """Stage entropy weights: both integer dtypes, one to many stages."""
    from crpo_kernels.launch_triton import recording
    from crpo_kernels.stage_triton import stage_counts_fwd, stage_weights_fwd

    from .inspect_triton import meta_tensor

    jobs = []
    integers = (torch.int32, torch.int64)
    for ids_dtype, bounds_dtype, num_stages in product(integers, integers, (1, 5, 33)):
        stage_ids = meta_tensor(100_000, dtype=ids_dtype)
        cu_seqlens = meta_tensor(65, dtype=bounds_dtype)
        with recording() as launches:
            stage_counts_fwd(stage_ids, cu_seqlens, num_stages)
            stage_weights_fwd(stage_ids, cu_seqlens, meta_tensor(64, num_stages))
        name = f"ids {ids_dtype}, cu_seqlens {bounds_dtype}, {num_stages} stages"
        jobs += [Job(name.replace("torch.", ""), x.kernel, x.arguments, x.meta) for x in launches]
    return jobs


def objective_jobs() -> list[Job]:
    """The objective compiled alone: every policy term with every KL estimator and rho mode."""
    from .inspect_triton import meta_tensor
    from .objective_triton import objective_kernel

    jobs = []
    for policy, estimator, rho_mode in product(POLICIES, (None, *KL_ESTIMATORS), RHO_MODES):
        arguments = {
            "values_ptr": meta_tensor(5, 4096),
            "out_ptr": meta_tensor(4, 4096),
            "num_tokens": 4096,
            "clip_low": 0.2,
            "clip_high": 0.28,
            "kl_coef": 0.01,
            "rho_cap": 2.0,
            "rho_floor": 0.5,
            "POLICY": policy,
            "KL_ESTIMATOR": estimator,
            "RHO_MODE": rho_mode,
            "BLOCK_T": 256,
        }
        name = f"{policy} {estimator or 'no kl'} {rho_mode or 'no rho'}"
        jobs.append(Job(name, objective_kernel, arguments, {"num_warps": 4}, is_objective=True))
    return jobs
