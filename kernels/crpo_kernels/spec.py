"""The records that travel through the loss: what to minimise, what goes in and what comes out.

    ObjectiveSpec   what is minimised (options and presets)
    TokenInputs     the constants of one call, one value a token
    Logprobs        what `linear_logprobs` returns
    TokenStats      what `linear_policy_loss` returns beside the loss
    RunOptions      how a call shall run

T is the number of tokens (rows of ``hidden``). Everything is in nats where it is a logarithm.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100  # label of a row that does not count

POLICIES = ("clip", "gspo", "cispo", "sft")
KL_ESTIMATORS = ("k1", "k2", "k3")
RHO_MODES = (None, "truncate", "mask")


@dataclass(frozen=True)
class ObjectiveSpec:
    """What is minimised per token: rho * policy_term + kl_coef * kl (formulas in `objective`).

    Attributes:
        policy: "clip" (PPO and GRPO), "gspo", "cispo" or "sft".
        clip_low: the ratio is clipped below 1 - clip_low. In [0, 1].
        clip_high: the ratio is clipped above 1 + clip_high. cispo's cap of the ratio is 1 +
            clip_high.
        kl_coef: weight of the KL term to ``ref_logprobs``; 0 turns it off.
        kl_estimator: "k1", "k2" or "k3" (http://joschu.net/blog/kl-approx.html).
        rho_mode: how the mismatch with the engine that sampled is corrected: None (not at all),
            "truncate" (rho at most ``rho_cap``) or "mask" (0 outside ``rho_floor`` .. ``rho_cap``).
        rho_cap: largest rho.
        rho_floor: smallest rho that "mask" keeps.

    Raises:
        ValueError: an option that is unknown or out of its range.

    Example:
        >>> ObjectiveSpec(clip_high=0.28) == ObjectiveSpec.preset("dapo")
        True

    Source:
        clip: PPO (arXiv 1707.06347, equation 7) and GRPO (2402.03300, equation 3); gspo 2507.18071;
        cispo 2506.13585; KL estimators http://joschu.net/blog/kl-approx.html.
    """

    policy: str = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    rho_mode: str | None = None
    rho_cap: float = 2.0
    rho_floor: float = 0.0

    def __post_init__(self) -> None:
        check_choice("policy", self.policy, POLICIES)
        check_choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        check_choice("rho_mode", self.rho_mode, RHO_MODES)
        self._check_range("clip_low", 0.0, 1.0)
        self._check_range("clip_high", 0.0, math.inf)
        self._check_range("kl_coef", 0.0, math.inf)
        self._check_range("rho_cap", 0.0, math.inf)
        self._check_range("rho_floor", 0.0, self.rho_cap)

    def _check_range(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (is_number and low <= value <= high and math.isfinite(value)):
            raise ValueError(
                f"{name}: expected a finite number in [{low}, {high}], got {value!r}. "
                f"Write ObjectiveSpec({name}={getattr(ObjectiveSpec, name)}) for the default."
            )

    @classmethod
    def preset(cls, name: str, **overrides: object) -> ObjectiveSpec:
        """A published objective by name; ``overrides`` replace single options.

        crpo, grpo, bnpo and dr_grpo share their policy term: what tells them apart is the
        aggregation (`aggregation_weights`) and how advantages are made.

        Args:
            name: crpo, grpo, bnpo, dapo, dr_grpo, gspo, cispo or sft.
            **overrides: fields of `ObjectiveSpec`.

        Raises:
            ValueError: no such preset, or an override that is no option.

        Example:
            >>> spec = ObjectiveSpec.preset("gspo", clip_low=0.001)
            >>> spec.policy, spec.clip_low, spec.clip_high
            ('gspo', 0.001, 0.0004)
            >>> ObjectiveSpec.preset("gpro")
            Traceback (most recent call last):
            ValueError: preset: expected one of ['crpo', 'grpo', 'bnpo', 'dapo', 'dr_grpo', ...

        Source:
            crpo arXiv 2606.13176; grpo 2402.03300; bnpo as in TRL; dapo 2503.14476; dr_grpo
            2503.20783; gspo 2507.18071; cispo 2506.13585 with the cap 5 of 2510.13786.
        """
        check_choice("preset", name, tuple(PRESETS))
        for option in overrides:
            check_choice("override", option, OPTIONS)
        return cls(**{**PRESETS[name], **overrides})  # type: ignore[arg-type]


OPTIONS = tuple(field.name for field in fields(ObjectiveSpec))
PRESETS: dict[str, dict] = {
    "crpo": {"kl_coef": 0.01},  # 2606.13176
    "grpo": {},  # 2402.03300
    "bnpo": {},  # as in TRL
    "dapo": {"clip_high": 0.28},  # 2503.14476
    "dr_grpo": {},  # 2503.20783
    "gspo": {"policy": "gspo", "clip_low": 3e-4, "clip_high": 4e-4},  # 2507.18071
    "cispo": {"policy": "cispo", "clip_high": 4.0},  # 2506.13585, cap 5 as in ScaleRL 2510.13786
    "sft": {"policy": "sft"},
}


def check_choice(argument: str, value: object, choices: tuple) -> None:
    """Raise a ValueError that offers the nearest valid choice unless ``value`` is one of them."""
    if value in choices:
        return
    names = [choice for choice in choices if isinstance(choice, str)]
    near = difflib.get_close_matches(str(value), names, n=1)
    advice = f"Did you mean {near[0]!r}?" if near else "Choose one of these."
    raise ValueError(f"{argument}: expected one of {list(choices)}, got {value!r}. {advice}")


class RunOptions(NamedTuple):
    """How a call shall run; see `api`."""

    backend: str = "auto"
    mode: str = "auto"
    workspace_bytes: int | None = None
    head_dtype: torch.dtype | None = None  # of `linear_logprobs` alone


class TokenInputs(NamedTuple):
    """The constants of one call, one value a row. An optional one is None when it was not given."""

    labels: Tensor  # [T] int64
    token_weights: Tensor  # [T] multiplies policy and KL term
    advantages: Tensor | None = None  # [T]
    entropy_weights: Tensor | None = None  # [T] > 0 penalises entropy, < 0 rewards it
    z_loss_weights: Tensor | None = None  # [T] multiplies lse^2
    old_logprobs: Tensor | None = None  # [T] where the update starts; None: on-policy
    rollout_logprobs: Tensor | None = None  # [T] of the engine that sampled
    ref_logprobs: Tensor | None = None  # [T] of the reference policy

    def take(self, rows: Tensor | slice | None) -> TokenInputs:
        """The same record of some rows."""
        if rows is None:
            return self
        return self._make(None if value is None else value[rows] for value in self)


class Logprobs(NamedTuple):
    """Per-token results of the head in nats, fp32 (fp64 for fp64 inputs); ignored rows are 0."""

    logprobs: Tensor  # [T] log p(label)
    entropy: Tensor  # [T] of the tempered distribution over the full vocabulary
    lse: Tensor  # [T] log sum exp of the tempered logits


class TokenStats(NamedTuple):
    """Detached per-token statistics of one loss call; ignored rows are 0 or False.

    Floats are fp32 (fp64 for fp64 inputs); logprobs, entropy, lse and kl are in nats. ``sums()`` is
    what a trainer logs: add the sums and the counts over micro-batches and ranks, then divide.
    """

    logprobs: Tensor  # [T]
    entropy: Tensor  # [T]
    lse: Tensor  # [T]
    token_loss: Tensor  # [T] rho * policy term + kl_coef * kl, before token_weights
    ratio: Tensor  # [T] policy / old policy (gspo: the sequence's); 1 when on-policy
    kl: Tensor  # [T] the estimator's value; 0 without ref_logprobs
    rho: Tensor  # [T] the weight applied against the mismatch with the sampling engine; 1 when off
    is_clipped: Tensor  # [T] bool, the clip holds this token's gradient (cispo: caps its weight)
    is_top1: Tensor  # [T] bool, the label is the most likely token
    is_counted: Tensor  # [T] bool, the row is labelled

    def sums(self) -> dict[str, Tensor]:
        """Name -> fp64 ``[2]`` (sum, count) over the counted rows; ``is_clipped`` as clip_fraction.

        ``torch.stack(list(stats.sums().values()))`` is one tensor for one all-reduce, and
        ``total, count = stats.sums()["entropy"]`` unpacks one entry. ``num_tokens`` holds the count
        twice. Sums, so the unit of an entry is that of its field.
        """
        dtype = torch.float32 if self.logprobs.device.type == "mps" else torch.float64
        count = self.is_counted.sum().to(dtype)
        names = ("token_loss", "logprobs", "entropy", "ratio", "kl", "rho", "is_clipped", "is_top1")
        sums = {"num_tokens": torch.stack((count, count))}
        for name in names:
            total = getattr(self, name).sum(dtype=dtype)
            sums["clip_fraction" if name == "is_clipped" else name] = torch.stack((total, count))
        return sums
