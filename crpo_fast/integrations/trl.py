"""CRPO in TRL: its GRPOTrainer with the fused loss and stage entropy.

    from crpo_fast.integrations.trl import CRPOTrainer, EntropyConfig

    trainer = CRPOTrainer("Qwen/Qwen3-0.6B", reward, GRPOConfig("out"), dataset,
                          stages="mental_r1", entropy=EntropyConfig(magnitude=0.06))
    trainer.train()

Everything else is TRL's: generation, rewards, PEFT, gradient accumulation, checkpoints, and the
metrics, which TRL's own code computes from the logprobs and entropies of the fused pass. The loss
that is returned has the value of TRL's formula (plus the entropy terms) and the gradient of
`linear_policy_loss`, one pass over the logits. Options for which the loss needs all logprobs first
(`trl_objective.unfused_reason`) take `linear_logprobs` and TRL's own formula, one pass more; which,
is logged once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from torch import Tensor

from crpo_fast.config import (
    Config,
    ConfigError,
    EntropyConfig,
    GrammarConfig,
    PhaseConfig,
    StageConfig,
)
from crpo_fast.config_checks import check
from crpo_fast.entropy_watch import EntropyWatch
from crpo_fast.integrations import trl_objective as terms
from crpo_fast.integrations.trl_head import HeadOutput, install_head
from crpo_fast.stages import StageGrammar
from crpo_fast.task import build_grammar

TESTED = ">=1.16,<1.17"  # versions of TRL

try:
    from trl import GRPOTrainer
except ImportError as error:  # none, or a version without it
    raise ImportError(
        f"trl: expected an installed TRL {TESTED}, got: {error}. Type pip install "
        f"'crpo-fast[integrations]' 'trl{TESTED}'."
    ) from error

__all__ = ["TESTED", "CRPOTrainer", "EntropyConfig", "StageConfig", "check_version"]

STATE_FILE = "stage_entropy.json"
logger = logging.getLogger(__name__)


def check_version(installed: str) -> None:
    """Refuse a TRL whose trainer nobody has compared with ours.

    Args:
        installed: a version, such as "1.16.0".

    Raises:
        ImportError: the range that is tested, and what to type.
    """
    if not SpecifierSet(TESTED).contains(installed, prereleases=True):
        raise ImportError(
            f"trl: expected a version in {TESTED}, which is what is tested, got {installed}. "
            f"Type pip install 'trl{TESTED}'."
        )


check_version(version("trl"))


class CRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with the fused loss and stage entropy.

    Args:
        args, kwargs: of `trl.GRPOTrainer`.
        stages: a preset of `StageGrammar`, or the stages themselves; "none": no stages. A prompt
            that ends with ``trainer.grammar.prefill`` starts the completion in the first stage.
        entropy: coefficients, controller and alarm; ``magnitude=0`` is TRL's own objective.
        kernel_options: keyword arguments of the kernels: backend, workspace_bytes.

    Raises:
        ConfigError: an option that this trainer has not; the message says what to set.
        UnsupportedModelError: the model's head does something that the kernels do not.

    Source:
        Stage entropy: CRPO (arXiv 2606.13176); the rest of the loss: TRL, whose metrics and options
        keep their names and units. Entropies are in nats.
    """

    def __init__(
        self,
        *args: Any,
        stages: str | Sequence[StageConfig] = "mental_r1",
        entropy: EntropyConfig = EntropyConfig(),  # noqa: B008  (frozen)
        kernel_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        terms.check_options(self, entropy)
        self.entropy, self.grammar = entropy, _grammar(stages, entropy)
        phase = PhaseConfig(algorithm="crpo", steps=max(1, self.args.max_steps))
        self.watch = EntropyWatch.build(entropy, phase, self.grammar)
        self._window: Tensor | None = None  # [2, K] sums and tokens since the last update
        for model in (self.model, self.ref_model):
            if model is not None:
                install_head(
                    model,
                    temperature=self.temperature,
                    in_fp32=self.args.cast_lm_head_to_fp32,
                    options=kernel_options or {},
                )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mask = terms.loss_mask(inputs)  # [B, C]
        stage_ids = terms.stage_ids(self, inputs, mask)  # [B, C]
        coefs = self.watch.coefs(self.state.global_step, ())
        weights = terms.stage_weights(self, stage_ids, coefs)  # [B, C]
        reason = terms.unfused_reason(self, inputs)
        _log_passes(reason)
        compute = None if reason else terms.fused(self, inputs, mask, weights)
        outputs: list[HeadOutput] = []

        def forward(**kwargs: Any) -> HeadOutput:
            outputs.append(model(compute=compute, **kwargs))
            return outputs[-1]

        loss = super()._compute_loss(forward, inputs)  # value and metrics; constant where fused
        (out,) = outputs
        entropies = out["entropy"][:, -mask.shape[1] :]  # [B, C]
        if weights is not None:
            loss = loss + (weights * entropies).sum()
        if out.loss is not None:
            loss = loss + (out.loss - out.loss.detach())
        self._observe(stage_ids, entropies.detach(), coefs)
        return loss

    def _observe(self, stage_ids: Tensor, entropies: Tensor, coefs: tuple[float, ...]) -> None:
        """Log the stages at the end of an optimizer step, and let controller and alarm see them."""
        mode = "train" if self.model.training else "eval"
        sums = terms.stage_sums(stage_ids, entropies, self.grammar.num_stages)  # [2, K]
        self._window = sums if self._window is None else self._window + sums
        if not self.accelerator.sync_gradients or not len(coefs):
            return
        total, count = self.accelerator.reduce(self._window, reduction="sum").tolist()
        self._window, step = None, self.state.global_step
        means = [s / n if n else None for s, n in zip(total, count, strict=True)]
        metrics = {f"stage_entropy/{k}": mean for k, mean in enumerate(means)}
        metrics |= {f"stage_coef/{k}": coef for k, coef in enumerate(coefs)}
        if mode == "train":
            verdict = self.watch.update(metrics, len(coefs), step=step, at=step + 1)
            for message in verdict.warnings:
                logger.warning(message)
            if verdict.stop is not None:
                logger.error(verdict.stop)
                self.control.should_training_stop = self.control.should_save = True
        for name, value in metrics.items():
            if value is not None:
                self._metrics[mode][name].append(value)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            (folder / STATE_FILE).write_text(json.dumps(self.watch.state_dict()), "utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (file := Path(checkpoint, STATE_FILE)).is_file():
            self.watch.load_state_dict(json.loads(file.read_text("utf-8")))


def _grammar(stages: str | Sequence[StageConfig], entropy: EntropyConfig) -> StageGrammar:
    is_preset = isinstance(stages, str)
    strange = [] if is_preset else [x for x in stages if not isinstance(x, StageConfig)]
    if strange:
        raise ConfigError(
            f"stages: expected a preset or StageConfig objects, got {strange[0]!r}. Pass "
            "stages=[StageConfig('stimulus'), ...] of crpo_fast.integrations.trl."
        )
    config = Config(
        grammar=GrammarConfig(preset=stages) if is_preset else GrammarConfig(),
        stages=() if is_preset else tuple(stages),
        entropy=entropy,
    )
    check(config)
    grammar = build_grammar(config)
    if not grammar.num_stages and entropy.magnitude:
        raise ConfigError(
            f"stages: expected stages for entropy.magnitude = {entropy.magnitude:g}, got none. "
            "Pass stages='mental_r1', or entropy=EntropyConfig(magnitude=0) for TRL's objective."
        )
    return grammar


@cache
def _log_passes(reason: str | None) -> None:
    """Once for each: how many passes over the logits the loss takes."""
    if reason is None:
        logger.info("loss: fused, one pass over the logits")
    else:
        logger.info("loss: TRL's formula on the kernels' logprobs, two passes, for %s", reason)
