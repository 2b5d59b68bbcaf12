"""A step's forwards and backwards on a device: nothing is read, nothing is mixed with the CPU.

Without a GPU the device is "meta": its tensors have no values, so whoever asks for one gets an
error, and so does an operation on tensors of two devices. With a GPU the same step runs under
torch's own alarm.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, masking_utils

from crpo_fast import attention, distributed, metrics, policy, step
from crpo_fast.config import ConfigError
from crpo_fast.distributed import World
from crpo_fast.metrics import Sums
from layout_cases import Case, make_model, old_logprobs

pytestmark = pytest.mark.usefixtures("packed_rows_are_known")
META = torch.device("meta")
CASES = [
    Case("bnpo", "clip_old", "sequence_mean", "k3", True, "packed", True, False, "whole", "even"),
    Case("token_mean", "gspo_old", "none", "k1", False, "packed", False, True, "whole", "even"),
    Case("token_mean", "sft", "none", "none", True, "packed", False, False, "some_empty", "even"),
]


@pytest.fixture
def packed_rows_are_known(monkeypatch):
    """Transformers reads one flag a forward to make a mask that we then do without."""
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)


def device_policy(case: Case, device: torch.device, dtype: torch.dtype) -> policy.Policy:
    """A policy of one rank that is not sharded."""
    model = make_model(case.tied, torch.float32)
    policy.install_head(model)
    model.get_output_embeddings().weight.requires_grad_(not case.frozen_head)
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return policy.Policy(model.to(device, dtype).train(), World(0, 1, device))


def batches_of(case: Case, actor: policy.Policy, monkeypatch) -> list:
    """The step's micro-batches with every vector, on the policy's device."""
    monkeypatch.setattr(distributed, "all_sum", lambda x: x)
    monkeypatch.setattr(distributed, "all_max", lambda value, world: value)
    sequences = case.sequences()
    host = policy.Policy(actor.model, World(0, 1, torch.device("cpu")))
    batches = step.micro_batches(
        sequences, case.spec, host, token_budget=case.token_budget(1), layout=case.layout
    )
    flat = torch.tensor([x for xs in old_logprobs(sequences) for x in xs])
    extra = {"ref_logprobs": flat} if case.kl != "none" else {}
    if case.objective.endswith("_old"):
        extra["old_logprobs"] = flat
    batches = [b.with_vectors(**{n: v[b.source] for n, v in extra.items()}) for b in batches]
    return [step._on_device(b, actor.world.device) for b in batches]


@pytest.mark.parametrize("case", CASES, ids=[case.objective for case in CASES])
def test_a_step_reads_nothing_until_its_end(case, monkeypatch):
    actor = device_policy(case, META, torch.bfloat16)
    batches = batches_of(case, actor, monkeypatch)
    assert len(batches) > 1 or case.micro_batches == 1
    read: list[torch.Tensor] = []
    monkeypatch.setattr(torch, "stack", _noted(torch.stack, read))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        step.accumulate(actor, batches, case.spec)
    assert [x.shape for x in read[-1:]] == [(len(batches),)]  # the losses of all micro-batches
    grads = [p.grad for p in actor.model.parameters() if p.requires_grad]
    assert all(g is not None and g.device.type == "meta" for g in grads)


def _noted(plain, read):
    def stack(*args, **kwargs):
        read.append(plain(*args, **kwargs))
        return read[-1]

    return stack


@pytest.mark.parametrize("case", CASES[:2], ids=[case.objective for case in CASES[:2]])
def test_scoring_reads_nothing(case, monkeypatch):
    actor = device_policy(case, META, torch.float32)
    monkeypatch.setattr(distributed, "reshard", lambda model: None)
    for batch in batches_of(case, actor, monkeypatch):
        assert actor.logprobs(batch, 0.9).shape == batch.labels.shape


def test_lengths_are_told_not_asked():
    host = torch.tensor([[0, 1, 2, 0, 1, 0]])
    copy = host.to("meta")
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        attention.sequence_lengths(copy)
    attention.moved(host, copy)
    assert attention.sequence_lengths(copy) == [3, 2, 1]
    assert attention.sequence_lengths(host.to("cpu")) == [3, 2, 1]


def test_flash_attention_is_told_where_sequences_are(monkeypatch):
    """A stand-in under such a name gets bounds and longest, and gives what sdpa_packed gives."""
    seen = []

    def flash(module, query, key, value, mask, scaling=None, **given):
        bounds, longest = given["cu_seq_lens_q"].tolist(), given["max_length_q"]
        assert mask is None
        assert given["cu_seq_lens_k"].dtype == torch.int32
        assert longest == max(b - a for a, b in itertools.pairwise(bounds)) == given["max_length_k"]
        seen.append(bounds)
        parts = [
            scaled_dot_product_attention(
                *(x[:, :, a:b] for x in (query, key, value)),
                is_causal=True, scale=scaling, enable_gqa=True,
            )
            for a, b in itertools.pairwise(bounds)
        ]  # fmt: skip
        return torch.cat(parts, 2).transpose(1, 2), None

    AttentionInterface.register("a_flash_stand_in", flash)
    cpu, losses = torch.device("cpu"), {}
    for name in ("sdpa_packed", "a_flash_stand_in"):
        actor = device_policy(CASES[0], cpu, torch.float64)
        actor.model.config._attn_implementation = name
        batches = batches_of(CASES[0], actor, monkeypatch)
        losses[name] = step.accumulate(actor, batches, CASES[0].spec)[0]
    assert len(seen) >= 2 * len(batches)  # every layer, checkpointed ones again
    assert any(len(bounds) > 2 for bounds in seen)
    assert losses["a_flash_stand_in"] == pytest.approx(losses["sdpa_packed"], rel=1e-12)


@pytest.mark.parametrize("ask", ["count", "total", "means", "reduced", "merge"])
def test_sums_of_a_device_wait_until_they_are_asked(ask):
    sums = Sums()
    sums.add("a", 1.0, 2)
    sums.add("a", torch.ones((), device=META), 2)
    sums.add_extremes("x", torch.ones(3, device=META), minimum=True)
    asked = {
        "count": lambda: sums.count("a"),
        "total": lambda: sums.total("a"),
        "means": sums.means,
        "reduced": lambda: sums.reduced(lambda x: x),
        "merge": lambda: Sums().merge(sums),
    }[ask]
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        asked()


def test_sums_of_a_device_are_those_of_the_host(monkeypatch):
    """What waited is added as if it had been added at once."""
    host, waiting = Sums(), Sums()
    for sums in (waiting, host):
        if sums is waiting:
            monkeypatch.setattr(metrics, "_device_of", lambda *values: torch.device("cpu"))
        for value in (0.1, 0.2, 1e9, 0.3):
            sums.add("a", torch.tensor(value), torch.tensor(2))
            sums.add_extremes("x", torch.tensor([value, -value]), minimum=True)
        sums.add_extremes("none", torch.empty(0))
        sums.add_extremes("nan", torch.tensor([1.0, float("nan")]))
        monkeypatch.undo()
    assert waiting._waiting
    assert str(waiting.means()) == str(host.means())
    assert host.means()["x/min"] == pytest.approx(-1e9)
    assert host.means()["none/max"] is None


def test_more_ranks_than_devices_are_refused_on_every_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for rank in ("0", "3"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(ConfigError, match=r"at most 2, .* got 4. Type torchrun --nproc_per_n"):
            distributed.init()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=[case.objective for case in CASES])
def test_a_step_under_the_alarm_of_torch(case, monkeypatch):
    """The very same metrics as on the CPU, and no synchronisation before the losses are read."""
    found = {}
    for device in ("cpu", "cuda"):
        actor = device_policy(case, torch.device(device), torch.float32)
        batches = batches_of(case, actor, monkeypatch)
        step.accumulate(actor, batches, case.spec)  # compiles
        actor.model.zero_grad(set_to_none=True)
        sums = Sums()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            for batch in batches:
                loss, stats = step.micro_batch_loss(actor, batch, case.spec)
                loss.backward()
                step._add_stats(sums, stats, batch, case.spec)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        norms = [p.grad.norm() for p in actor.model.parameters() if p.grad is not None]
        found[device] = {**sums.means(), "norm": float(torch.stack(norms).norm())}
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-4, abs=1e-5, nan_ok=True)
