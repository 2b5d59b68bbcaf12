"""The plan command against the live tensor bytes of real steps, and what it says and refuses."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

import children
from crpo_fast import distributed, plan
from crpo_fast.config import ConfigError, parse_arguments
from crpo_fast.plan_model import model_maker, parameters_by_part
from plan_worker import measure
from triton_tools import why_no_triton

HERE = Path(__file__).resolve().parent
CONFIG = str(HERE / "plan.toml")
needs_triton = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))
PROMPT, COMPLETION = 80, 48  # the limits of plan.toml
MOMENTS = ("rollout", "reference pass", "forward, backward", "optimizer")
# untied or tied, packed or padded, bf16 or fp32, KL reference, checkpointing, accumulation, ...
SETTINGS = {
    "tied, packed, KL": "--objective.kl_coef 0.01",
    "untied, padded, fp32": "--model.build.no_tie_embeddings --train.layout padded "
    "--model.compute_dtype float32 --objective.kl_coef 0",
    "checkpointing, one micro-batch": "--model.activation_checkpointing --train.token_budget 4000 "
    "--model.build.no_tie_embeddings",
    "small workspace, frozen head, two updates": "--train.workspace_mib 4 --model.freeze_head "
    "--model.build.no_tie_embeddings --train.updates_per_rollout 2 --objective.kl_coef 0 "
    "--rollout.top_p 0.9 --rollout.temperature 0.8",
}


def compare(found: plan.Plan, real: dict, tolerance: float = 0.05) -> None:
    """Every moment and every part of some size; what is held between steps exactly."""
    moments = {m.name: m for m in found.phases[-1].moments}
    assert moments["optimizer"].parts["weights, sharded"] == real["weights"]
    assert moments["optimizer"].parts["optimizer"] == real["optimizer state"]
    assert moments["optimizer"].parts["gradients, sharded"] == real["gradients"]
    for name in MOMENTS:
        if name not in moments:
            assert name not in real
            continue
        parts = dict(real[name])
        total = sum(parts.values())
        assert moments[name].total == pytest.approx(total, rel=tolerance), name
        if name == "rollout":
            parts["rollouts"] = parts.get("rollouts", 0) + parts.pop("activations", 0)
        for label in {*parts, *moments[name].parts}:
            predicted, measured = moments[name].parts.get(label, 0), parts.get(label, 0)
            bound = max(tolerance * measured, 0.005 * total)
            assert abs(predicted - measured) <= bound, (name, label, predicted, measured)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_plan_is_what_a_real_step_needs(settings):
    config = parse_arguments([CONFIG, *settings.split()])
    world = distributed.init(threads=1)
    try:
        real = measure(config, world, PROMPT, COMPLETION)
    finally:
        distributed.shutdown()
    compare(plan.plan(config), real)


@needs_triton
@pytest.mark.parametrize(
    "settings",
    [
        "",
        "--train.score_kernel chunks",
        "--train.workspace_mib 1 --model.build.no_tie_embeddings --train.score_kernel chunks",
    ],
)
def test_buffers_of_the_backend_triton_are_those_of_a_real_step(settings, monkeypatch):
    """Real ones are interpreted, in fp32: there, too, products are as wide as their factors."""
    from crpo_kernels import linear_tiles, linear_triton, rows_triton

    plain = rows_triton.launch

    def launch(*args, **kwargs):
        plain(*args, **kwargs)
        gc.collect()  # the interpreter's cycles hold its arguments

    for module in (rows_triton, linear_triton):
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(linear_tiles, "PLANNED_UNITS", linear_tiles.INTERPRETED_UNITS)
    arguments = [str(HERE / "tiny.toml"), "--train.loss_backend", "triton", *settings.split()]
    config = parse_arguments(arguments)
    world = distributed.init(threads=1)
    try:
        real = measure(config, world, 20, 12)
    finally:
        distributed.shutdown()
    found = plan.plan(config, prompt_tokens=20, completion_tokens=12)
    moments = {m.name: m for m in found.phases[-1].moments}
    for name in ("reference pass", "forward, backward"):
        parts = moments[name].parts
        if name != "reference pass" or "chunks" in settings:
            assert parts["loss workspace"] == pytest.approx(real[name]["loss workspace"], rel=0.03)
        assert moments[name].total == pytest.approx(sum(real[name].values()), rel=0.03)


@needs_triton
def test_a_plan_for_a_gpu_is_of_the_backend_triton(capsys):
    """fp32 logits of the ring, bf16 gradients of a group, whatever this machine is."""
    dim, vocab = 192, 6000
    arguments = ["--train.token_budget", "2000", "--rollout.prompts_per_step", "5"]
    config = parse_arguments([CONFIG, *arguments, "--rollout.group_size", "3"])
    found = plan.plan(config, device="cuda")
    assert found.loss.name == "triton"
    assert found.loss.reason.endswith(" on a GPU")
    rows = 15 * COMPLETION  # one micro-batch
    assert rows < 1024 < 4 * dim / 2 + 2048  # all rows in the ring, dZ of all rows is kept
    step = next(m for m in found.phases[0].moments if m.name == "forward, backward")
    buffers = (4 + 2) * rows * vocab
    assert (
        buffers <= step.most["loss workspace"] <= 1.03 * buffers + 8 * rows * dim + 4 * vocab * dim
    )
    assert plan.main([CONFIG, "--device", "cuda", "--gpu-mem", "24GB"]) == 0
    assert "loss: backend triton (Triton " in capsys.readouterr().out
    assert plan.main([CONFIG, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss_backend"] == "torch"
    double = ["--model.compute_dtype", "float64", "--train.loss_backend", "triton"]
    assert plan.main([CONFIG, "--device", "cuda", "--gpu-mem", "24GB", *double]) == 2
    assert "train.loss_backend: expected auto, torch or dense" in capsys.readouterr().err


@pytest.mark.multirank
def test_a_plan_for_two_ranks_is_what_two_ranks_need(tmp_path):
    result = tmp_path / "real.json"
    settings = ["--objective.kl_coef", "0.01", "--train.token_budget", "600"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command += ["2", str(HERE / "plan_worker.py"), str(result), CONFIG, str(PROMPT)]
    command += [str(COMPLETION), *settings]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300,
        env=children.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = json.loads(result.read_text(encoding="utf-8"))
    found = plan.plan(parse_arguments([CONFIG, *settings]), ranks=2)
    compare(found, first)
    assert found.parts()["weights, sharded"] >= second["weights"]


def test_the_cache_of_the_engine_hf_is_as_planned(monkeypatch):
    from transformers.generation.continuous_batching import cache as paged

    from crpo_fast.batch import SamplingParams
    from crpo_fast.rollout.hf import HFEngine
    from crpo_fast.session import built_model

    settings = ["--rollout.engine", "hf", "--model.compute_dtype", "float32"]
    config = parse_arguments([CONFIG, *settings])
    sizes, plain = [], paged.PagedAttentionCache.__init__

    def recorded(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        sizes.append(self.cache_tensor.nbytes)

    monkeypatch.setattr(paged.PagedAttentionCache, "__init__", recorded)
    engine = HFEngine(built_model(config, 6000, "sdpa"))
    engine.sync(engine._model, 0)
    prompts = [[1 + i] * PROMPT for i in range(config.rollout.prompts_per_step)]
    params = SamplingParams(COMPLETION, (0, *range(5, 6000, 2)))  # ends soon: only sizes matter
    engine.generate(prompts, config.rollout.group_size, params, seed=0)
    rollout = next(m for m in plan.plan(config).phases[0].moments if m.name == "rollout")
    logits = 2 * 16 * 6000 * 4
    assert rollout.parts["rollouts"] - logits == pytest.approx(sizes[0], rel=0.02)


def test_numbers_of_parameters_by_part():
    found = plan.plan(parse_arguments([CONFIG])).parameters
    layer = {"attention": 192 * (192 + 96 + 96) + 192 * 192, "mlp": 3 * 192 * 512}
    assert found["attention"] == 4 * layer["attention"]
    assert found["mlp"] == 4 * layer["mlp"]
    assert found["norms"] == (2 * 4 + 1) * 192
    assert found["embedding"] == 6000 * 192
    assert found["all"] == found["trainable"] == sum(list(found.values())[2:])
    untied = parse_arguments([CONFIG, "--model.build.no_tie_embeddings", "--model.freeze_head"])
    frozen = plan.plan(untied).parameters
    assert frozen["head"] == 6000 * 192
    assert frozen["all"] - frozen["trainable"] == frozen["head"]


def test_exit_status_and_advice(capsys):
    assert plan.main([CONFIG, "--gpu-mem", "1GiB"]) == 0
    fits = capsys.readouterr().out
    assert "fits, " in fits.splitlines()[-1]
    assert plan.main([CONFIG, "--gpu-mem=20MB"]) == 1
    text = capsys.readouterr().out
    assert "does not fit" in text
    tries = [line.strip() for line in text.splitlines() if line.startswith("  try ")]
    assert "try --model.activation_checkpointing" in tries
    assert "try --ranks 2" in tries
    assert plan.main([CONFIG, "--json", "--gpu-mem", "20MB"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert found["gpu_mem"] == 20_000_000
    totals = [m["total"] for p in found["phases"] for m in p["moments"]]
    assert found["peak"]["bytes"] == max(totals)


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * 10**9), ("80GiB", 80 * 2**30), ("1.5 tb", 1.5e12)]
)
def test_sizes(text, size):
    assert plan.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["80", "GB", "-1GB", "0GB", "80 parsecs"])
def test_sizes_that_are_none(text, capsys):
    with pytest.raises(ConfigError, match="--gpu-mem: expected a size with its unit"):
        plan.parse_bytes(text)
    assert plan.main([CONFIG, f"--gpu-mem={text}"]) == 2
    assert "Type --gpu-mem 80GB" in capsys.readouterr().err


def test_smollm2_and_a_folder_with_nothing_but_its_config(tmp_path):
    with FakeTensorMode():
        by_name = model_maker(parse_arguments([CONFIG, "--model.path", "smollm2"]), "cpu")()
    assert parameters_by_part(by_name)["all"] == 134_515_008
    config = AutoConfig.for_model(
        "qwen3", vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    found = plan.plan(parse_arguments([CONFIG, "--model.path", str(tmp_path)]))
    assert found.parameters["head"] == 500 * 64
    assert found.peak[1].total > 0


def test_what_is_refused(tmp_path, capsys):
    assert plan.main([CONFIG, "--model.path", str(tmp_path / "none")]) == 2
    assert "expected a model folder" in capsys.readouterr().err
    assert plan.main([CONFIG, "--ranks", "3"]) == 2
    assert "rollout.prompts_per_step: expected a multiple of 3" in capsys.readouterr().err
    assert plan.main([CONFIG, "--ranks", "0"]) == 2
    assert "--ranks: expected at least 1, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_eight_billion_parameters_within_a_gibibyte(tmp_path, root):
    AutoConfig.for_model(
        "qwen3", vocab_size=151936, hidden_size=4096, intermediate_size=12288,
        num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        tie_word_embeddings=False, architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    code = (
        "import resource, sys; from crpo_fast import plan; status = plan.main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, status)"
    )
    arguments = ["configs/mental_r1_qwen3_8b.toml", "--model.path", str(tmp_path)]
    arguments += ["--ranks", "8", "--gpu-mem", "80GB"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=root, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kibibytes, status = done.stdout.split()[-2:]
    assert status == "0"
    assert int(kibibytes) < 2**20
    assert "8.19 B in all" in done.stdout
