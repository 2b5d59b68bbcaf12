"""Bytes of tensors: what a computation makes and still holds, at its peak."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .baselines import Candidate
from .cases import Inputs


class LiveBytes(TorchDispatchMode):
    """Bytes of tensor storages that operations make, while they live; ``peak`` is the most.

    Not resident memory: pages of freed tensors that an allocator keeps do not count.
    """

    def __init__(self, *existing: Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in existing}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        """Run an operation and count the storages of its results."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

    def restart(self) -> int:
        """The peak so far; from here on a new one counts."""
        peak, self.peak = self.peak, self.live
        return peak


class CudaBytes:
    """The same from the allocator of a CUDA device: allocated bytes beyond those at the start."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> CudaBytes:
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def peak(self) -> int:
        """Bytes."""
        return torch.cuda.max_memory_allocated(self.device) - self.before

    def restart(self) -> int:
        """The peak so far; from here on a new one counts."""
        peak = self.peak
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


def counting(device: torch.device, existing: list[Tensor]) -> LiveBytes | CudaBytes:
    """What counts on ``device``; ``existing`` tensors do not count."""
    return CudaBytes(device) if device.type == "cuda" else LiveBytes(*existing)


def memory_of(candidate: Candidate, inputs: Inputs) -> dict[str, int]:
    """Peak bytes beyond the inputs of one forward and backward.

    ``extra_bytes`` counts everything, both gradients included; ``workspace_bytes`` is without the
    gradients that backward returns. On a CPU no code is generated under the counter: our row passes
    run eagerly here, with two scratch buffers of a few rows more.
    """
    forward: list[int] = []
    with counting(inputs.hidden.device, inputs.tensors()) as counter:
        watched = replace(inputs, on_backward=lambda: forward.append(counter.restart()))
        result = candidate.step(watched)
        last = counter.peak
    returned = sum(
        g.numel() * g.element_size() for g in (result.d_hidden, result.d_weight) if g is not None
    )
    workspace = max([*forward, last - returned])
    return {"extra_bytes": max([*forward, last]), "workspace_bytes": workspace}
