"""Compiles one Triton launch for one target, without a GPU, and reads what the compiler made of it.

Types, constants and alignment hints come from Triton's own launcher code, so what is compiled is
what a launch with these arguments would compile. Written for Triton 3.6 and 3.7.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from .report import Job, Report, Target

GLOBAL_LOAD = {
    "cuda": re.compile(
        r"\bld\.global(?P<kind>[\w.:]*)|\bcp\.async\.c[ag]\.\S+ .*, (?P<bytes>\S+),"
    ),
    "hip": re.compile(r"\b(?:global|buffer)_load_(?:lds_)?(?P<kind>\w+)"),
}
LABEL = re.compile(r"^\s*([$.]?L\w+):")
BRANCH = re.compile(r"\b(bra(?:\.uni)?|s_c?branch\w*)\s+([$.]?L\w+)")
RETURN = re.compile(r"^\s*(?:ret;|s_endpgm)")  # one behind a predicate goes on
MINMAX = {
    "cuda": re.compile(r"\b(?:min|max)(?:\.\w+)*\.(?:bf16|f16|f32|f64)(?:x2)?\b.*"),
    "hip": re.compile(r"\bv_(?:pk_)?(?:min|max|med)3?_(?:num_)?(?:bf16|f16|f32|f64)\w*.*"),
}
MATRIX = {
    "cuda": re.compile(r"\b(tcgen05\.mma|wgmma\.mma_async|mma\.sync)\b"),
    "hip": re.compile(r"\b(v_mfma|v_wmma)_\w+"),
}


@dataclass(frozen=True)
class Pointer:
    """What Triton's launcher asks of a tensor: its type, address and extent.

    Attributes:
        dtype: of the elements.
        address: bytes from an aligned beginning of the storage; allocators align them.
        num_bytes: of the storage; AMD addresses small ones in another way.
    """

    dtype: torch.dtype
    address: int
    num_bytes: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Pointer:
        """A tensor's stand-in; the tensor may be fake or on "meta"."""
        address = int(tensor.storage_offset()) * tensor.element_size()
        return cls(tensor.dtype, address, tensor.untyped_storage().nbytes())

    def data_ptr(self) -> int:
        """Of its alignment in bytes."""
        return self.address

    def ptr_range(self) -> int:
        """The largest distance in bytes that is addressed from here."""
        return self.num_bytes


def stand_in(value: Any) -> Any:
    """An argument as Triton's launcher specialises it, without memory behind it."""
    if isinstance(value, TensorDescriptor):
        return replace(value, base=Pointer.of(value.base))
    return Pointer.of(value) if torch.is_tensor(value) else value


def specialise(job: Job, target: Target) -> tuple[ASTSource, dict[str, Any]]:
    """The source with types, constants and hints, and the options, of a launch on ``target``.

    Raises:
        ValueError: the kernel was imported for Triton's interpreter.
    """
    if not isinstance(job.kernel, JITFunction):
        raise ValueError(
            f"kernel: expected a triton.jit function to compile, got {type(job.kernel).__name__}. "
            "Unset TRITON_INTERPRET, under which Triton interprets, and start again."
        )
    backend = make_backend(GPUTarget(target.backend, target.arch, target.warp_size))
    bind = create_function_from_signature(job.kernel.signature, job.kernel.params, backend)
    options = {"debug": False, **job.meta}
    arguments = {name: stand_in(value) for name, value in job.arguments.items()}
    bound, specialization, given = bind(**arguments, **options)
    parsed, signature, constants, attrs = job.kernel._pack_args(
        backend, options, bound, specialization, given
    )
    return ASTSource(job.kernel, signature, constants, attrs), parsed.__dict__


def specialisation_key(job: Job, target: Target) -> str:
    """Equal for launches that compile to the same code."""
    source, options = specialise(job, target)
    return f"{source.hash()} {sorted((k, str(v)) for k, v in options.items())}"


def compile_job(job: Job, target: Target) -> Report:
    """Compile and inspect; whatever the compiler raises passes through."""
    source, options = specialise(job, target)
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    compiled = triton.compile(source, target=gpu, options=options)
    is_cuda = target.backend == "cuda"
    assembly = compiled.asm["ptx" if is_cuda else "amdgcn"]
    resources: dict[str, Any] = (
        cubin_resources(compiled.asm["cubin"]) if is_cuda else amd_resources(assembly)
    )
    matrix = MATRIX[target.backend].search(assembly)
    return Report(
        kernel=source.name,
        configuration=job.name,
        target=target.name,
        **resources,
        shared_bytes=compiled.metadata.shared,
        has_dot="tt.dot" in compiled.asm["ttir"],
        matrix_instruction=matrix[1] if matrix else None,
        load_bytes=tuple(loop_loads(assembly, target.backend)),
        min_max=tuple(dropped_nans(assembly, target.backend)),
    )


def cubin_resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread and bytes of its stack: this is where spills show, LOCAL stays 0."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "registers": found["REG"],
        "stack_bytes": found["STACK"] + found["LOCAL"],
        "num_spilled": 0,
    }


def amd_resources(assembly: str) -> dict[str, int]:
    """The same from the metadata that ends AMD assembly; it also counts spilled registers."""
    names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    found = {name: int(re.findall(rf"\.{name}:\s*(\d+)", assembly)[-1]) for name in names}
    return {
        "registers": found["vgpr_count"],
        "stack_bytes": found["private_segment_fixed_size"],
        "num_spilled": found["vgpr_spill_count"] + found["sgpr_spill_count"],
    }


def load_size(match: re.Match) -> int:
    """Bytes that one thread loads by an instruction that GLOBAL_LOAD matches."""
    groups = match.groupdict()
    if groups.get("bytes"):
        return int(groups["bytes"], 0)
    kind = groups["kind"]
    if number := re.search(r"dword(?:x(\d))?", kind):
        return 4 * int(number[1] or 1)
    if kind.endswith(("byte", "short")) or "d16" in kind:
        return 1 if "byte" in kind else 2
    count = re.search(r"\.v(\d)", kind)
    bits = re.search(r"\.[bsuf](\d+)$", kind)
    assert bits, f"a load of unknown size: {match[0]}"
    return int(count[1] if count else 1) * int(bits[1]) // 8


def loop_loads(assembly: str, backend: str) -> list[int]:
    """Sizes of the global loads inside loops, ascending; bytes per thread."""
    matches = (GLOBAL_LOAD[backend].search(line) for line in loop_lines(assembly))
    return sorted(load_size(match) for match in matches if match)


def loop_lines(assembly: str) -> list[str]:
    """The lines that may run again: blocks on a cycle of the control flow, wherever they stand."""
    blocks: list[list[str]] = [[]]
    labels = {}
    for line in assembly.splitlines():
        if label := LABEL.match(line):
            blocks.append([])
            labels[label[1]] = len(blocks) - 1
        blocks[-1].append(line)
        if BRANCH.search(line) or RETURN.search(line):
            blocks.append([])
    after = [successors(block, i, labels, len(blocks)) for i, block in enumerate(blocks)]
    again = [block for i, block in enumerate(blocks) if i in reachable(i, after)]
    return [line for block in again for line in block]


def successors(block: list[str], index: int, labels: dict[str, int], num_blocks: int) -> list[int]:
    """Where control goes after a block."""
    last = block[-1] if block else ""
    branch = BRANCH.search(last)
    following = [labels[branch[2]]] if branch and branch[2] in labels else []
    is_conditional = branch and ("cbranch" in branch[1] or last.strip().startswith("@"))
    is_end = RETURN.search(last) or (branch and not is_conditional)
    return following if is_end or index + 1 == num_blocks else [*following, index + 1]


def reachable(start: int, after: list[list[int]]) -> set[int]:
    """The blocks that control can reach from the end of block ``start``."""
    found: set[int] = set()
    waiting = [start]
    while waiting:
        new = set(after[waiting.pop()]) - found
        found |= new
        waiting += new
    return found


def dropped_nans(assembly: str, backend: str) -> Iterator[str]:
    """Instructions that return the other operand when one is NaN; max(x, x) only quiets a NaN."""
    for line in assembly.splitlines():
        match = MINMAX[backend].search(line)
        if match:
            operands = re.split(r"[\s,]+", match[0].strip())[2:]
            if len(set(operands)) > 1:
                yield " ".join(match[0].rstrip(" ;").split())


def version() -> str:
    """Triton's."""
    return triton.__version__
