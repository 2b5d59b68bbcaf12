"""The first screen of a run: what is trained, on what, by which code, and why that code."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch

from crpo_fast import models
from crpo_fast.block_kernels import choose_block_kernels
from crpo_fast.config import Config, PhaseConfig
from crpo_fast.distributed import num_cores
from crpo_fast.loss import kernel_options, loss_spec, scoring_options
from crpo_fast.run_folder import Resume, RunFolder, phase_lengths
from crpo_fast.session import head_rank
from crpo_kernels import explain_choice

if TYPE_CHECKING:
    from crpo_fast.session import Session

Row = tuple[str, str]
_ENGINES = {
    "static": "one padded batch, fast on a CPU",
    "hf": "continuous batching, for GPUs with flash attention",
}
_STAGE_TOKENS = 80  # the length of stage that the paper's magnitude suits


def title() -> str:
    """Versions."""
    found = [f"{name} {_version(name)}" for name in ("crpo-fast", "torch", "transformers")]
    return f"{', '.join(found)}, Python {platform.python_version()}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # a checkout on PYTHONPATH
        return "(not installed)"


def rows(session: Session, folder: RunFolder, resume: Resume) -> list[Row]:
    """Labels and values, in the order in which they are read."""
    config, world = session.config, session.world
    settings = config.model
    attention, why = models.choose_attention(
        settings.attention, world.device.type, settings.compute_dtype, session.policy.model.config
    )
    kernels, because = choose_block_kernels(
        settings.block_kernels,
        world.device.type,
        settings.compute_dtype,
        session.policy.model.config,
    )
    choice, passes = _loss_choice(session)
    found = [
        ("run", f"{folder.path}, seed {config.seed}, {_where_it_stands(resume)}"),
        ("model", _model(session)),
        ("parameters", _parameters(session)),
        ("ranks", _ranks(session)),
        ("dtype", _dtype(session)),
        ("attention", f"{attention}: {why}"),
        ("blocks", f"{'Liger kernels' if kernels == 'liger' else 'plain'}: {because}"),
        ("loss", f"{choice}; {passes}"),
        ("scoring", _scoring(session)),
        ("rollouts", _rollouts(config)),
        ("data", _data(session)),
        ("phases", ", then ".join(_phases(config))),
    ]
    found += [("entropy", text)] if (text := _entropy(session)) else []
    found += [("tracking", text)] if (text := _tracking(config)) else []
    return found


def warnings(session: Session) -> list[str]:
    """What runs, but hardly as it was meant."""
    config, world, found = session.config, session.world, []
    on_cpu = world.device.type == "cpu"
    trains_by_reward = any(p.algorithm != "sft" for p in config.phases)
    if on_cpu and config.rollout.engine == "hf" and trains_by_reward:
        found.append(
            "rollout.engine hf is several times slower than static on a CPU. "
            "Type --rollout.engine static."
        )
    threads = torch.get_num_threads() * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if on_cpu and threads > (cores := num_cores()):
        found.append(f"{threads} threads on {cores} cores. Type --train.threads 0.")
    entropy, stages = config.entropy, session.task.grammar.num_stages
    pushes = any(p.algorithm == "crpo" for p in config.phases) and entropy.magnitude > 0
    plain = entropy.controller == "fixed" and entropy.reference_length is None
    if pushes and plain and stages and config.rollout.max_tokens < stages * _STAGE_TOKENS / 2:
        found.append(
            f"entropy.magnitude {entropy.magnitude:g} is for stages of about {_STAGE_TOKENS} "
            f"tokens, rollout.max_tokens leaves {config.rollout.max_tokens // stages} to each of "
            f"{stages}. Type --entropy.reference_length {_STAGE_TOKENS} or --entropy.controller "
            "dual."
        )
    return found


def _where_it_stands(resume: Resume) -> str:
    if resume.path is None:
        return "from the start"
    return f"goes on after step {resume.progress.step} ({resume.path.name})"


def _model(session: Session) -> str:
    config, model = session.config.model, session.policy.model
    text = model.config.get_text_config()
    tied = "tied" if text.tie_word_embeddings else "own"
    source = config.path or "built here"
    layers = f"{(n := text.num_hidden_layers)} layer{'s' * (n > 1)}"
    return (
        f"{source}: {text.model_type}, {layers}, hidden "
        f"{text.hidden_size}, vocabulary {text.vocab_size:,}, {tied} head"
    )


def _parameters(session: Session) -> str:
    sizes = [(p.numel(), p.element_size(), p.requires_grad) for p in _all(session)]
    count, trained = (sum(n for n, _, t in sizes if t or not only) for only in (False, True))
    share = "all trained" if trained == count else f"{_rounded(trained)} trained"
    held = sum(n * item * (4 if t else 1) for n, item, t in sizes) / session.world.size
    lora = session.config.lora
    if lora.rank:
        where = ", ".join([*(lora.targets or ("the blocks",)), *["lm_head"] * lora.head])
        share += f" (LoRA of rank {lora.rank} on {where})"
    return f"{_rounded(count)}, {share}; {held / 2**20:,.1f} MiB a rank with gradients and AdamW"


def _all(session: Session) -> list[torch.nn.Parameter]:
    return list(session.policy.model.parameters())


def _rounded(count: int) -> str:
    if count < 1e5:
        return f"{count / 1e3:.1f} K"
    return f"{count / 1e6:,.2f} M" if count < 1e8 else f"{count / 1e6:,.0f} M"


def _ranks(session: Session) -> str:
    world = session.world
    if world.device.type == "cuda":
        return f"{world.size} on {torch.cuda.get_device_name(world.device)}"
    return f"{world.size} on {world.device.type}, {torch.get_num_threads()} thread(s) each"


def _dtype(session: Session) -> str:
    settings = session.config.model
    asked = _asked("model.compute_dtype", settings.compute_dtype, type(settings)().compute_dtype)
    master = str(next(iter(_all(session))).dtype).removeprefix("torch.")
    return f"{settings.compute_dtype} compute ({asked}), {master} masters"


def _asked(key: str, value: str, default: str) -> str:
    return "the default" if value == default else f"by {key}"


def _loss_choice(session: Session) -> tuple[str, str]:
    """As the kernels choose for the last phase: a full micro-batch of the longest completions."""
    config, model = session.config, session.policy.model
    phase = config.phases[-1]
    spec = loss_spec(config, phase, session.task.grammar.coefs())
    head = model.get_output_embeddings()
    updates = 1 if phase.algorithm == "sft" else config.train.updates_per_rollout
    budget, longest = config.train.token_budget, config.rollout.max_tokens
    return explain_choice(
        num_rows=budget,
        sequence_lengths=[*[longest] * (budget // longest), budget % longest],
        vocab_size=head.weight.shape[0],
        hidden_size=head.weight.shape[1],
        dtype=getattr(torch, config.model.compute_dtype),
        device=session.world.device,
        spec=spec.objective,
        is_on_policy=updates == 1,
        lora_rank=head_rank(config),
        **dict(spec.options),
    )


def _scoring(session: Session) -> str:
    """Who makes reference and old logprobs and the probes', which need no gradients, and why."""
    config = session.config
    weight = session.policy.model.get_output_embeddings().weight
    choice, _ = explain_choice(
        num_rows=config.train.token_budget,
        vocab_size=weight.shape[0],
        hidden_size=weight.shape[1],
        dtype=getattr(torch, config.model.compute_dtype),
        device=session.world.device,
        is_scoring=True,
        lora_rank=head_rank(config),
        **kernel_options(config),
        **scoring_options(config),
    )
    head = "" if config.train.score_head == "full" else f"; head in {config.train.score_head}"
    text = choice.partition("), scoring ")[2]  # the backend is that of the loss
    return f"{text.partition('; lora_head')[0]}{head}"  # its cost stands there, too


def _rollouts(config: Config) -> str:
    rollout = config.rollout
    asked = _asked("rollout.engine", rollout.engine, type(rollout)().engine)
    if all(p.algorithm == "sft" for p in config.phases):
        return f"{rollout.engine} ({asked}), for evaluations alone"
    return (
        f"{rollout.engine} ({asked}): {_ENGINES[rollout.engine]}; {rollout.prompts_per_step} "
        f"prompts x {rollout.group_size} samples of up to {rollout.max_tokens} tokens, "
        f"temperature {rollout.temperature:g}"
    )


def _data(session: Session) -> str:
    config, data = session.config, session.task.rows
    cold = f", {len(data.cold_start):,} cold-start" if data.cold_start else ""
    return (
        f"{config.data.kind}: {len(data.train):,} train rows{cold}; {len(data.test):,} "
        f"{config.eval.split} rows in {len(data.label_sets())} data set(s)"
    )


def _phases(config: Config) -> list[str]:
    def one(phase: PhaseConfig, length: int) -> str:
        more = config.train.updates_per_rollout
        updates = f" of {more} updates" if more > 1 and phase.algorithm != "sft" else ""
        return f"{phase.algorithm} {length} steps{updates}"

    return [one(p, n) for p, n in zip(config.phases, phase_lengths(config), strict=True)]


def _entropy(session: Session) -> str:
    entropy, names = session.config.entropy, session.task.grammar.names
    if not names or all(p.algorithm != "crpo" for p in session.config.phases):
        return ""
    how = f"{entropy.schedule}, M {entropy.magnitude:g}"
    if entropy.controller != "fixed":
        how = f"{entropy.controller} controller"
    elif entropy.reference_length is not None:
        how += f", scaled to stages of {entropy.reference_length} tokens"
    return f"{how}; stages {', '.join(names)}"


def _tracking(config: Config) -> str:
    modes = {"wandb": f"wandb ({config.track.wandb_mode})"}
    return ", ".join(modes.get(name, name) for name in config.track.to)
