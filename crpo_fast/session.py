"""Everything a run builds once: rows, tokenizer, policy, engine. Also a phase's KL reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from crpo_fast import distributed, lora, models
from crpo_fast import policy as policies
from crpo_fast.attention import SDPA_PACKED, check_attention
from crpo_fast.batch import SamplingParams
from crpo_fast.block_kernels import with_block_kernels
from crpo_fast.checkpoint_files import whole_folder
from crpo_fast.config import Config, ConfigError
from crpo_fast.distributed import World
from crpo_fast.loss import kernel_options, scoring_options
from crpo_fast.model_check import check_rotations
from crpo_fast.policy import Policy
from crpo_fast.reward_pool import Scorer
from crpo_fast.rollout import Engine
from crpo_fast.rollout.hf import HFEngine
from crpo_fast.rollout.static import StaticEngine
from crpo_fast.task import (
    Rows,
    Task,
    build_grammar,
    build_task,
    check_prompts,
    check_written,
    load_rows,
)
from crpo_fast.timing import timer
from crpo_kernels import explain_choice, unsupported_reason

ENGINES = {"hf": HFEngine, "static": StaticEngine}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Session:
    """Policy and engine, which have state, and what they work on; the optimizer is a phase's."""

    config: Config
    world: World
    task: Task
    policy: Policy
    engine: Engine
    build_model: Callable[[], Any]
    eos_ids: tuple[int, ...]

    def reference(self) -> Policy:
        """A frozen copy of the policy as it is now, in the compute dtype; with LoRA the base."""
        if self.config.lora.rank:
            return policies.BasePolicy(**vars(self.policy))
        dtype = DTYPES[self.config.model.compute_dtype]
        with timer("model"):
            copy = policies.create(
                self.build_model().to(dtype), self.world, compute_dtype=dtype, trainable=False
            )
            policies.copy_weights(self.policy, copy)
        return copy

    def sampling(self) -> SamplingParams:
        """Sampling of rollouts."""
        rollout = self.config.rollout
        return SamplingParams(
            max_tokens=rollout.max_tokens,
            eos_ids=self.eos_ids,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
        )

    def greedy(self) -> SamplingParams:
        """Decoding of evaluations."""
        tokens = self.config.eval.max_tokens or self.config.rollout.max_tokens
        return SamplingParams(max_tokens=tokens, eos_ids=self.eos_ids, temperature=0.0)


def check_ranks(config: Config, ranks: int) -> None:
    """Every rank samples equally many prompts, for each of its minibatches.

    Raises:
        ConfigError: it cannot.
    """
    minibatches = config.train.minibatches or config.train.updates_per_rollout
    unit = ranks * minibatches  # a group belongs to one rank and to one minibatch
    if config.rollout.prompts_per_step % unit:
        raise ConfigError(
            f"rollout.prompts_per_step: expected a multiple of {unit} ({ranks} rank(s) x "
            f"{minibatches} minibatch(es)), got {config.rollout.prompts_per_step}. Type "
            f"--rollout.prompts_per_step {unit * -(-config.rollout.prompts_per_step // unit)}."
        )


def check_loss_backend(config: Config, device: torch.device) -> None:
    """A backend that is asked for by name runs here.

    Raises:
        ConfigError: it cannot.
    """
    backend = config.train.loss_backend
    reason = unsupported_reason(backend, device, DTYPES[config.model.compute_dtype])
    if reason is not None:
        raise ConfigError(
            f"train.loss_backend: expected auto, torch or dense here, got {backend!r}: {reason}. "
            "Type --train.loss_backend auto."
        )


def check_scoring(config: Config, device: torch.device) -> None:
    """The code that ``train.score_kernel`` asks for runs on ``device``, which may be planned only.

    Raises:
        ConfigError: it cannot.
    """
    if config.train.score_kernel != "fused":
        return
    reason = unsupported_reason(
        config.train.loss_backend,
        device,
        DTYPES[config.model.compute_dtype],
        lora_rank=head_rank(config),
        **scoring_options(config),
    )
    if reason is not None:
        raise ConfigError(
            f"train.score_kernel: expected auto or chunks here, got 'fused': {reason}. Type "
            "--train.score_kernel auto."
        )


def check_layout(config: Config, model: Any) -> None:
    """Prompts are shared only where the attention of every layer knows it.

    Raises:
        ConfigError: it does not.
    """
    settings, attention = model.config, model.config._attn_implementation
    if config.train.layout != "shared":
        return
    reason = "" if attention == SDPA_PACKED else f"the attention is {attention}"
    windowed = bool(getattr(settings, "sliding_window", None))
    others = {"sliding_attention"} if windowed else set()
    others = set(getattr(settings, "layer_types", None) or others) - {"full_attention"}
    if others:
        reason = f"the model has layers of {' and '.join(sorted(others))}"
    if reason:
        raise ConfigError(
            f"train.layout: expected packed or padded here, got 'shared': {reason}. Type "
            "--train.layout packed."
        )


def head_rank(config: Config) -> int:
    """Of lm_head's adapter, 0 without one."""
    return config.lora.rank if config.lora.head else 0


def check_workspace(config: Config, model: Any, device: torch.device) -> None:
    """The loss can work within ``train.workspace_mib``.

    Raises:
        ConfigError: it cannot, with what one row needs.
    """
    vocab_size, hidden_size = model.get_output_embeddings().weight.shape
    try:
        explain_choice(
            num_rows=1,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            dtype=DTYPES[config.model.compute_dtype],
            device=device,
            **kernel_options(config),
        )
    except ValueError as error:
        what = str(error).partition(" Pass workspace_bytes")[0]  # advice for Python
        raise ConfigError(
            f"train.workspace_mib: {config.train.workspace_mib} MiB is too little. {what} Leave "
            "--train.workspace_mib out for the default."
        ) from error


def build(config: Config, world: World, run_dir: Path, scorer: Scorer | None = None) -> Session:
    """Load or build everything; files are written by rank 0 alone.

    Args:
        config: of the run.
        world: this process among its peers.
        run_dir: the run folder.
        scorer: calls the reward functions; None: in this process.

    Raises:
        ConfigError, ModelError, DataError: what is wrong and what to type.
    """
    lora.check(config)
    check_ranks(config, world.size)
    check_loss_backend(config, world.device)
    check_scoring(config, world.device)
    with distributed.main_first(world):
        rows = load_rows(config, run_dir, write=world.is_main)
        with timer("tokenizer"):
            plain, tokenizer = _source(config, world, rows, run_dir)
    settings = config.model
    build_model = with_block_kernels(
        plain, settings.block_kernels, world.device.type, settings.compute_dtype
    )
    with timer("model"):
        model = adapted(config, build_model)
        policy = policies.create(
            model,
            world,
            compute_dtype=DTYPES[settings.compute_dtype],
            activation_checkpointing=settings.activation_checkpointing,
            freeze_head=settings.freeze_head,
        )
        check_layout(config, model)
        check_rotations(model.config, config.data.max_prompt_tokens, config.rollout.max_tokens)
        if config.train.layout != "padded":
            policy.check_packing()
    check_workspace(config, model, world.device)
    task = build_task(config, rows, tokenizer, scorer)
    check_prompts(task)
    check_written(task, config.train.token_budget)
    return Session(
        config=config,
        world=world,
        task=task,
        policy=policy,
        engine=ENGINES[config.rollout.engine](policy.model, gathered=policy.gathered),
        build_model=build_model,
        eos_ids=models.eos_ids(model, tokenizer),
    )


def adapted(config: Config, build_model: Callable[[], Any]) -> Any:
    """The initial model, with adapters where the config has them.

    Raises:
        ConfigError: an adapter's target is not there; said before the weights are loaded.
    """
    settings, path = config.lora, config.model.path
    if settings.rank and path:
        lora.check_targets(settings, lora.skeleton(AutoConfig.from_pretrained(path)))
    model = build_model()
    if settings.rank:
        lora.attach(model, settings, path=path, seed=config.seed)
    return model


def _source(
    config: Config, world: World, rows: Rows, run_dir: Path
) -> tuple[Callable[[], Any], Any]:
    """(function that makes the initial model in the master dtype, tokenizer)."""
    settings = config.model
    master = torch.float64 if settings.compute_dtype == "float64" else torch.float32
    check_attention(settings.attention, world.device.type)
    attention, _ = models.choose_attention(
        settings.attention, world.device.type, settings.compute_dtype
    )
    if settings.path:
        models.check_model(settings.path)
        tokenizer = models.load_tokenizer(settings.path)
        return (
            lambda: models.load_model(settings.path, dtype=master, attention=attention)[0]
        ), tokenizer
    folder = run_dir / "tokenizer"
    if not folder.exists():
        with whole_folder(folder) as temporary:
            _train_tokenizer(config, rows).save_pretrained(temporary)
    tokenizer = models.load_tokenizer(folder)

    def make() -> Any:
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        return built_model(config, len(tokenizer), attention, **ids).to(master)

    return make, tokenizer


def built_model(config: Config, vocab_size: int, attention: str, **ids: int | None) -> Any:
    """The fp32 model of ``model.build`` for a vocabulary; ``ids``: eos_token_id, pad_token_id."""
    build = config.model.build
    return models.build_model(
        build.architecture,
        vocab_size=vocab_size,
        hidden_size=build.hidden_size,
        num_layers=build.num_layers,
        num_heads=build.num_heads,
        num_kv_heads=build.num_kv_heads,
        intermediate_size=build.intermediate_size,
        tie_word_embeddings=build.tie_embeddings,
        max_positions=config.data.max_prompt_tokens
        + max(config.rollout.max_tokens, config.eval.max_tokens),
        attention=attention,
        seed=config.seed,
        **ids,
    )


def _train_tokenizer(config: Config, rows: Rows) -> Any:
    grammar = build_grammar(config)
    texts = [f"{r.instruction} {r.text}" for r in rows.train]
    texts += [f"{r.label} {' '.join((r.stages or {}).values())}" for r in rows.cold_start]
    texts += [r.completion for r in rows.cold_start if r.completion]
    tags = list(grammar.tags)
    return models.train_tokenizer(texts, config.model.build.vocab_size, tags)
