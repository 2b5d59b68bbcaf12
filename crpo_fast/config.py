"""The configuration: frozen dataclasses, read from TOML, overridden on the command line.

    torchrun crpo_fast/train.py [config.toml] [--section.key value ...]

Unknown keys and wrong types are refused with the file, the key and the nearest valid name; checks
that span sections run before any model is loaded. The resolved config is saved in the run folder.

config.py holds the options, config_file.py reads TOML, config_checks.py refuses what cannot run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from crpo_fast.config_checks import check
from crpo_fast.config_file import ConfigError as ConfigError
from crpo_fast.config_file import read

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = REPOSITORY / "configs" / "quickstart.toml"


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives. ``resume``: auto | never | best | a checkpoint folder."""

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
    """``path``: a transformers folder, or "smollm2" (a small model from pip), or "" to build one.

    ``compute_dtype`` is the dtype of activations; master weights are always fp32 (fp64 for
    "float64").
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
    cold_start: int = 1000
    bias: float = 0.62
    conflict: float = 0.5


@dataclass(frozen=True)
class DataConfig:
    """``format``: table (JSONL or CSV) | official (``root`` has a folder per data set) | synthetic.

    "auto" is table when ``path`` is set, official when ``root`` is set, else synthetic. For tables:
    ``path`` (train), ``test_path``, and the columns ``prompt``, ``answer``, ``completion``.
    """

    format: str = "auto"
    root: str = ""
    datasets: tuple[str, ...] = ()  # empty: all of the root
    path: str = ""
    test_path: str = ""
    cold_start_path: str = ""
    prompt: str = "prompt"
    answer: str = "answer"
    completion: str = ""
    system: str = ""  # replaces the grammar's system prompt; "none" leaves it out
    max_prompt_tokens: int = 512
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    @property
    def kind(self) -> str:
        """``format`` with "auto" resolved."""
        if self.format != "auto":
            return self.format
        return "table" if self.path else "official" if self.root else "synthetic"


@dataclass(frozen=True)
class StageConfig:
    """One ``[[stages]]`` table; ``coef`` replaces what ``entropy.schedule`` gives the stage."""

    name: str
    tag: str = ""
    instruction: str = ""
    coef: float | None = None


@dataclass(frozen=True)
class GrammarConfig:
    """``preset``: mental_r1 | cognition_chain | ... | none; ``[[stages]]`` replace its stages.

    ``answer_tag`` "" (with preset none): the whole completion is the answer.
    """

    preset: str = "mental_r1"
    answer_tag: str = "answer"


@dataclass(frozen=True)
class EntropyConfig:
    """Stage entropy: coefficients, reduction, controller and alarm (units: nats, tokens).

    ``controller``: fixed | dual (controller.py). ``anneal``: none | linear | cosine, from 1 to
    ``anneal_to`` over a phase; it scales the coefficients of "fixed" and the targets of "dual".
    ``targets``: one per stage; empty: ``target_fraction`` (one number or one per stage) of a
    stage's entropy in the first step. ``dual_bound`` of every coefficient: None is ``magnitude``.
    """

    schedule: str = "tanh"
    magnitude: float = 0.06
    tau: float | None = None
    reduction: str = "sequence_mean"
    reference_length: int | None = None
    anneal: str = "none"
    anneal_to: float = 0.0
    controller: str = "fixed"
    targets: tuple[float, ...] = ()
    target_fraction: float | tuple[float, ...] = 1.0
    target_floor: float = 0.02
    dual_bound: float | None = None
    dual_proportional: float = 4.0
    dual_integral: float = 0.2
    alarm_warn_factor: float = 3.0
    alarm_stop_factor: float = 10.0
    alarm_floor: float = 0.2
    alarm: bool = True


@dataclass(frozen=True)
class RewardsConfig:
    """Reward functions as ``module:function``, their weights, and how answers are matched.

    They run in ``workers`` processes per rank (None: up to 4, as cores allow; 0: in the trainer,
    for debugging: nothing then ends a function that hangs). A call gets the samples of one prompt
    and may take ``timeout`` seconds for each; ``start_timeout``: seconds for importing the
    functions. A run stops when more than ``max_error_rate`` of a step's samples have no reward.
    """

    functions: tuple[str, ...] = (
        "crpo_fast.rewards:format_reward",
        "crpo_fast.rewards:answer_reward",
    )
    weights: tuple[float, ...] = ()
    match: str = "prefix"
    balance: str = "reward"  # reward (paper) | advantage | none
    workers: int | None = None
    timeout: float = 10.0
    start_timeout: float = 300.0
    max_error_rate: float = 0.05


@dataclass(frozen=True)
class AdvantagesConfig:
    """``scale``: group_std (paper) | batch_std | none."""

    scale: str = "group_std"


@dataclass(frozen=True)
class ObjectiveConfig:
    """Overrides of the algorithm's preset (ObjectiveSpec of the kernels); None keeps its value.

    ``rho_mode``: truncate (at most ``rho_cap``) | mask (0 outside ``rho_floor`` .. ``rho_cap``).
    """

    clip_low: float | None = None
    clip_high: float | None = None
    kl_coef: float | None = None
    kl_estimator: str | None = None
    rho_mode: str | None = None
    rho_cap: float | None = None
    rho_floor: float | None = None
    aggregation: str | None = None
    bnpo_group: int = 4  # samples per group of the bnpo mean: the paper's device batch


@dataclass(frozen=True)
class RolloutConfig:
    """One rollout: ``prompts_per_step`` prompts (all ranks together) x ``group_size`` samples.

    ``mask_truncated``: a completion that met ``max_tokens`` keeps its reward and its place in its
    group and in every denominator, but none of its tokens is in the loss.
    ``dynamic_sampling``: groups without reward variance are replaced by further prompts, in at most
    ``max_resamples`` further rounds; then the step trains on fewer groups.
    """

    engine: str = "hf"
    prompts_per_step: int = 16
    group_size: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 128
    mask_truncated: bool = False
    dynamic_sampling: bool = False
    max_resamples: int = 3
    max_mismatch: float = 0.1  # nats; mean |train - rollout logprob| of the first batch of a start


@dataclass(frozen=True)
class TrainConfig:
    """``max_steps`` caps each phase (0: no cap); ``token_budget``: most tokens of a micro-batch.

    ``updates_per_rollout``: optimizer updates of one step of the loop, each on one of the
    ``minibatches`` (0: as many as updates) into which the groups of the rollout are split.
    ``max_nonfinite``: skipped updates in a row (loss or gradient not finite) that end the run.
    ``timeout``: seconds that a rank waits for the others in a collective before the run ends.
    """

    max_steps: int = 0
    token_budget: int = 4096
    layout: str = "packed"  # packed (one row, no padding) | padded (one sequence a row)
    workspace_mib: int | None = None
    loss_backend: str = "auto"
    threads: int = 0  # 0: all cores divided by the ranks of this machine
    updates_per_rollout: int = 1
    minibatches: int = 0
    max_nonfinite: int = 3
    timeout: float = 1800.0


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
class ReportConfig:
    """What samples.jsonl records for the trace viewer of report.html (0: nothing).

    ``trace_samples`` rollouts every ``trace_every`` steps, ``probe_prompts`` fixed test rows
    answered greedily every ``probe_every`` steps; later in a long run less often (`traces`).
    """

    trace_every: int = 5
    trace_samples: int = 4
    probe_every: int = 10
    probe_prompts: int = 4


@dataclass(frozen=True)
class CheckpointConfig:
    """``every`` n steps (0: only at the end of a phase and on SIGTERM); the last ``keep`` stay.

    ``best``: which one is kept besides: weighted_f1 (of an evaluation during training) | reward
    (mean since the checkpoint before) | none | auto (weighted_f1 with ``eval.every``, else reward).
    """

    every: int = 50
    keep: int = 2
    best: str = "auto"


@dataclass(frozen=True)
class TrackConfig:
    """Where metrics also go: ``to`` some of tensorboard, wandb, trackio. Numbers only.

    ``name``: of the run there; empty: a made-up one. ``wandb_mode``: offline | online.
    """

    to: tuple[str, ...] = ()
    project: str = "crpo-fast"
    name: str = ""
    wandb_mode: str = "offline"


@dataclass(frozen=True)
class PhaseConfig:
    """One ``[[phases]]`` table: ``algorithm`` for ``steps`` steps of the loop, a rollout each."""

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
    quiet: bool = False  # only warnings, errors and the closing lines
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
    report: ReportConfig = field(default_factory=ReportConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    phases: tuple[PhaseConfig, ...] = (PhaseConfig(),)


def load_config(path: str | Path) -> Config:
    """Read a TOML file; ConfigError names the file, the key and the nearest valid name."""
    return read(Config, Path(path))


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


def to_dict(config: Config) -> dict[str, Any]:
    """Plain dict; None values are left out, as TOML has no null."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if v is not None}
        return [strip(v) for v in value] if isinstance(value, list | tuple) else value

    return strip(dataclasses.asdict(config))
