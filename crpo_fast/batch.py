"""The records that travel through one training step. Read this file first.

    Row -> prompt ids -> RolloutGroup(Sample, ...) -> Sequence (one per sample) -> MicroBatch

Everything here is plain data: no torch.distributed, no transformers, no config object. Token ids go
in and token ids come out; text is only made for rewards and for people.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LAYOUTS = ("packed", "shared", "padded")  # of the tokens of a MicroBatch: see `packing`


@dataclass(frozen=True, slots=True)
class Row:
    """One example of a task.

    Attributes:
        text: the post, or the whole question of somebody's own task.
        label: the gold answer string.
        instruction: what is asked about ``text``; precedes it in the prompt. May be empty.
        dataset_id: name of the data set; balance weights and metrics are kept per data set.
        completion: a whole written answer for the SFT cold start, or None.
        stages: stage name -> written content for the SFT cold start, or None.
        columns: further columns, handed to the reward functions by name.
    """

    text: str
    label: str
    instruction: str = ""
    dataset_id: str = "default"
    completion: str | None = None
    stages: dict[str, str] | None = None
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are sampled. ``temperature`` 0 means greedy (evaluation only)."""

    max_tokens: int  # tokens of the completion, the end token included
    eos_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled completion.

    Attributes:
        token_ids: the sampled ids, the end token included where it was sampled.
        logprobs: nats, of softmax(logits / temperature), one per token of ``token_ids``.
        finish_reason: "stop" (an end token was sampled) or "length".
        policy_version: version of the weights that sampled it.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    policy_version: int


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All samples of one prompt, in the order in which they were asked for."""

    prompt_ids: list[int]
    samples: list[Sample]
