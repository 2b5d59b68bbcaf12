"""Started by test_block_kernels.py with TRITON_INTERPRET=1: a policy with and without Liger.

The interpreter passes floats as Python's and does not know libdevice; a compiled kernel gets fp32
scalars and CUDA's rsqrt and tanh. Both are mended here.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from transformers import AutoConfig, AutoModelForCausalLM

from crpo_fast import distributed, policy
from crpo_fast.attention import choose_attention
from crpo_fast.block_kernels import COMPARED, use_liger
from crpo_fast.distributed import World
from crpo_fast.loss import LossSpec
from crpo_fast.packing import Sequence
from crpo_fast.step import accumulate, micro_batches
from crpo_kernels import ObjectiveSpec
from model_cases import SIZES

SEQUENCES = [
    Sequence([5, 6, 7], [8, 9, 10, 11], [0, 0, 1, 1], [-5.0] * 4, 1.0),
    Sequence([5, 6], [12, 13], [0, 1], [-5.5] * 2, -0.5),
]
TOKENS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
SPEC = LossSpec(ObjectiveSpec("clip", clip_low=0.2, clip_high=0.2), "token_mean", (-0.05, 0.05))


def mend_interpreter() -> None:
    convert = interpreter._implicit_cvt

    def converted(arg: Any) -> Any:
        if not isinstance(arg, float):
            return convert(arg)
        handle = interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = converted
    norms: Any = importlib.import_module("liger_kernel.ops.rms_norm")
    geglu: Any = importlib.import_module("liger_kernel.ops.geglu")
    # looked up when called, as the interpreter replaces what is in tl
    norms.rsqrt = lambda x: tl.rsqrt(x)
    geglu.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1


def make(architecture: str) -> Any:
    """The same fp32 weights each time; norm weights away from their first values."""
    layers = 2 if architecture in ("llama", "qwen3", "gemma2") else 1
    config = AutoConfig.for_model(architecture, **{**SIZES, **TOKENS, "num_hidden_layers": layers})
    torch.manual_seed(0)
    attention, _ = choose_attention("auto", "cpu", "float32", config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return model


def trained(model: Any, world: World) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logprobs of one packed micro-batch through our head, and all gradients."""
    made = policy.create(model, world, compute_dtype=torch.float32)
    batches = micro_batches(SEQUENCES, SPEC, made, token_budget=20, layout="packed")
    _, _, (logprobs,) = accumulate(made, batches, SPEC)
    return logprobs, {n: p.grad for n, p in made.model.named_parameters() if p.grad is not None}


def compared(architecture: str, world: World) -> dict[str, Any]:
    logprobs, gradients = trained(make(architecture), world)
    model = make(architecture)
    forward, head = model.forward.__func__, model.get_output_embeddings().forward
    use_liger(model)
    is_theirs = model.forward.__func__ is forward
    is_ours = model.get_output_embeddings().forward == head
    other, patched = trained(model, world)
    assert gradients.keys() == patched.keys()
    errors = [(patched[n] - g).abs().max() / g.abs().max() for n, g in gradients.items()]
    norms = [m for n, m in model.named_modules() if n.endswith("norm")]
    return {
        "logprobs": float((other - logprobs).abs().max()),
        "gradient": float(max(errors)),
        "norms": len(norms),
        "liger_norms": sum(m._get_name() == "LigerRMSNorm" for m in norms),
        "is_head_ours": is_ours,
        "is_forward_theirs": is_theirs,
    }


def main() -> None:
    mend_interpreter()
    world = distributed.init(threads=1)
    print(json.dumps({name: compared(name, world) for name in COMPARED}))
    distributed.shutdown()


if __name__ == "__main__":
    main()
