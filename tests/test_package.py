"""The wheel, its neighbours on PyPI, names of files, and what the README promises."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from email.message import Message
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
COMMANDS = [
    'pip install -c constraints.txt -e ".[demo]" && torchrun crpo_fast/train.py',
    'pip install -c constraints.txt -e ".[test]" && pytest -n auto',
]
EXTRAS = {"demo", "test", "flash", "liger", "tensorboard", "wandb", "trackio", "dev"}
EXTRAS |= {"bench", "bench-gpu", "integrations"}


def python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    """Runs this Python elsewhere, PYTHONPATH = ``path`` alone; returns what it printed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{arguments} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(*arguments: str, cwd: Path) -> None:
    """Runs pip without network, requirements or build isolation."""
    quiet = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check")
    python("-m", "pip", *arguments, *quiet, cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that nothing is written into the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("crpo_fast", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", ".", "--no-build-isolation", "--wheel-dir", "out", cwd=source)
    (built,) = (source / "out").glob("crpo_fast-*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("/METADATA")]
        return message_from_string(archive.read(name).decode())


def test_wheel_holds_both_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
    sources = {"crpo_fast": ROOT / "crpo_fast", "crpo_kernels": ROOT / "kernels" / "crpo_kernels"}
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in sources.items()
        for pattern in ("*.py", "py.typed", "*.html", "*.css", "*.js")
        for path in folder.rglob(pattern)
    }
    assert names == expected


def test_metadata(metadata):
    assert metadata["Name"] == "crpo-fast"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS
    requirements = [r.partition(";") for r in metadata.get_all("Requires-Dist", [])]
    assert [r[0] for r in requirements if re.search(r"==|<|~=|!=", r[0])] == []  # lower bounds only
    assert {r[0]: r[2].strip() for r in requirements if r[0].startswith(("torch", "triton"))} == {
        "torch>=2.11": "",
        "triton>=3.6": 'platform_system == "Linux" and platform_machine in "x86_64 aarch64"',
    }


# A version that transformers uses; the real decorators, too, return what they decorate.
FAKE_KERNELS = """
__version__ = "0.18.99"
class Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, decorated): return decorated
def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return Anything
"""
BESIDE_KERNELS = """
import sys, kernels
assert kernels.__file__ == sys.argv[1], kernels.__file__
from transformers.utils import is_kernels_available
assert is_kernels_available()
import transformers.modeling_utils, transformers.models.llama.modeling_llama
import crpo_fast.batch, crpo_kernels
assert kernels.__version__ == "0.18.99"
print(crpo_kernels.__file__)
"""


def test_it_lives_beside_the_distribution_called_kernels(wheel, tmp_path):
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(FAKE_KERNELS)
    (site / "kernels-0.18.99.dist-info").mkdir()
    described = "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.99\n"
    (site / "kernels-0.18.99.dist-info" / "METADATA").write_text(described)

    pip("install", "--target", str(site), str(wheel), cwd=tmp_path)
    assert [path.name for path in (site / "kernels").glob("*.py")] == ["__init__.py"]
    assert (site / "kernels" / "__init__.py").read_text() == FAKE_KERNELS
    theirs = str(site / "kernels" / "__init__.py")
    # From the root of the checkout its folder kernels/ comes first on the path, and must not win.
    for cwd in (ROOT, tmp_path):
        ours = python("-c", BESIDE_KERNELS, theirs, cwd=cwd, path=site)
        assert Path(ours.strip()) == site / "crpo_kernels" / "__init__.py"


TORCH_ALONE = """
import sys
blocked = set(sys.argv[1].split())
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
sys.meta_path.insert(0, Block())
import torch, crpo_kernels
for name in crpo_kernels.__all__:
    getattr(crpo_kernels, name)
assert not blocked & set(sys.modules), blocked & set(sys.modules)
print(len(crpo_kernels.__all__))
"""


def test_kernels_import_with_torch_alone(tmp_path):
    blocked = "triton transformers tokenizers safetensors tyro rich psutil crpo_fast kernels"
    public = python("-c", TORCH_ALONE, blocked, cwd=tmp_path, path=ROOT / "kernels")
    assert int(public) >= 5


def test_no_file_shadows_a_module():
    # `torchrun crpo_fast/train.py` puts crpo_fast/ first on the path.
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    ours = {line.split("==")[0].lower().replace("_", "-") for line in pinned if "==" in line}
    taken = {
        module
        for module, distributions in packages_distributions().items()
        if ours & {name.lower().replace("_", "-") for name in distributions}
    }
    taken |= sys.stdlib_module_names
    assert {"torch", "tokenize", "queue"} <= taken
    names = {path.stem for path in (ROOT / "crpo_fast").iterdir() if path.suffix in {".py", ""}}
    assert names & taken == set()


def test_kernels_is_a_folder_and_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_constraints_pin_exact_versions():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [p for p in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", p)] == []
    assert "torch==2.13.0" in pins


def test_readme_begins_with_the_two_commands():
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert blocks[0].splitlines() == COMMANDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paths_named_in_the_docs_exist(page):
    text = page.read_text(encoding="utf-8")
    folders = r"(?:crpo_fast|kernels|benchmarks|tests|configs|docs|\.ci)"
    named = set(re.findall(rf"(?<![\w./-])({folders}/[\w./*-]*[\w*/])", text))
    missing = {name for name in named if not list(ROOT.glob(name.rstrip("/")))}
    links = set(re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text))
    missing |= {link for link in links if not (page.parent / link).exists()}
    assert missing == set()
