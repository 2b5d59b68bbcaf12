"""CRPOTrainer beside trl.GRPOTrainer: the same runs, values compared."""

# ruff: noqa: E402  (skipped before what the extra brings is imported)
from __future__ import annotations

import importlib.util
import inspect
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

MISSING = [name for name in ("trl", "peft", "datasets") if not importlib.util.find_spec(name)]
if MISSING:
    pytest.skip(f"needs {MISSING} (pip install 'crpo-fast[integrations]')", allow_module_level=True)

from trl import GRPOTrainer

import children
import trl_cases
from crpo_fast.alarm import Verdict
from crpo_fast.config import ConfigError
from crpo_fast.entropy_watch import EntropyWatch
from crpo_fast.integrations import trl_objective as terms
from crpo_fast.integrations.trl import CRPOTrainer, EntropyConfig, StageConfig, check_version
from crpo_fast.integrations.trl_head import install_head
from crpo_fast.model_check import UnsupportedModelError
from trl_cases import LATE, SINGLE_PASS, TWO_PASSES, train

ROOT = Path(__file__).resolve().parent.parent
NO_ENTROPY = {"entropy": EntropyConfig(magnitude=0.0)}
FP16 = SimpleNamespace(mixed_precision="fp16")
STAGES = tuple(StageConfig(name) for name in trl_cases.STAGES)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trl_cases.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def name_of(options: Any) -> str:
    return options if isinstance(options, str) else "-".join(map(str, options.values()))


def check_equal(model: Path, folder: Path, **options: Any) -> trl_cases.Run:
    ours = train(CRPOTrainer, model, folder, trainer_options=dict(NO_ENTROPY), **options)
    theirs = train(GRPOTrainer, model, folder, **options)
    found = trl_cases.differences(ours, theirs)
    assert found["loss"] < 1e-5
    assert found["gradient"] < 1e-5
    assert found["logs"] == {}
    return ours


@pytest.mark.parametrize("options", SINGLE_PASS, ids=name_of)
def test_without_stage_entropy_it_is_trl(model, tmp_path, options, monkeypatch):
    reasons = spy(monkeypatch)
    run = check_equal(model, tmp_path, **options)
    assert set(reasons) == {None}
    is_late = "steps_per_generation" in options or "num_iterations" in options
    if is_late and options["loss_type"] != "cispo" and "epsilon" in options:
        assert any(log.get("clip_ratio/region_mean", 0) > 0 for log in run.logs)


@pytest.mark.parametrize(("reason", "options"), TWO_PASSES, ids=name_of)
def test_options_that_need_all_logprobs_first_take_two_passes(
    model, tmp_path, reason, options, monkeypatch
):
    reasons = spy(monkeypatch)
    check_equal(model, tmp_path, **options)
    assert set(reasons) <= {reason, None}
    assert reason in reasons


def spy(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    reasons: list[str | None] = []
    plain = terms.unfused_reason

    def unfused_reason(*args: Any) -> str | None:
        reasons.append(plain(*args))
        return reasons[-1]

    monkeypatch.setattr(terms, "unfused_reason", unfused_reason)
    return reasons


def dense_gradient(model: Path, batches: list[dict[str, Any]], coefs: list[float]) -> Any:
    """Gradients and stage means of the paper's entropy term, from all logits; tags are tokens."""
    lm = AutoModelForCausalLM.from_pretrained(model)
    tags = trl_cases.make_tokenizer().convert_tokens_to_ids(list(trl_cases.TAGS))
    count = sum(len(batch["completion_ids"]) for batch in batches)
    loss, seen = torch.zeros(()), [[], []]
    for batch in batches:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        width = batch["completion_ids"].shape[1]
        logits = lm(ids, attention_mask=mask).logits[:, -width - 1 : -1] / 0.9
        entropy = torch.distributions.Categorical(logits=logits).entropy()  # [B, C]
        for row, tokens in zip(entropy, batch["completion_ids"].tolist(), strict=True):
            first = tokens.index(tags[1]) if tags[1] in tokens else 0
            start, stop = (tokens.index(tag) if tag in tokens else 0 for tag in tags[2:])
            for k, part in enumerate((row[:first], row[start + 1 : stop])):
                if len(part):
                    seen[k] += part.tolist()
                    loss = loss + coefs[k] * part.mean() / count
    loss.backward()
    gradients = {name: p.grad for name, p in lm.named_parameters()}
    return gradients, [sum(values) / len(values) for values in seen]


def check_stage_term(
    staged: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], expected: dict[str, Any]
) -> None:
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        assert float((staged[name] - plain[name] - gradient).abs().max()) < 2e-5 * largest, name


@pytest.mark.parametrize("options", [{}, {"delta": 1.3}], ids=["one pass", "two passes"])
def test_stage_entropy_adds_the_gradient_of_the_paper(model, tmp_path, options):
    entropy = EntropyConfig(magnitude=2.0, tau=1.5)
    staged = train(
        CRPOTrainer,
        model,
        tmp_path,
        trainer_options={"stages": STAGES, "entropy": entropy},
        **trl_cases.STAGED,
        **options,
    )
    plain = train(GRPOTrainer, model, tmp_path, **trl_cases.STAGED, **options)
    coefs = staged.trainer.grammar.coefs()
    assert coefs[0] == -coefs[1] != 0
    gradients, means = dense_gradient(model, staged.inputs[:2], coefs)
    check_stage_term(staged.gradients[0], plain.gradients[0], gradients)
    log = staged.logs[0]
    for k in range(2):
        assert log[f"stage_entropy/{k}"] == pytest.approx(means[k], rel=1e-5)
        assert log[f"stage_coef/{k}"] == pytest.approx(coefs[k])
    assert abs(log["loss"] - plain.logs[0]["loss"]) > 1e-3
    assert {k: log[k] for k in ("entropy", "reward")} == pytest.approx(
        {k: plain.logs[0][k] for k in ("entropy", "reward")}
    )


@pytest.mark.multirank
def test_two_ranks(model, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    worker = [str(ROOT / "tests" / "trl_worker.py"), str(model), str(tmp_path)]
    subprocess.run([*launcher, *worker], check=True, env=children.environment(), timeout=240)
    for case in json.loads((tmp_path / "ranks.json").read_text()):
        assert case["loss"] < 1e-5
        assert case["gradient"] < 1e-5
        assert case["logs"] == {}
    saved = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    batches = [batch for rank in saved for batch in rank["inputs"]]
    gradients, means = dense_gradient(model, batches, saved[0]["coefs"])
    for rank in saved:
        check_stage_term(rank["staged"], rank["plain"], gradients)
        logged = [rank["log"][f"stage_entropy/{k}"] for k in range(2)]
        assert logged == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize("copied", [None, ["lm_head"]], ids=["tied", "a trained head"])
def test_peft_and_llama(tmp_path, copied):
    from peft import LoraConfig

    folder = trl_cases.make_model(tmp_path / "llama", "llama", tie_word_embeddings=copied is None)
    runs = []
    for trainer_class, options in ((CRPOTrainer, NO_ENTROPY), (GRPOTrainer, {})):
        targets = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": copied}
        chosen = {**options, "peft_config": LoraConfig(r=2, init_lora_weights=False, **targets)}
        beta = {"beta": 0.1, "use_bias_correction_kl": False, "loss_type": "dapo"}
        rate = {"learning_rate": 0.1, "cast_lm_head_to_fp32": copied is not None}
        runs.append(train(trainer_class, folder, tmp_path, trainer_options=chosen, **beta, **rate))
    found = trl_cases.differences(*runs)
    assert found["logs"] == {}
    assert max(found["loss"], found["gradient"]) < 1e-5
    assert runs[0].logs[0]["kl"] > 0
    trained = [name for name in runs[0].gradients[0] if "lora" not in name]
    assert trained == (
        [] if copied is None else ["base_model.model.lm_head.modules_to_save.default.weight"]
    )


def test_a_head_in_fp32(model, tmp_path):
    check_equal(model, tmp_path, cast_lm_head_to_fp32=True)


def test_mixed_precision(model, tmp_path):
    bf16 = {"bf16": True, "max_steps": 1, "cast_lm_head_to_fp32": True, "beta": 0.1}
    ours = train(CRPOTrainer, model, tmp_path, trainer_options=dict(NO_ENTROPY), **bf16)
    found = trl_cases.differences(ours, train(GRPOTrainer, model, tmp_path, **bf16))
    assert ours.trainer.accelerator.mixed_precision == "bf16"
    assert found["loss"] < 1e-5
    assert found["gradient"] < 4e-3  # one rounding of a bf16 gradient


class Widest(TorchDispatchMode):
    """Most rows of any tensor [rows, vocab] but for those of the weight, [width, vocab]."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.vocab, self.width, self.rows = vocab, width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[-1] == self.vocab:
                rows = leaf.numel() // self.vocab
                self.rows = max(self.rows, rows if rows != self.width else 0)
        return out


@pytest.mark.parametrize("options", [{}, {"delta": 1.3}], ids=["one pass", "two passes"])
def test_logits_never_exist(tmp_path, options):
    vocab, width, workspace = 16384, 16, 2**19
    folder = trl_cases.make_model(tmp_path / "wide", vocab_size=vocab, hidden_size=width)

    class Guarded(CRPOTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            plain = self.model.lm_head.forward
            self.model.lm_head.forward = lambda hidden, fused, *rest: plain(hidden, fused, *rest)
            return super().train(*args, **kwargs)

    widest = []
    for kernel_options in ({"workspace_bytes": workspace}, {}):
        chosen = {"stages": STAGES, "kernel_options": kernel_options}
        with Widest(vocab, width) as meter:
            run = train(
                CRPOTrainer,
                folder,
                tmp_path,
                trainer_options=chosen,
                max_steps=1,
                **LATE,
                **options,
            )
        widest.append(meter.rows)
    rows = min(int(batch["completion_mask"].sum()) for batch in run.inputs)
    assert 0 < widest[0] <= workspace // (4 * vocab) < rows <= widest[1]


def test_dual_controller_survives_a_resume(model, tmp_path):
    entropy = EntropyConfig(magnitude=0.5, controller="dual", alarm_stop_factor=1e6)
    chosen = {"stages": STAGES, "entropy": entropy}
    saving = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1}
    whole = train(CRPOTrainer, model, tmp_path, trainer_options=chosen, **saving)
    checkpoint = str(tmp_path / "checkpoint-2")
    rest = train(CRPOTrainer, model, tmp_path, trainer_options=chosen, resume=checkpoint, **saving)
    coefs = [[log[f"stage_coef/{k}"] for k in range(2)] for log in whole.logs[:3]]
    assert coefs[0] == coefs[1] == whole.trainer.grammar.coefs()  # the first entropy is the target
    assert coefs[1] != coefs[2]
    assert [rest.logs[0][f"stage_coef/{k}"] for k in range(2)] == coefs[2]
    assert whole.logs[1]["stage_target/0"] == pytest.approx(whole.logs[0]["stage_entropy/0"])
    torch.testing.assert_close(torch.stack(rest.losses), torch.stack(whole.losses[-2:]))


def test_the_alarm_saves_and_stops(model, tmp_path, monkeypatch):
    verdicts = [Verdict(("warm",)), Verdict(stop="hot")]
    monkeypatch.setattr(EntropyWatch, "update", lambda *_, **__: verdicts.pop(0))
    run = train(CRPOTrainer, model, tmp_path, trainer_options={"stages": STAGES})
    assert (run.trainer.state.global_step, verdicts) == (2, [])
    assert (tmp_path / "checkpoint-2" / "stage_entropy.json").is_file()


def test_annealing(model, tmp_path):
    entropy = EntropyConfig(magnitude=1.0, tau=1.5, anneal="linear")
    run = train(
        CRPOTrainer, model, tmp_path, trainer_options={"stages": STAGES, "entropy": entropy}
    )
    first = run.trainer.grammar.coefs()[0]
    logged = [log["stage_coef/0"] for log in run.logs[:3]]
    assert logged == pytest.approx([first, first / 2, 0.0])


def test_head_with_bias_is_the_models_own(model):
    lm = AutoModelForCausalLM.from_pretrained(model)
    lm.lm_head = nn.Linear(32, 288, bias=True)
    ids = torch.randint(0, 288, (2, 7))
    expected = lm(ids).logits[:, :-1].div(0.7).log_softmax(-1)
    expected = expected.gather(-1, ids[:, 1:, None]).squeeze(-1)
    install_head(torch.compile(lm), temperature=0.7, options={})  # as TRL's reference may be
    out = lm(ids, labels=ids, fused_lm_head=True)
    torch.testing.assert_close(out.log_probs, expected)
    assert lm(ids).logits.shape == (2, 7, 288)  # generation goes on as before


def test_unknown_head_is_refused(model):
    lm = AutoModelForCausalLM.from_pretrained(model)
    lm.lm_head = nn.Sequential(lm.lm_head)
    with pytest.raises(UnsupportedModelError, match=r"expected an nn.Linear output head, got Seq"):
        install_head(lm, temperature=1.0, options={})


@pytest.mark.parametrize("installed", ["1.15.2", "1.17.0", "2.0"])
def test_other_versions_are_refused_with_the_range(installed):
    expected = rf">=1.16,<1.17, which is what is tested, got {installed}. Type pip install 'trl>=1"
    with pytest.raises(ImportError, match=expected):
        check_version(installed)
    check_version("1.16.3")


@pytest.mark.parametrize(
    ("trainer", "entropy", "message"),
    [
        ({"aux_loss_enabled": True}, {}, r"router_aux_loss_coef: expected 0.*got 0.1. Set GRPOC"),
        ({"_is_vlm": True}, {}, "model: expected a text model.*trl.GRPOTrainer"),
        (
            {"accelerator": FP16},
            {},
            r"fp16: expected a head in bf16 .* got fp16. Set GRPOConfig\(bf16=True",
        ),
        (
            {"model": SimpleNamespace(dtype=torch.float16)},
            {},
            r"fp16: .* or cast_lm_head_to_fp32=True",
        ),
        ({}, {"reduction": "token_mean"}, "entropy.reduction: expected 'sequence_mean'"),
        ({}, {"anneal": "linear"}, r"entropy.anneal: .*Set GRPOConfig\(max_steps"),
    ],
)
def test_what_it_has_not_is_refused(trainer, entropy, message):
    usual = {
        "aux_loss_enabled": False,
        "router_aux_loss_coef": 0.1,
        "_is_vlm": False,
        "accelerator": SimpleNamespace(mixed_precision="bf16"),
        "model": SimpleNamespace(dtype=torch.float32),
        "args": SimpleNamespace(max_steps=-1, cast_lm_head_to_fp32=False),
    }
    with pytest.raises(ConfigError, match=message):
        terms.check_options(SimpleNamespace(**{**usual, **trainer}), EntropyConfig(**entropy))


def test_wrong_stages_and_entropies_are_refused(model, tmp_path):
    for wrong, message in (
        ({"stages": "mental_r2"}, "Did you mean 'mental_r1'"),
        ({"stages": ["stimulus"]}, r"stages: .* got 'stimulus'. Pass stages=\[StageConfig"),
        ({"entropy": EntropyConfig(controller="dua")}, "entropy.controller: expected one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(CRPOTrainer, model, tmp_path, trainer_options=wrong)


def test_trainer_is_under_a_hundred_lines():
    assert len(inspect.getsource(CRPOTrainer).splitlines()) < 100


def test_example_trains(tmp_path):
    run = runpy.run_path(str(ROOT / "docs" / "examples" / "trl_crpo.py"))
    logs = run["main"](str(tmp_path))
    assert logs[0]["stage_coef/0"] == pytest.approx(-0.0592, abs=1e-4)
    assert logs[1]["step"] == 2


def test_ten_lines_of_the_documentation(model, tmp_path, monkeypatch):
    import trl

    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    code = page.partition("## TRL")[2].partition("```python\n")[2].partition("```")[0]
    assert len([line for line in code.splitlines() if line]) <= 10
    prompts = "".join(json.dumps({"prompt": text}) + "\n" for text in ("a long day", "it is fine"))
    (tmp_path / "prompts.jsonl").write_text(prompts)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").symlink_to(model)
    monkeypatch.chdir(tmp_path)

    plain = trl_cases.settings

    def configured(folder: str, **options: Any) -> Any:
        monkeypatch.setattr(trl, "GRPOConfig", type(trained))
        return plain(Path(folder), **options, max_steps=1)

    trained = plain(tmp_path)
    monkeypatch.setattr(trl, "GRPOConfig", configured)
    names: dict[str, Any] = {"my_reward": trl_cases.reward}
    exec(code, names)
    assert names["trainer"].state.global_step == 1
