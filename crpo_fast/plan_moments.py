"""A training step rehearsed on fake tensors: its moments of most memory, without the memory.

The policy, FSDP2, the packing, the loss and the engine are the real ones; tensors have shapes and
storages but no values, and the process group has one rank that pretends to be one of many. So what
a rank allocates is counted, not guessed. Where real code asks for values (validation of labels,
sampling) it is given real ones, or a stand-in of the same size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from crpo_fast import attention, distributed, lora
from crpo_fast import policy as policies
from crpo_fast.batch import SamplingParams
from crpo_fast.config import Config, PhaseConfig
from crpo_fast.distributed import World
from crpo_fast.live_bytes import LiveBytes, storage_bytes
from crpo_fast.loss import LossSpec, kernel_options, loss_spec, micro_batch_loss
from crpo_fast.packing import MicroBatch, Sequence
from crpo_fast.policy import HeadFunction, Policy
from crpo_fast.rollout.hf import HFEngine
from crpo_fast.rollout.sampling import sample
from crpo_fast.rollout.static import StaticEngine
from crpo_fast.session import DTYPES, check_loss_backend, check_scoring
from crpo_fast.step import micro_batches
from crpo_fast.task import build_grammar
from crpo_fast.updates import update_plan
from crpo_kernels import BackendChoice, choose_backend

ModelMaker = Callable[[], Any]  # makes the initial model; called while tensors are fake


@dataclass(frozen=True)
class Moment:
    """What one rank needs in a part of the step, by label of ``LiveBytes``.

    Attributes:
        name: of the part.
        parts: bytes when all together are most.
        most: the most bytes of each label, each at a time of its own.
    """

    name: str
    parts: dict[str, int]
    most: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Lengths:
    """Tokens of every sequence of the rehearsed step."""

    prompt: int
    completion: int


@dataclass(frozen=True)
class _FakePolicy(Policy):
    """Runs the model on fake tensors and the head's function with real labels and vectors."""

    fake: Any = None

    def __call__(self, batch: MicroBatch, compute: HeadFunction) -> Any:
        """As ``Policy``."""

        def with_values(*args: Any, **kwargs: Any) -> Any:
            with unset_fake_temporarily():
                return compute(*args, **kwargs)

        attention.segments(batch.position_ids)  # asks for values; the answer is kept
        with self.fake:
            return super().__call__(batch, with_values)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[Any]:
        """As ``Policy``; what runs inside decides itself what is fake."""
        whole = distributed.gathered(self.model)
        with self.fake:
            model = whole.__enter__()
        try:
            yield model
        finally:
            with self.fake:
                whole.__exit__(None, None, None)


class Rehearsal:
    """One rank of one phase.

    Args:
        config: of the run.
        make_model: the model.
        world: from ``distributed.pretended``.
        phase: of the config.
        lengths: of the sequences.
        device: "cpu" or "cuda"; see ``plan``.
    """

    def __init__(
        self,
        config: Config,
        make_model: ModelMaker,
        world: World,
        phase: PhaseConfig,
        lengths: Lengths,
        *,
        device: str = "cpu",
    ) -> None:
        self.config, self.phase, self.lengths, self.world = config, phase, lengths, world
        self.device = device
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        dtype = DTYPES[config.model.compute_dtype]
        master = torch.float64 if dtype == torch.float64 else torch.float32
        self.backend = planned_backend(config, device).name
        options = {**kernel_options(config), "backend": self.backend}
        spec = loss_spec(config, phase, build_grammar(config).coefs())
        self.spec: LossSpec = replace(spec, options=tuple(options.items()))
        self.policy = self._policy(
            make_model,
            master,
            compute_dtype=dtype,
            activation_checkpointing=config.model.activation_checkpointing,
            freeze_head=config.model.freeze_head,
        )
        self.reference: Policy | None = None
        is_copy = not self.config.lora.rank  # else it is the policy without its adapters
        if self.spec.objective.kl_coef > 0 and not is_copy:
            self.reference = self.policy
        elif self.spec.objective.kl_coef > 0:
            self.reference = self._policy(make_model, dtype, compute_dtype=dtype, trainable=False)
        parameters = list(self.policy.model.parameters())
        self.trainable = [p for p in parameters if p.requires_grad]
        self.bytes = LiveBytes(p.shape for p in parameters if p.ndim == 2)
        self.bytes.add([*parameters, *self.policy.model.buffers()], "weights, sharded")
        # AdamW: two moments of every trainable shard, and a count of steps
        self.bytes.hold("optimizer", 2 * storage_bytes(self.trainable) + 4 * len(self.trainable))
        if self.reference is not None and is_copy:
            copy = self.reference.model
            self.bytes.add([*copy.parameters(), *copy.buffers()], "KL reference")

    def start(self, *, is_first: bool) -> list[Moment]:
        """Before the steps: whole copies of the model, which are sharded in place.

        On a CPU the reference is built in fp32, and cast before it is sharded.
        """
        model, parts = self.policy.model, self.bytes.live
        count = sum(p.numel() for p in model.parameters())
        item = DTYPES[self.config.model.compute_dtype].itemsize
        master = max(4, item)
        found = []
        if is_first:
            whole = {"weights, gathered": master * count}
            found.append(Moment("start", whole, whole))
        if self.reference is not None and self.reference is not self.policy:
            whole = (item if self.device == "cuda" else master) * count
            sizes = {"weights, sharded": parts["weights, sharded"], "KL reference": whole}
            if not is_first:  # the earlier phase's
                sizes["optimizer"] = parts["optimizer"]
            found.append(Moment("reference copy", sizes, sizes))
        return found

    def moments(self, limit: int | None = None) -> list[Moment]:
        """All moments of a step, in their order; ``limit``: bytes of a GPU, or None."""
        found = []
        is_static = self.config.rollout.engine == "static"
        with self.bytes:
            if self.phase.algorithm != "sft":
                found.append(self._rollout() if is_static else self._hf_rollout(limit))
            batches = self._batches()
            if self.reference is not None:
                found.append(self._reference_pass(batches[0]))
            found.append(self._forward_and_backward(batches))
            self.bytes.restart()
            found.append(self._moment("optimizer"))
            for parameter in self.trainable:
                parameter.grad = None
            if is_static:
                found.append(self._evaluation())
        return found

    def _policy(self, make_model: ModelMaker, dtype: torch.dtype, **options: Any) -> _FakePolicy:
        with self.fake:
            model = make_model()
            if self.config.lora.rank:
                lora.attach(model, self.config.lora, is_planned=True)
            model = _cast(model, dtype)
        model.to = lambda *_, **__: model  # a fake tensor is where it is
        policy = policies.create(model, self.world, **options)
        return _FakePolicy(policy.model, policy.world, policy.head_options, self.fake)

    def sequences(self) -> list[Sequence]:
        """This rank's sequences of one update, all of the given lengths."""
        prompt, completion = self.lengths.prompt, self.lengths.completion
        one = Sequence([0] * prompt, [0] * completion, [0] * completion, [-1.0] * completion, 1.0)
        if self.phase.algorithm == "sft":
            count = -(-self.phase.sequences_per_step // self.world.size)
            return [replace(one, rollout_logprobs=None)] * count
        rollout = self.config.rollout
        count = rollout.prompts_per_step // self.world.size * rollout.group_size
        size = rollout.group_size
        groups = [replace(one, prompt_ids=[i // size] * prompt) for i in range(count)]
        return update_plan(self.config, self.phase).split(groups)[0]

    def _batches(self) -> list[MicroBatch]:
        """The largest micro-batch and, where there are more, another one: accumulation shows."""
        train = self.config.train
        batches = micro_batches(
            self.sequences(),
            self.spec,
            self.policy,
            token_budget=train.token_budget,
            layout=train.layout,
        )
        largest = max(batches, key=lambda b: b.input_ids.numel())
        self.micro_batches = len(batches), largest.input_ids.numel()
        extra = {}
        if self.reference is not None:
            extra["ref_logprobs"] = torch.zeros(largest.labels.shape)
        if update_plan(self.config, self.phase).updates > 1:
            extra["old_logprobs"] = torch.zeros(largest.labels.shape)
        if largest.attention_mask is not None:  # not known to be all True: rows differ in length
            mask = self.fake.from_tensor(largest.attention_mask)
            largest = replace(largest, attention_mask=mask)
        tokens, longest = largest.input_ids.numel(), self.lengths.prompt + self.lengths.completion
        if train.layout == "packed" and tokens > 2 * longest:
            # attention goes through a packed row sequence by sequence: two need as much as many
            positions = torch.arange(tokens) % (tokens - tokens // 2)
            largest = replace(largest, position_ids=positions[None])
        return [largest.with_vectors(**extra)] * min(2, len(batches))

    def _generation(self, name: str, rows: int, group: int, params: SamplingParams) -> Moment:
        """The engine static, with ``rows`` prompts of this rank."""
        share = sampling_bytes(params)

        def sampled(logits: Tensor) -> None:
            with self.fake:
                torch.empty(int(share * logits.numel()), dtype=torch.uint8)

        engine = StaticEngine(self.policy.model, gathered=self.policy.gathered)
        engine.sync(self.policy.model, 0)
        prompts: list[tuple[int, ...]] = [
            (i, *[0] * (self.lengths.prompt - 1 - (i == 0)))  # of two lengths, as they are padded
            for i in range(rows)
            for _ in range(group)
        ]
        self.bytes.restart()
        engine.rehearse(prompts, params.max_tokens, sampled)
        return self._moment(name, activations="rollouts")

    def _rollout(self) -> Moment:
        rollout = self.config.rollout
        params = SamplingParams(
            self.lengths.completion, (0,), rollout.temperature, rollout.top_p, rollout.top_k
        )
        rows = rollout.prompts_per_step // self.world.size
        return self._generation("rollout", rows, rollout.group_size, params)

    def _evaluation(self) -> Moment:
        settings = self.config.eval
        params = SamplingParams(settings.max_tokens or self.lengths.completion, (0,), 0.0)
        return self._generation("evaluation", settings.batch, 1, params)

    def _hf_rollout(self, limit: int | None) -> Moment:
        """The engine hf: gathered weights, its paged cache, and the logits of all rows.

        An estimate: the engine decides more by itself. On a GPU it takes at most 40 % of what is
        free, and requests that do not fit wait.
        """
        rollout, model = self.config.rollout, self.policy.model
        rows = rollout.prompts_per_step // self.world.size * rollout.group_size
        page = HFEngine.default_page_size(self.device)
        pages = -(-(self.lengths.prompt + self.lengths.completion) // page) + 1
        settings = model.config
        heads = getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads
        width = getattr(settings, "head_dim", None)
        width = width or settings.hidden_size // settings.num_attention_heads
        item = DTYPES[self.config.model.compute_dtype].itemsize
        token = 2 * settings.num_hidden_layers * heads * width * item
        cache = (rows * pages + 2) * page * token  # two for padding
        self.bytes.restart()
        with self.policy.gathered():
            held = sum(self.bytes.live.values())
            if self.device == "cuda" and limit is not None:
                cache = min(cache, max(0, int(0.4 * (limit - held))))
            logits = 2 * rows * settings.vocab_size * 4  # fp32, and their probabilities
            self.bytes.hold("rollouts", cache + logits)
            self.bytes.hold("rollouts", -cache - logits)
        return self._moment("rollout", activations="rollouts")

    @contextlib.contextmanager
    def _logits_of_a_gpu(self, batch: MicroBatch) -> Iterator[None]:
        """A GPU keeps products in fp32 beside their bf16 gradient, a CPU one buffer for both.

        The backend triton does so wherever it is planned.
        """
        extra = 0
        is_counted = self.backend == "triton"
        if (
            self.device == "cuda"
            and not is_counted
            and self.config.model.compute_dtype == "bfloat16"
        ):
            vocab_size, dim = self.policy.model.get_output_embeddings().weight.shape
            extra = 4 * vocab_size * min(batch.labels.numel(), max(dim, 1024))
        self.bytes.hold("loss workspace", extra)
        yield
        self.bytes.hold("loss workspace", -extra)

    def _reference_pass(self, batch: MicroBatch) -> Moment:
        assert self.reference is not None, "asked for without a KL term"
        self.bytes.restart()
        with self._logits_of_a_gpu(batch):
            self.reference.with_logprobs(batch, "ref_logprobs", self.spec)
        return self._moment("reference pass")

    def _forward_and_backward(self, batches: list[MicroBatch]) -> Moment:
        self.bytes.restart()
        for i, batch in enumerate(batches):
            distributed.set_gradient_sync(self.policy.model, i == len(batches) - 1)
            with self._logits_of_a_gpu(batch):
                loss, _stats = micro_batch_loss(self.policy, batch, self.spec)
                with self.fake:
                    loss.backward()
        found = self._moment("forward, backward")
        self.bytes.add([p.grad for p in self.trainable], "gradients, sharded")
        return found

    def _moment(self, name: str, activations: str = "activations") -> Moment:
        """What was counted since the last restart; ``activations``: what to call them."""
        parts, most = +self.bytes.at_peak, +self.bytes.most
        if activations != "activations":  # two maxima at two times would add up to too much
            parts[activations] += parts.pop("activations", 0)
            most.pop("activations", 0)
            most[activations] = parts[activations]
        return Moment(name, dict(+parts), dict(+most))


def planned_backend(config: Config, device: str) -> BackendChoice:
    """The loss's backend on ``device``, which need not be of this machine, and why it is that one.

    Raises:
        ConfigError: a backend that is asked for by name cannot run there.
    """
    asked, target = config.train.loss_backend, torch.device(device)
    check_loss_backend(config, target)
    check_scoring(config, target)
    return choose_backend(asked, target, DTYPES[config.model.compute_dtype])


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """``model.to(dtype)``, which does not work on fake tensors; what is tied stays tied."""
    cast: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dtype != dtype:
                if parameter not in cast:
                    cast[parameter] = nn.Parameter(parameter.detach().to(dtype))
                module._parameters[name] = cast[parameter]
    return model


def sampling_bytes(params: SamplingParams) -> float:
    """Bytes that `sample` needs at once beside its logits, per logit: measured on a few."""
    logits = torch.randn(2, 8192)
    with LiveBytes() as counter:
        sample(logits, torch.rand(2), params)
    return counter.peak / logits.numel()
