"""The launches that the compile gate compiles: real launchers, called with tensors on "meta"."""

from __future__ import annotations

from itertools import product

from crpo_kernels.spec import KL_ESTIMATORS, POLICIES, RHO_MODES

from .compile_report import Job


def shipped_jobs() -> list[Job]:
    """Everything that the package can launch, and the objective by itself."""
    return objective_jobs()


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
