"""Which backend runs and why: predicates with a reason, and what to type where one cannot run."""

from __future__ import annotations

import sys

import pytest
import torch

import crpo_kernels as ck
from crpo_kernels import dispatch, support
from crpo_kernels.dispatch import choose_backend, unsupported_reason
from numerics import make_problem, run_loss
from triton_tools import why_no_triton

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16 = torch.bfloat16
needs_triton = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as the predicates see one; set ``capability`` on what it returns."""

    class Card:
        capability = (9, 0)

    card = Card()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: card.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Test GPU")
    monkeypatch.setattr(support, "triton_version", lambda: "3.6.0")
    monkeypatch.setattr(support, "_toolchain_obstacle", lambda _: None)
    return card


def install(monkeypatch, folder, text):
    """Another triton at the head of the path, as nobody has imported one yet."""
    (folder / "triton").mkdir()
    (folder / "triton" / "__init__.py").write_text(text, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.syspath_prepend(folder)


class Hidden:
    """An import hook that knows no triton."""

    def find_spec(self, name, path=None, target=None):
        if name == "triton":
            raise ModuleNotFoundError(f"blocked: {name}")


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Hidden(), *sys.meta_path])


def test_triton_missing(without_triton):
    assert unsupported_reason("triton", GPU, BF16) == "Triton is not installed"
    assert ck.unsupported_reason("triton", "cuda", BF16) == "Triton is not installed"
    with pytest.raises(
        ValueError,
        match=r"backend: expected 'auto', 'torch' or 'dense' here, got 'triton': Triton is not "
        r"installed\. Type pip install 'triton>=3\.6', or pass backend='auto'\.",
    ):
        run_loss(make_problem(), torch.float32, spec=ck.ObjectiveSpec("sft"), backend="triton")
    choice = choose_backend("auto", GPU, BF16)
    assert choice == ("torch", "triton does not run: Triton is not installed")


@pytest.mark.parametrize(
    ("version", "is_old"),
    [("3.5.1", True), ("2.3.0", True), ("3.6.0", False), ("3.6.0+git9", False), ("3.10.0", False)],
)
def test_versions_compare_as_numbers(monkeypatch, tmp_path, version, is_old):
    install(monkeypatch, tmp_path, f"__version__ = '{version}'\nraise RuntimeError('imported')\n")
    reason = unsupported_reason("triton", GPU, BF16)
    assert (reason is not None) == is_old
    if is_old:
        assert reason == f"Triton {version} is installed, the kernels need 3.6 or newer"
        with pytest.raises(ValueError, match=r"got 'triton': Triton .* pip install 'triton>=3.6'"):
            choose_backend("triton", GPU, BF16)
        assert choose_backend("auto", GPU, BF16).name == "torch"


@needs_triton
def test_without_a_gpu_and_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(support, "_interpreted", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = unsupported_reason("triton", CPU, BF16)
    assert reason == (
        "no GPU: hidden is on cpu, and the kernels were imported without TRITON_INTERPRET=1"
    )
    with pytest.raises(ValueError, match=r"no GPU: .* Start python with TRITON_INTERPRET=1 set"):
        choose_backend("triton", CPU, BF16)
    assert choose_backend("auto", CPU, BF16) == ("torch", "triton does not run: no GPU")


@needs_triton
def test_a_process_that_never_interprets_does_not_import_triton_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delitem(sys.modules, "crpo_kernels.launch_triton", raising=False)
    reason = unsupported_reason("triton", CPU, BF16)
    assert "hidden is on cpu, where the kernels run in Triton's interpreter alone" in reason
    assert "crpo_kernels.launch_triton" not in sys.modules


@pytest.mark.parametrize("device", ["mps", "meta", "xpu"])
@needs_triton
def test_other_devices(device):
    reason = unsupported_reason("triton", torch.device(device), BF16)
    assert reason == f"no GPU: hidden is on {device}, the kernels run on CUDA and ROCm devices"


@pytest.mark.parametrize(
    ("dtype", "words"), [(torch.float64, "hidden is float64"), (torch.float16, "torch.float16")]
)
@needs_triton
def test_dtypes_without_kernels(dtype, words):
    assert words in unsupported_reason("triton", GPU, dtype)
    assert choose_backend("auto", GPU, dtype).name == "torch"


def test_compute_capability(gpu, monkeypatch):
    assert unsupported_reason("triton", GPU, BF16) is None
    choice = choose_backend("auto", GPU, BF16)
    assert choice == ("triton", "Triton 3.6.0 on Test GPU, compute capability 9.0")
    gpu.capability = (7, 5)
    assert unsupported_reason("triton", GPU, BF16) == (
        "Test GPU has compute capability 7.5, the kernels need 8.0 or newer"
    )
    monkeypatch.setattr(torch.version, "hip", "7.0")  # numbers of AMD's are others
    assert unsupported_reason("triton", GPU, BF16) is None


def test_what_triton_compiles_its_launcher_with(monkeypatch, tmp_path):
    support._toolchain_obstacle.cache_clear()
    assert "nocc is not on PATH" in support._toolchain_obstacle("nocc").reason
    monkeypatch.setattr(support.shutil, "which", lambda _: "found")
    monkeypatch.setattr(support.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "Python.h is missing" in support._toolchain_obstacle(None).reason
    support._toolchain_obstacle.cache_clear()
    (tmp_path / "Python.h").touch()
    assert support._toolchain_obstacle(None) is None
    support._toolchain_obstacle.cache_clear()


@needs_triton
def test_the_interpreter_of_triton_3_6_and_new_numpy(monkeypatch):
    monkeypatch.setattr(support, "triton_version", lambda: "3.6.0")
    monkeypatch.setattr(support, "_interpreted", lambda: True)
    for numpy_version, runs in (("2.3.5", True), ("2.4.0", False), ("2.10.0", False)):
        monkeypatch.setattr(support, "_numpy_version", lambda v=numpy_version: v)
        assert (unsupported_reason("triton", CPU, BF16) is None) == runs


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here")
def test_auto_takes_the_interpreter_only_when_the_environment_asks(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choose_backend("triton", CPU, BF16) == ("triton", "asked for")
    choice = choose_backend("auto", CPU, BF16)
    assert choice == ("torch", "triton does not run: no GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    name, reason = choose_backend("auto", CPU, BF16)
    assert name == "triton"
    assert "'s interpreter on the CPU (TRITON_INTERPRET=1)" in reason


def test_torch_and_dense_run_anywhere(without_triton):
    for backend in ("torch", "dense"):
        assert unsupported_reason(backend, CPU, torch.float64) is None
        assert choose_backend(backend, GPU, BF16) == (backend, "asked for")
    with pytest.raises(ValueError, match=r"backend: .* Did you mean 'triton'"):
        unsupported_reason("tritn", CPU, BF16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, None),
        ({"head_dtype": torch.float8_e4m3fn}, "no tile of the kernel multiplies e4m3 on Test GPU"),
        ({"backend": "torch"}, "belongs to the backend triton, and torch runs (asked for)"),
        ({"dtype": torch.float64}, "torch runs (triton does not run: hidden is float64"),
        ({"backend": "triton", "dtype": torch.float64}, "hidden is float64"),
    ],
)
def test_why_the_fused_kernel_cannot_score(options, words, gpu):
    gpu.capability = (8, 0)
    asked = {"backend": "auto", "device": GPU, "dtype": BF16, **options}
    reason = unsupported_reason(**asked, mode="fused")
    assert reason is None if words is None else words in str(reason)
    asked.pop("head_dtype", None)
    if asked["backend"] != "triton":
        assert unsupported_reason(**asked) is None
    with pytest.raises(ValueError, match=r"mode: .* Did you mean 'fused'"):
        unsupported_reason(**asked, mode="fussed")


def test_auto_says_once_a_process_what_it_took_and_why(without_triton, caplog):
    dispatch._log_once.cache_clear()
    caplog.set_level("INFO", logger="crpo_kernels")
    for _ in range(3):
        run_loss(make_problem(), torch.float32, spec=ck.ObjectiveSpec("sft"))
    expected = "backend auto: torch (triton does not run: Triton is not installed)"
    assert [m for m in caplog.messages if "auto" in m] == [expected]
    assert caplog.messages.count(expected) == 1


def test_explain_choice_says_the_backend_and_why(gpu):
    asked = {"num_rows": 64, "vocab_size": 700, "hidden_size": 16}
    first, _ = ck.explain_choice(**asked, backend="torch")
    assert first.startswith("backend torch (asked for), mode two_pass: ")
    with pytest.raises(ValueError, match=r"backend: .* got 'triton': hidden is float64"):
        ck.explain_choice(**asked, dtype=torch.float64, backend="triton")
