"""The configuration: frozen dataclasses, read from TOML, overridden on the command line.

    torchrun crpo_fast/train.py [config.toml] [--section.key value ...]

Unknown keys and wrong types are refused with the file, the key and the nearest valid name; checks that
span sections run before any model is loaded. The resolved config is saved in the run folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = REPOSITORY / "configs" / "quickstart.toml"
ALGORITHMS = ("sft", "crpo", "grpo", "bnpo", "dapo", "dr_grpo", "gspo", "cispo")
AGGREGATIONS = ("token_mean", "sequence_mean", "constant", "bnpo")


class ConfigError(ValueError):
    """The configuration cannot be run; the message says what to type."""


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives. ``resume``: auto | never | a checkpoint folder."""

    dir: str = "runs/default"
    resume: str = "auto"


@dataclass(frozen=True)
class BuildConfig:
    """The decoder that is built when ``model.path`` is empty."""

    architecture: str = "llama"
    hidden_size: int = 128
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 4
    intermediate_size: int = 384
    vocab_size: int = 1024  # upper bound for the tokenizer that is trained on the data
    tie_embeddings: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """``path``: a transformers folder, or "smollm2" for the small model that pip can fetch, or empty to build one.

    ``compute_dtype`` is the dtype of activations; master weights are always fp32 (fp64 for "float64").
    """

    path: str = ""
    build: BuildConfig = field(default_factory=BuildConfig)
    compute_dtype: str = "bfloat16"
    attention: str = "auto"
    activation_checkpointing: bool = False
    freeze_head: bool = False


@dataclass(frozen=True)
class SyntheticConfig:
    """Sizes per data set and the bias of the cold start's annotator (docs/data.md)."""

    train: int = 200
    val: int = 10
    test: int = 40
    cold_start: int = 250
    bias: float = 0.62


@dataclass(frozen=True)
class DataConfig:
    """``format``: synthetic | official (a ``root`` with one folder per data set) | table (JSONL or CSV files).

    For tables: ``path`` (train), ``test_path``, and the columns ``prompt``, ``answer``, ``completion``.
    """

    format: str = "synthetic"
    root: str = ""
    datasets: tuple[str, ...] = ()
    path: str = ""
    test_path: str = ""
    cold_start_path: str = ""
    prompt: str = "prompt"
    answer: str = "answer"
    completion: str = ""
    labels: tuple[str, ...] = ()
    system: str = ""  # replaces the grammar's system prompt; "none" leaves it out
    max_prompt_tokens: int = 512
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)


@dataclass(frozen=True)
class StageConfig:
    """One ``[[stages]]`` table; ``coef`` only with ``entropy.schedule = "explicit"`` or to override it."""

    name: str
    tag: str = ""
    instruction: str = ""
    coef: float | None = None


@dataclass(frozen=True)
class GrammarConfig:
    """``preset``: mental_r1 | cognition_chain | ... | none; ``[[stages]]`` tables replace its stages.

    ``answer_tag`` "" (with preset none): the whole completion is the answer.
    """

    preset: str = "mental_r1"
    answer_tag: str = "answer"


@dataclass(frozen=True)
class EntropyConfig:
    """Stage entropy: coefficients, reduction and the alarm (units: nats, tokens)."""

    schedule: str = "tanh"
    magnitude: float = 0.06
    tau: float | None = None
    reduction: str = "sequence_mean"
    reference_length: int | None = None
    alarm_warn_factor: float = 3.0
    alarm_stop_factor: float = 10.0
    alarm_floor: float = 0.2
    alarm: bool = True


@dataclass(frozen=True)
class RewardsConfig:
    """Reward functions as ``module:function``, their weights, and how answers are matched."""

    functions: tuple[str, ...] = (
        "crpo_fast.rewards:format_reward",
        "crpo_fast.rewards:answer_reward",
    )
    weights: tuple[float, ...] = ()
    match: str = "prefix"
    balance: str = "reward"  # reward (paper) | advantage | none


@dataclass(frozen=True)
class AdvantagesConfig:
    """``scale``: group_std (paper) | batch_std | none."""

    scale: str = "group_std"


@dataclass(frozen=True)
class ObjectiveConfig:
    """Overrides of the algorithm's preset; None keeps the preset's value (kernels: ObjectiveSpec)."""

    clip_low: float | None = None
    clip_high: float | None = None
    kl_coef: float | None = None
    kl_estimator: str | None = None
    rho_mode: str | None = None
    rho_cap: float | None = None
    aggregation: str | None = None
    bnpo_group: int = 4  # samples per group of the bnpo mean: the paper's device batch


@dataclass(frozen=True)
class RolloutConfig:
    """One rollout: ``prompts_per_step`` prompts (all ranks together) x ``group_size`` samples."""

    engine: str = "hf"
    prompts_per_step: int = 16
    group_size: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 128
    max_mismatch: float = 0.1  # nats; mean |train - rollout logprob| of the first batch after a start


@dataclass(frozen=True)
class TrainConfig:
    """``max_steps`` caps each phase (0: no cap); ``token_budget`` bounds the tokens of one micro-batch."""

    max_steps: int = 0
    token_budget: int = 4096
    layout: str = "packed"  # packed (one row, no padding) | padded (one sequence a row)
    workspace_mib: int | None = None
    loss_backend: str = "auto"
    threads: int = 0  # 0: all cores divided by the ranks of this machine


@dataclass(frozen=True)
class OptimConfig:
    """AdamW. ``lr`` and ``warmup_steps`` may be set per phase."""

    lr: float = 5e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    schedule: str = "linear"  # linear (to 0 over the phase) | cosine | constant


@dataclass(frozen=True)
class EvalConfig:
    """Greedy evaluation. ``limit``: test rows per data set, a fixed stratified sample (0: all)."""

    split: str = "test"
    every: int = 0
    limit: int = 0
    full: bool = False
    untrained: bool = False
    batch: int = 64
    max_tokens: int = 0  # 0: rollout.max_tokens


@dataclass(frozen=True)
class CheckpointConfig:
    """``every`` n steps (0: only at the end of a phase and on SIGTERM); the last ``keep`` stay."""

    every: int = 50
    keep: int = 2


@dataclass(frozen=True)
class PhaseConfig:
    """One ``[[phases]]`` table: ``algorithm`` for ``steps`` optimizer steps."""

    algorithm: str = "crpo"
    steps: int = 100
    lr: float | None = None
    warmup_steps: int | None = None
    schedule: str | None = None
    sequences_per_step: int = 64  # sft only


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    seed: int = 0
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    grammar: GrammarConfig = field(default_factory=GrammarConfig)
    stages: tuple[StageConfig, ...] = ()
    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    advantages: AdvantagesConfig = field(default_factory=AdvantagesConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    phases: tuple[PhaseConfig, ...] = (PhaseConfig(),)


# ---------------------------------------------------------------------------------------------- reading


def load_config(path: str | Path) -> Config:
    """Read a TOML file; ConfigError names the file, the key and the nearest valid name."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config: expected a TOML file, got {str(path)!r}, which does not exist.")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}.") from error
    return _build(Config, data, where=str(path), prefix="")


def parse_arguments(arguments: Sequence[str]) -> Config:
    """``[config.toml] [--section.key value ...]`` -> checked Config."""
    rest = list(arguments)
    path: str | Path = DEFAULT_CONFIG
    if rest and not rest[0].startswith("-"):
        path = rest.pop(0)
    config = tyro.cli(
        Config,
        args=rest,
        default=load_config(path),
        prog="torchrun crpo_fast/train.py [config.toml]",
        config=(tyro.conf.AvoidSubcommands,),
    )
    check(config)
    return config


def _build(cls: Any, data: dict[str, Any], *, where: str, prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5) or sorted(hints)
            hint = f"Did you mean {prefix}{near[0]}?" if len(near) == 1 else f"Valid: {', '.join(near)}."
            raise ConfigError(f"{where}: unknown key {prefix}{key}. {hint}")
    values = {
        key: _convert(hints[key], value, where=where, name=f"{prefix}{key}")
        for key, value in data.items()
    }
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: {prefix}{missing[0]} is missing. Add {missing[0]} = ... to the table.")
    return cls(**values)


def _convert(hint: Any, value: Any, *, where: str, name: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _convert(args[0], value, where=where, name=name)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return _build(hint, value, where=where, prefix=f"{name}.")
    elif origin is tuple:
        if isinstance(value, list) and (args[-1] is Ellipsis or len(value) == len(args)):
            return tuple(
                _convert(args[0], item, where=where, name=f"{name}[{i}]") for i, item in enumerate(value)
            )
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif type(value) is hint:
        return value
    kind = {tuple: "a list"}.get(origin) or ("a table" if dataclasses.is_dataclass(hint) else hint.__name__)
    raise ConfigError(f"{where}: {name}: expected {kind}, got {value!r} ({type(value).__name__}).")


def to_dict(config: Config) -> dict[str, Any]:
    """Plain dict; None values are left out, as TOML has no null."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if v is not None}
        return [strip(v) for v in value] if isinstance(value, list | tuple) else value

    return strip(dataclasses.asdict(config))


# ---------------------------------------------------------------------------------------------- checks


def check(config: Config) -> None:
    """Cross-field checks; needs neither model nor data."""
    _choice("model.compute_dtype", config.model.compute_dtype, ("bfloat16", "float32", "float64"))
    _choice("data.format", config.data.format, ("synthetic", "official", "table"))
    _choice("train.layout", config.train.layout, ("packed", "padded"))
    _choice("optim.schedule", config.optim.schedule, ("linear", "cosine", "constant"))
    _choice("eval.split", config.eval.split, ("val", "test"))
    _choice("rewards.balance", config.rewards.balance, ("reward", "advantage", "none"))
    _choice("rewards.match", config.rewards.match, ("prefix", "exact"))
    _choice("advantages.scale", config.advantages.scale, ("group_std", "batch_std", "none"))
    _choice("entropy.schedule", config.entropy.schedule, ("tanh", "linear", "cosine", "step", "explicit"))
    _choice("entropy.reduction", config.entropy.reduction, ("sequence_mean", "token_mean", "present_only"))
    _choice("rollout.engine", config.rollout.engine, ("hf", "static"))
    if config.objective.aggregation is not None:
        _choice("objective.aggregation", config.objective.aggregation, AGGREGATIONS)
    _check_data(config)
    _check_rollout(config)
    _check_phases(config)
    weights, functions = config.rewards.weights, config.rewards.functions
    if weights and len(weights) != len(functions):
        raise ConfigError(
            f"rewards.weights: expected {len(functions)} numbers, one per function, got {len(weights)}."
        )


def _choice(name: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        near = difflib.get_close_matches(value, valid, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name}: expected one of {', '.join(valid)}, got {value!r}.{hint}")


def _positive(**values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ConfigError(f"{name.replace('__', '.')}: expected a positive number, got {value}.")


def _check_data(config: Config) -> None:
    data = config.data
    if data.format == "official" and not data.root:
        raise ConfigError("data.root: expected a folder, got ''. Type --data.root <folder>.")
    if data.format == "table" and not data.path:
        raise ConfigError("data.path: expected a JSONL or CSV file, got ''. Type --data.path <file>.")
    if data.format == "table" and any(p.algorithm == "sft" for p in config.phases) and not data.completion:
        raise ConfigError(
            "data.completion: an sft phase needs the column of written completions, got ''. "
            "Type --data.completion <column>, or remove the sft phase."
        )
    _positive(data__max_prompt_tokens=data.max_prompt_tokens)


def _check_rollout(config: Config) -> None:
    rollout, train = config.rollout, config.train
    if rollout.group_size < 2:
        raise ConfigError(
            f"rollout.group_size: expected at least 2, got {rollout.group_size}. Advantages compare the "
            "samples of one prompt; type --rollout.group_size 4."
        )
    if rollout.temperature <= 0:
        raise ConfigError(
            f"rollout.temperature: expected a number above 0, got {rollout.temperature}. Greedy samples of "
            "one prompt are all equal and teach nothing; type --rollout.temperature 0.85."
        )
    if not 0 < rollout.top_p <= 1:
        raise ConfigError(f"rollout.top_p: expected a number in (0, 1], got {rollout.top_p}.")
    if config.objective.rho_mode and (rollout.top_p < 1 or rollout.top_k > 0):
        raise ConfigError(
            "objective.rho_mode: the correction needs untruncated sampling, got "
            f"top_p {rollout.top_p}, top_k {rollout.top_k}. Type --rollout.top_p 1 --rollout.top_k 0."
        )
    _positive(
        rollout__prompts_per_step=rollout.prompts_per_step,
        rollout__max_tokens=rollout.max_tokens,
        train__token_budget=train.token_budget,
        optim__max_grad_norm=config.optim.max_grad_norm,
    )
    longest = config.data.max_prompt_tokens + rollout.max_tokens
    if train.token_budget < longest:
        raise ConfigError(
            f"train.token_budget: expected at least one sequence, {longest} tokens (data.max_prompt_tokens "
            f"+ rollout.max_tokens), got {train.token_budget}. Type --train.token_budget {longest}."
        )


def _check_phases(config: Config) -> None:
    if not config.phases:
        raise ConfigError("phases: expected at least one [[phases]] table, got none.")
    for i, phase in enumerate(config.phases):
        _choice(f"phases[{i}].algorithm", phase.algorithm, ALGORITHMS)
        _positive(**{f"phases[{i}]__steps": phase.steps})
    if config.train.max_steps < 0:
        raise ConfigError(f"train.max_steps: expected 0 (no cap) or more, got {config.train.max_steps}.")
