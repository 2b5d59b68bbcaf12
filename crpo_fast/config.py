"""The configuration: frozen dataclasses, read from TOML, overridden on the command line.

    torchrun crpo_fast/train.py [config.toml] [--section.key value ...]

Unknown keys and wrong types are refused with the file, the key and the nearest valid name; checks
that span sections run before any model is loaded. The resolved config is saved in the run folder.
A key's comment is its line in --help and in docs/config.md (config_reference.py).

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
    """Where the run lives, and what it continues."""

    dir: str = "runs/default"  # run folder; it is made, and a run that is there is continued
    resume: str = "auto"  # auto (continue) | never (move aside) | best | a checkpoint folder


@dataclass(frozen=True)
class BuildConfig:
    """The decoder that is built when ``model.path`` is empty."""

    architecture: str = "llama"  # llama | qwen3
    hidden_size: int = 128  # a multiple of num_heads
    num_layers: int = 3  # decoder layers
    num_heads: int = 4  # attention heads
    num_kv_heads: int = 4  # a divisor of num_heads
    intermediate_size: int = 384  # width of the MLP
    vocab_size: int = 1024  # upper bound for the tokenizer that is trained on the data
    tie_embeddings: bool = True  # lm_head and embedding are one matrix


@dataclass(frozen=True)
class ModelConfig:
    """The policy. Master weights are always fp32 (fp64 for ``compute_dtype`` "float64")."""

    path: str = ""  # a transformers folder | smollm2 (a small model from pip) | empty: build one
    build: BuildConfig = field(default_factory=BuildConfig)
    compute_dtype: str = "bfloat16"  # bfloat16 | float32 | float64, of activations
    attention: str = "auto"  # auto (flash, else sdpa_packed) | a name of transformers
    block_kernels: str = "auto"  # auto (Liger's on a GPU, where compared) | liger | none
    activation_checkpointing: bool = False  # less memory, one more forward pass
    freeze_head: bool = False  # train neither lm_head nor an embedding tied to it


@dataclass(frozen=True)
class LoraConfig:
    """LoRA through peft (docs/integrations.md): with a rank, adapters alone are trained.

    The model without them is the KL reference, checkpoints hold them alone, and final/ has them
    merged.
    """

    rank: int = 0  # r of every adapter; 0: no LoRA, the whole model is trained
    alpha: float = 32.0  # updates are scaled by alpha / rank, > 0
    dropout: float = 0.0  # of the adapters' input in training, in [0, 1)
    targets: tuple[str, ...] = ()  # Linears of the blocks (q_proj, ...); empty: all of them
    head: bool = False  # an adapter on lm_head, too; a tied one is untied in final/


@dataclass(frozen=True)
class SyntheticConfig:
    """The made-up corpus: rows per data set, and the annotator's bias (docs/data.md)."""

    train: int = 200  # rows per data set
    val: int = 10  # rows per data set
    test: int = 40  # rows per data set
    cold_start: int = 1000  # rows per data set with a written rationale
    bias: float = 0.62  # share of mentioned help that the rationales overlook, 0 .. 1
    conflict: float = 0.5  # share of posts with one cue told as a conflict, 0 .. 1


@dataclass(frozen=True)
class DataConfig:
    """Rows. Format "auto" is table when ``path`` is set, official when ``root`` is, else synthetic.

    All further columns of a table reach the reward functions by name.
    """

    format: str = "auto"  # auto | table (JSONL, CSV, Parquet) | official | synthetic
    root: str = ""  # official: the folder that has a folder per data set
    datasets: tuple[str, ...] = ()  # official, synthetic: names; empty: all of the root
    path: str = ""  # table: the training rows
    test_path: str = ""  # table: the rows of evaluations; empty: path
    cold_start_path: str = ""  # table: the rows of sft phases; empty: path
    prompt: str = "prompt"  # table: column of the prompt
    answer: str = "answer"  # table: column of the gold answer; rewards get it as `answer`
    completion: str = ""  # table: column of written completions, for sft phases
    system: str = ""  # replaces the grammar's system prompt; none leaves it out
    max_prompt_tokens: int = 512  # tokens; the post is shortened at its end to fit
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    @property
    def kind(self) -> str:
        """``format`` with "auto" resolved."""
        if self.format != "auto":
            return self.format
        return "table" if self.path else "official" if self.root else "synthetic"


@dataclass(frozen=True)
class StageConfig:
    """One ``[[stages]]`` table; such tables replace the stages of ``grammar.preset``."""

    name: str  # in metrics and tables
    tag: str = ""  # between < and >; empty: the name
    instruction: str = ""  # what the system prompt asks for
    coef: float | None = None  # entropy coefficient: > 0 penalty, < 0 bonus; None: the schedule's


@dataclass(frozen=True)
class GrammarConfig:
    """What a completion is made of.

    Presets: mental_r1 | cognition_chain | lazarus_reappraisal | scherer_cpm | cocot | none.
    """

    preset: str = "mental_r1"  # a named list of stages, or none (above)
    answer_tag: str = "answer"  # tag of the answer; empty (preset none): the whole completion


@dataclass(frozen=True)
class EntropyConfig:
    """Stage entropy of crpo phases: coefficients, reduction, controller, alarm.

    Coefficient of stage k = 1..K (> 0 penalty, < 0 bonus), with h = max(tau - 1, K - tau):
    tanh M tanh(k - tau) (paper) | linear M (k - tau) / h | cosine M sin(pi (k - tau) / (2 h)) |
    step M sign(k - tau) | explicit: each ``stages.coef``. Means over sequences: sequence_mean (one
    without the stage counts 0) | present_only; token_mean: over the stage's tokens. ``anneal``
    scales the coefficients of "fixed" and the targets of "dual".
    """

    schedule: str = "tanh"  # tanh | linear | cosine | step | explicit (above)
    magnitude: float = 0.06  # M, the largest |coefficient|; 0: no entropy term
    tau: float | None = None  # stage number where the sign changes; None: (K + 2) / 2
    reduction: str = "sequence_mean"  # sequence_mean (paper) | token_mean | present_only
    reference_length: int | None = None  # tokens; shorter stages: coef x tokens / this; None: off
    anneal: str = "none"  # none | linear | cosine, from 1 to anneal_to over the phase
    anneal_to: float = 0.0  # factor at the phase's last step, >= 0
    controller: str = "fixed"  # fixed (the schedule) | dual (holds target entropies)
    targets: tuple[float, ...] = ()  # dual: nats, one per stage; empty: target_fraction
    target_fraction: float | tuple[float, ...] = 1.0  # of a stage's first entropy; one or K
    target_floor: float = 0.02  # dual: least target, nats
    dual_bound: float | None = None  # dual: largest |coefficient|; None: magnitude
    dual_proportional: float = 4.0  # dual: share of the bound per unit of log(H / target)
    dual_integral: float = 0.2  # dual: the same, added up over steps
    alarm_warn_factor: float = 3.0  # times a stage's first entropy: a warning
    alarm_stop_factor: float = 10.0  # times it: the run is saved and stops
    alarm_floor: float = 0.2  # nats; a lower first entropy counts as this
    alarm: bool = True  # False turns warning and stop off


@dataclass(frozen=True)
class RewardsConfig:
    """Reward functions, their weights, and how answers are matched.

    A call gets the samples of one prompt, in a worker process. With ``workers`` 0 (for debugging)
    nothing ends a function that hangs.
    """

    functions: tuple[str, ...] = (  # module:function each, TRL's signature
        "crpo_fast.rewards:format_reward",
        "crpo_fast.rewards:answer_reward",
    )
    weights: tuple[float, ...] = ()  # one per function; empty: 1 each
    match: str = "prefix"  # prefix (label, then no word character) | exact; both ignore case
    balance: str = "reward"  # reward (paper) | advantage | none: weights of rare labels and sets
    workers: int | None = None  # processes per rank; None: up to 4; 0: in the trainer
    timeout: float = 10.0  # seconds per sample of a call
    start_timeout: float = 300.0  # seconds for importing the functions
    max_error_rate: float = 0.05  # share of a step's samples without reward; above: end


@dataclass(frozen=True)
class AdvantagesConfig:
    """Reward less the mean of its group, divided by ``scale``."""

    scale: str = "group_std"  # group_std (paper) | batch_std (of all ranks) | none


@dataclass(frozen=True)
class ObjectiveConfig:
    """Overrides of the algorithm's preset (ObjectiveSpec of the kernels); None keeps its value.

    Other presets: clip_high dapo .28, cispo 4; gspo clips at 3e-4 and 4e-4. Aggregation: crpo, bnpo
    bnpo | grpo, gspo sequence_mean | dapo, cispo, sft token_mean | dr_grpo constant.
    """

    clip_low: float | None = None  # the ratio is clipped below 1 - clip_low, 0 .. 1; preset .2
    clip_high: float | None = None  # and above 1 + clip_high; preset .2
    kl_coef: float | None = None  # >= 0; preset 0, crpo .01
    kl_estimator: str | None = None  # k1 | k2 | k3; preset k3
    rho_mode: str | None = None  # truncate (at most rho_cap) | mask (0 outside floor .. cap)
    rho_cap: float | None = None  # largest p_train / p_rollout, >= 1; preset 2
    rho_floor: float | None = None  # mask: smallest that is kept, 0 .. 1; preset 0
    aggregation: str | None = None  # token_mean | sequence_mean | constant | bnpo
    bnpo_group: int = 4  # samples per group of the bnpo mean: the paper's device batch


@dataclass(frozen=True)
class RolloutConfig:
    """One rollout: ``prompts_per_step`` x ``group_size`` samples (units: tokens, nats).

    ``mask_truncated``: a completion that met ``max_tokens`` keeps its reward and its place in its
    group and in every denominator. ``dynamic_sampling``: after its last round the step trains on
    fewer groups.
    """

    engine: str = "hf"  # hf (continuous batching) | static (one padded batch; for CPUs)
    prompts_per_step: int = 16  # of all ranks; a multiple of ranks x minibatches
    group_size: int = 8  # samples per prompt, at least 2
    temperature: float = 1.0  # of sampling and of the policy in the loss, > 0
    top_p: float = 1.0  # in (0, 1]; 1: off
    top_k: int = 0  # 0: off
    max_tokens: int = 128  # longest completion
    mask_truncated: bool = False  # none of the tokens of a cut completion is in the loss
    dynamic_sampling: bool = False  # replace groups whose rewards are all equal
    max_resamples: int = 3  # rounds of dynamic_sampling at most
    max_mismatch: float = 0.1  # nats; mean |train - rollout logprob| of the first batch of a start


@dataclass(frozen=True)
class TrainConfig:
    """The loop. Each update is on one of the ``minibatches`` of a rollout's groups."""

    max_steps: int = 0  # cap of each phase; 0: none
    token_budget: int = 4096  # most tokens of a micro-batch, prompts included
    layout: str = "packed"  # packed (one row) | shared (and each prompt once) | padded (one a row)
    workspace_mib: int | None = None  # MiB of the loss; None: the kernels choose
    loss_backend: str = "auto"  # auto (triton where it runs, else torch) | triton | torch | dense
    score_kernel: str = "auto"  # auto (the faster) | fused | chunks: in passes without gradients
    score_head: str = "full"  # full | fp8 (approximate): lm_head of reference and old logprobs
    threads: int = 0  # 0: all cores divided by the ranks of this machine
    updates_per_rollout: int = 1  # optimizer updates per step of the loop
    minibatches: int = 0  # parts of a rollout's groups; 0: updates_per_rollout
    max_nonfinite: int = 3  # skipped updates in a row that end the run
    timeout: float = 1800.0  # seconds that a rank waits for the others


@dataclass(frozen=True)
class OptimConfig:
    """AdamW. ``lr``, ``warmup_steps`` and ``schedule`` may be set per phase."""

    lr: float = 5e-6  # peak; of phases without their own
    betas: tuple[float, float] = (0.9, 0.999)  # decay of both moments
    weight_decay: float = 0.0  # of weights of two dimensions
    max_grad_norm: float = 1.0  # L2 norm of all gradients
    warmup_steps: int = 0  # linear, from 0; of phases without their own
    schedule: str = "linear"  # linear (to 0 over the phase) | cosine (to 0) | constant


@dataclass(frozen=True)
class EvalConfig:
    """Greedy evaluation, before and after the phases that are trained by reward."""

    split: str = "test"  # val | test: official and synthetic data
    every: int = 0  # steps of a phase trained by reward; 0: before and after it alone
    limit: int = 0  # rows per data set, a fixed stratified sample; 0: all
    full: bool = False  # all rows, whatever limit says
    untrained: bool = False  # also evaluate before any training
    batch: int = 64  # prompts of a rank at once
    max_tokens: int = 0  # 0: rollout.max_tokens


@dataclass(frozen=True)
class ReportConfig:
    """What samples.jsonl records for report.html; later in a long run less often."""

    trace_every: int = 5  # steps between records; 0: none
    trace_samples: int = 4  # completions per record, best and worst of rank 0
    probe_every: int = 10  # steps between answers to the probe prompts; 0: none
    probe_prompts: int = 4  # fixed test rows


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, and which one is kept besides the newest.

    ``best``: weighted_f1 (of an evaluation during training) | reward (mean since the checkpoint
    before) | auto (weighted_f1 with ``eval.every``, else reward).
    """

    every: int = 50  # steps; 0: only at the end of a phase and on SIGTERM
    keep: int = 2  # newest ones that stay, at least 1
    best: str = "auto"  # auto | weighted_f1 | reward | none: which one is kept besides


@dataclass(frozen=True)
class TrackConfig:
    """Where metrics also go. Numbers only."""

    to: tuple[str, ...] = ()  # some of tensorboard, wandb, trackio
    project: str = "crpo-fast"  # name of the project there
    name: str = ""  # of the run there; empty: a made-up one
    wandb_mode: str = "offline"  # offline | online


@dataclass(frozen=True)
class PhaseConfig:
    """One ``[[phases]]`` table each; they run in this order."""

    algorithm: str = "crpo"  # sft | crpo | grpo | bnpo | dapo | dr_grpo | gspo | cispo
    steps: int = 100  # of the loop: a rollout each; sft: an update each
    lr: float | None = None  # None: optim.lr
    warmup_steps: int | None = None  # None: optim.warmup_steps
    schedule: str | None = None  # None: optim.schedule
    sequences_per_step: int = 64  # sft alone: written completions per update


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    seed: int = 0  # of data, weights, order and sampling
    quiet: bool = False  # only warnings, errors and the closing lines
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
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
