"""`add_fused_head` under what people wrap models in: losses and gradients against all logits.

On one process: torch.compile, tied embeddings, accumulation, checkpointing, autocast, peft, copies,
and transformers' Trainer. On two (wrapper_worker.py, one start of torchrun): DDP, FSDP1, FSDP2 and
DeepSpeed. The loss itself in compiled models: test_compile_use.py.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from crpo_fast.integrations.causal_lm import add_fused_head
from crpo_fast.model_check import UnsupportedModelError
from wrapper_cases import (
    SIZES,
    fused_loss,
    largest_error,
    make_batch,
    make_model,
    plain_loss,
    step,
    trained_by_trainer,
)

ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("wrapper_worker.py")
RANKS = (
    *("ddp", "ddp_tied", "ddp_accumulated", "ddp_compiled", "ddp_peft", "trainer"),
    *("fsdp1_flat", "fsdp1_blocks_tied", "fsdp1_a_unit_of_the_head"),
    "fsdp1_a_unit_of_a_tied_embedding_is_refused",
    *("fsdp2_blocks_tied", "fsdp2_a_unit_of_the_head", "fsdp2_checkpointed"),
    *("fsdp2_accumulated", "fsdp2_keeps_the_vectors_in_fp32"),
    *("fsdp2_peft", "fsdp2_a_unit_of_an_adapted_head_is_refused_peft"),
    *("fsdp2_a_weight_from_outside_is_refused", "deepspeed_zero2", "deepspeed_zero3"),
)


def assert_equal(model, wrapped, plain, tolerance=1e-11, **changes):
    """One step of ``wrapped``, made of ``model``, and one from the logits of ``plain``."""
    batch = {**make_batch(), **changes}
    want, got = plain_loss(plain, batch), fused_loss(wrapped, batch)
    assert abs(float(got.detach() / want.detach()) - 1) < tolerance
    assert largest_error(step(model, got), step(plain, want)) < tolerance


@torch.no_grad()
def own_logprobs(model, batch):
    """Of the labels, from all logits."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"].clamp(min=0).unsqueeze(-1)
    return logits.log_softmax(-1).gather(-1, labels).squeeze(-1)


@pytest.mark.parametrize("tied", [False, True])
def test_alone(tied):
    model = add_fused_head(make_model(tied))
    assert_equal(model, model, make_model(tied))


def test_padding_on_the_left():
    """Where a forward that loses the mask gives other numbers."""
    mask = make_batch()["attention_mask"]
    mask[1:, :2] = 0
    model = add_fused_head(make_model())
    assert_equal(model, model, make_model(), attention_mask=mask)


def test_the_lines_of_the_page():
    """docs/integrations.md, plain torch, as they stand there."""
    page = (ROOT / "docs" / "integrations.md").read_text("utf-8")
    block = re.search(r"^## Plain torch\n```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert block is not None
    batch, model, plain = make_batch(), make_model(), make_model()
    given = {**batch, "model": model}
    exec(block[1], given)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    batch["old_logprobs"] = own_logprobs(plain, batch)  # on-policy: no others were given
    assert largest_error(found, step(plain, plain_loss(plain, batch))) < 1e-11


def test_compiled_in_one_graph(forget_graphs):
    model = add_fused_head(make_model(layers=1))
    assert_equal(
        model, torch.compile(model, fullgraph=True, backend="aot_eager"), make_model(layers=1)
    )


def test_gradient_checkpointing():
    model = add_fused_head(make_model())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal(model.train(), model, make_model())


def test_accumulation_of_uneven_parts():
    """Weights hold the counts of the whole step, so that parts add up whatever they hold."""
    model, plain = add_fused_head(make_model()), make_model()
    batch = make_batch()
    truth = step(plain, plain_loss(plain, batch))
    for cut in (slice(0, 1), slice(1, 4)):
        fused_loss(model, {name: value[cut] for name, value in batch.items()}).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert largest_error(found, truth) < 1e-11


def test_autocast():
    """As near to fp64 as the loss from logits under the same autocast; no ratio near a clip."""
    errors, exact, batch = [], make_model(), make_batch()
    batch["old_logprobs"] = own_logprobs(exact, batch)
    truth = step(exact, plain_loss(exact, batch))
    batch = {name: v.float() if v.is_floating_point() else v for name, v in batch.items()}
    for loss_of in (plain_loss, fused_loss):
        model = add_fused_head(make_model(dtype=torch.float32))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, batch)
        found = {name: grad.double() for name, grad in step(model, loss).items()}
        errors.append(largest_error(found, truth))
    assert errors[1] < 2 * errors[0] < 0.3, errors


def test_a_copy_computes_with_its_own_weights():
    """Such as a reference model."""
    model = add_fused_head(make_model())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert_equal(twin, twin, make_model())


def test_the_model_stays_as_it_was(tmp_path):
    plain, model = make_model(), add_fused_head(add_fused_head(make_model()))
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert model.state_dict().keys() == plain.state_dict().keys()
    ids = make_batch()["input_ids"][:2]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # padded on the left: positions have to be counted from the mask
    wanted = {"max_new_tokens": 4, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **wanted), plain.generate(ids, **wanted))
    assert torch.equal(model(ids).logits, plain(ids).logits)
    model.save_pretrained(tmp_path)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(reloaded(ids).logits, plain(ids).logits)


def adapted(model, targets, **options):
    """``model`` with random LoRA adapters."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    made = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, **options)
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, made).double()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.2)
    return wrapped


@pytest.mark.parametrize("kind", ["blocks", "head", "whole_head"])
def test_peft(kind):
    targets = ["q_proj", "down_proj", *(["lm_head"] if kind == "head" else [])]
    options = {"modules_to_save": ["lm_head"]} if kind == "whole_head" else {}
    plain = adapted(make_model(), targets, **options)
    model = adapted(add_fused_head(make_model()), targets, **options)
    assert_equal(model, model, plain)
    with model.disable_adapter(), plain.disable_adapter(), torch.no_grad():
        batch = make_batch()
        want, got = plain_loss(plain, batch), fused_loss(model, batch)
    assert abs(float(got / want) - 1) < 1e-11


def test_peft_first():
    plain = adapted(make_model(), ["q_proj"])
    model = adapted(make_model(), ["q_proj"])
    assert add_fused_head(model) is model
    assert_equal(model, model, plain)


def test_adapters_of_the_head_come_later_and_without_dropout():
    with pytest.raises(ValueError, match=r"model: .*before peft"):
        add_fused_head(adapted(make_model(), ["lm_head"]))
    model = adapted(add_fused_head(make_model()), ["lm_head"], lora_dropout=0.1)
    assert_equal(model.eval(), model, adapted(make_model(), ["lm_head"], lora_dropout=0.1).eval())
    with pytest.raises(UnsupportedModelError, match=r"model: expected no dropout .* got 0\.1"):
        fused_loss(model.train(), make_batch())


def test_transformers_trainer_with_accumulation(tmp_path):
    """Two micro-batches of one step; the Trainer divides nothing."""
    plain, batch = make_model(), make_batch()
    truth = step(plain, plain_loss(plain, batch))
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    lost = trained_by_trainer(batch, str(tmp_path), 1, **options)
    assert largest_error(lost, truth) < 1e-11


SCALED = {
    "Gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8},
    "Granite": {"logits_scaling": 0.4},
    "Cohere": {"logit_scale": 0.3},
    "Phi": {},  # its head has a bias
}


@pytest.mark.parametrize("name", SCALED)
def test_scale_cap_and_bias_of_the_model_are_in_the_loss(name):
    config = getattr(transformers, f"{name}Config").from_dict(
        {
            **SIZES,
            "num_hidden_layers": 1,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            **SCALED[name],
        }
    )
    torch.manual_seed(4)
    plain = getattr(transformers, f"{name}ForCausalLM")(config).double()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model = add_fused_head(copy.deepcopy(plain))
    assert_equal(model, model, plain, 1e-6)  # a model may cap in fp32


def test_mistakes():
    model = add_fused_head(make_model())
    batch = make_batch()
    with pytest.raises(ValueError, match="labels: expected none beside head"):
        model(batch["input_ids"], labels=batch["labels"], head=print)
    for wrapped in (nn.Linear(2, 2), torch.compile(make_model())):
        with pytest.raises(ValueError, match=r"model: expected .* before torch\.compile"):
            add_fused_head(wrapped)

    class Scaled(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden)

    other = make_model()
    other.lm_head.__class__ = Scaled
    with pytest.raises(UnsupportedModelError, match=r"model: expected a plain nn\.Linear"):
        add_fused_head(other)


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """What wrapper_worker.py found, by case."""
    out = tmp_path_factory.mktemp("wrappers") / "found.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc_per_node=2", str(WORKER), str(out)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text("utf-8"))


@pytest.mark.multirank
@pytest.mark.parametrize("name", RANKS)
def test_two_ranks(name, on_two_ranks):
    assert on_two_ranks.keys() == set(RANKS)
    found = on_two_ranks[name]
    if isinstance(found, str):
        pytest.skip(found)
    tolerance = 2e-6 if name.startswith("deepspeed") else 1e-11  # fp32 there, else fp64
    assert max(found.values()) < tolerance, found
