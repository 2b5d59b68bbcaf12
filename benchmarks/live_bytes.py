"""What counts bytes of tensors: those that a computation makes and still holds, at its peak."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .losses.baselines import Candidate
from .losses.cases import Inputs


class LiveBytes(TorchDispatchMode):
    """Bytes of tensor storages that operations make, while they live; ``peak`` is the most.

    Not resident memory: pages of freed tensors that an allocator keeps do not count.
    """

    def __init__(self, *existing: Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in existing}
        self.live = self.peak = 0
        self.events: list[tuple[int, int]] = []  # storages that came (bytes) and went (-bytes)

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
        self.events.append((key, size))
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size
        self.events.append((key, -size))

    def peak_without(self, outputs: list[Tensor]) -> int:
        """The peak as if the storages of ``outputs``, which still live, had never been made."""
        last = {key: place for place, (key, size) in enumerate(self.events) if size > 0}
        skipped = {last.get(t.untyped_storage()._cdata) for t in outputs}
        live = peak = 0
        for place, (_, size) in enumerate(self.events):
            live += 0 if place in skipped else size
            peak = max(peak, live)
        return peak

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
    """Peak bytes of one forward and backward.

    ``extra_bytes`` are those beyond the inputs, both gradients included; ``peak_bytes`` those
    beyond inputs and outputs: what the step needs for itself. On a CPU storages are counted one by
    one, and no code is generated under the counter: our row passes run eagerly here, with two
    scratch buffers of a few rows more. On a GPU the allocator is asked, and of an output that
    exists before the forward's end it cannot be told when it was made: ``peak_bytes`` counts it.
    """
    forward: list[int] = []
    with counting(inputs.hidden.device, inputs.tensors()) as counter:
        watched = replace(inputs, on_backward=lambda: forward.append(counter.restart()))
        result = candidate.step(watched)
        last = counter.peak
    outputs = [value for value in vars(result).values() if isinstance(value, Tensor)]
    if isinstance(counter, LiveBytes):
        peak = counter.peak_without(outputs)
    else:
        peak = max([*forward, last - sum(t.numel() * t.element_size() for t in outputs)])
    return {"extra_bytes": max([*forward, last]), "peak_bytes": max(peak, 0)}
