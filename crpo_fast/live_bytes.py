"""Live tensor bytes by what they are for: an exact meter, of real tensors and of fake ones.

Every operation passes through `LiveBytes`, which counts the storage that it makes until that
storage is freed. FSDP frees weights by resizing their storage to nothing; that counts, too. Not
resident memory: what an allocator keeps or rounds up does not count.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LABELS", "LiveBytes", "local", "storage_bytes"]

# (file of the calling function, its name; "" is any) -> label of what it makes
_CALLERS = (
    ("_fsdp_param.py", "to_accumulated_grad_if_needed", "gradients, not reduced"),
    ("_fsdp_collectives.py", "foreach_reduce", "gradients, not reduced"),
    ("_fsdp_collectives.py", "", "weights, gathered"),
    ("_fsdp_param.py", "", "weights, gathered"),
    ("_fsdp_param_group.py", "", "weights, gathered"),
    ("/crpo_kernels/", "", "loss workspace"),
    ("/rollout/", "", "rollouts"),
)
_DEPTH = 9  # frames from an operation to the function of `_CALLERS` that asked for it
LABELS = (
    "weights, sharded",
    "weights, gathered",
    "gradients, sharded",
    "gradients, not reduced",
    "optimizer",
    "KL reference",
    "activations",
    "loss workspace",
    "rollouts",
)


class LiveBytes(TorchDispatchMode):
    """Bytes of living storages by label.

    Attributes:
        live: bytes by label, now.
        peak: the most bytes that lived at once.
        at_peak: bytes by label when they did.
        most: the most bytes of each label, each at a moment of its own.
    """

    def __init__(self, gradient_shapes: Iterable[torch.Size] = ()) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak, self.at_peak, self.most = 0, Counter[str](), Counter[str]()
        self._shapes = set(gradient_shapes)
        self._entries: dict[int, tuple[str, int]] = {}
        self._total = 0

    def __enter__(self) -> LiveBytes:
        """Also sees storages that are resized, which no operation reports."""
        plain, counter = torch.UntypedStorage.resize_, self

        def resize_(self: torch.UntypedStorage, size: int) -> Any:
            result = plain(self, size)
            counter._resized(self)
            return result

        self._plain = plain
        torch.UntypedStorage.resize_ = resize_
        super().__enter__()
        return self

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        """Back to the method that was there."""
        torch.UntypedStorage.resize_ = self._plain
        super().__exit__(exc_type, exc_val, exc_tb)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storages of its results."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._entries:
                    self._add(storage, self._label(leaf))
        return out

    def add(self, tensors: Iterable[Tensor | None], label: str) -> None:
        """Count what exists already under ``label``; what was counted gets this label, too."""
        for tensor in tensors:
            if tensor is not None:
                storage = local(tensor).untyped_storage()
                entry = self._entries.get(storage._cdata)
                if entry is None:
                    self._add(storage, label)
                else:
                    self.live[entry[0]] -= entry[1]
                    self.live[label] += entry[1]
                    self._entries[storage._cdata] = (label, entry[1])

    def hold(self, label: str, size: int) -> None:
        """Count ``size`` bytes that no tensor here stands for."""
        self._change(label, size)

    def restart(self) -> None:
        """Forget the peak; what lives stays counted."""
        self.peak, self.at_peak, self.most = self._total, +self.live, +self.live

    def _add(self, storage: torch.UntypedStorage, label: str) -> None:
        self._entries[storage._cdata] = (label, 0)
        weakref.finalize(storage, self._drop, storage._cdata)
        self._resized(storage)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        entry = self._entries.get(storage._cdata)
        if entry is not None:
            self._entries[storage._cdata] = (entry[0], storage.nbytes())
            self._change(entry[0], storage.nbytes() - entry[1])

    def _drop(self, key: int) -> None:
        label, size = self._entries.pop(key)
        self._change(label, -size)

    def _change(self, label: str, size: int) -> None:
        self.live[label] += size
        self._total += size
        self.most[label] = max(self.most[label], self.live[label])
        if self._total > self.peak:
            self.peak, self.at_peak = self._total, self.live.copy()

    def _label(self, result: Tensor) -> str:
        frame: Any = sys._getframe(2)
        for _ in range(_DEPTH):
            if frame is None:
                break
            code = frame.f_code
            for file, name, label in _CALLERS:
                if file in code.co_filename and name in ("", code.co_name):
                    return label
            frame = frame.f_back
        is_backward = torch._C._current_graph_task_id() != -1
        if is_backward and result.shape in self._shapes:
            return "gradients, not reduced"
        return "activations"


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages of this rank's parts, each once."""
    storages = {}
    for tensor in tensors:
        if tensor is not None:
            storage = local(tensor).untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())
