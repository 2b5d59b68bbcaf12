"""The distribution `crpo-fast`: import packages `crpo_fast` and `crpo_kernels`.

Lower bounds only; `constraints.txt` holds the exact versions that are tested. `kernels/` is a
source root and no package, because PyPI has a distribution whose import name is `kernels`.
"""

from pathlib import Path

from setuptools import find_packages, setup

HAS_TRITON = "platform_system == 'Linux' and platform_machine in 'x86_64 aarch64'"
# crpo_fast.models reads the weights of a small pretrained model; transformers asks for accelerate.
GGUF = ["accelerate>=1.6", "gguf>=0.17"]

TRACKERS = ["tensorboard>=2.19", "trackio>=0.43", "wandb>=0.31"]
# What crpo_fast.integrations and docs/examples are tested with, verl apart: its requirements hold
# Ray and more, so `pip install --no-deps verl` brings the modules that are tested.
INTEGRATIONS = [
    *("accelerate>=1.10", "datasets>=4.7", "peft>=0.18", "trl>=1.16"),
    "deepspeed>=0.18.6; platform_system == 'Linux'",
]
LIGER = "liger-kernel>=0.8; platform_system == 'Linux'"

EXTRAS = {
    "demo": GGUF,
    "test": [
        *GGUF,
        *INTEGRATIONS,
        LIGER,
        "coverage>=7.6",
        "hypothesis>=6.130",
        "playwright>=1.49",  # the report in a real browser, when a chromium is there
        "pyrefly>=1.4",
        "pytest>=9",
        "pytest-xdist>=3.8",
        "ruff>=0.17",
        "setuptools>=77",  # the wheel test builds without network
        *TRACKERS,
    ],
    "flash": ["flash-attn>=2.8; platform_system == 'Linux'"],
    "integrations": INTEGRATIONS,
    "liger": [LIGER],
    "tensorboard": TRACKERS[:1],
    "trackio": TRACKERS[1:2],
    "wandb": TRACKERS[2:],
    "bench": [
        *("matplotlib>=3.10", "trl>=1.16", "cut-cross-entropy>=25.1"),
        LIGER,
    ],
    "bench-gpu": [  # brings CUTLASS, 300 MB; verl comes by hand: docs/benchmarks.md
        "liger-kernel[cutedsl]>=0.8; platform_system == 'Linux'",
        "quack-kernels>=0.6; platform_system == 'Linux'",
    ],
}
EXTRAS["dev"] = [*EXTRAS["test"], "codespell>=2.4", "pre-commit>=4"]

setup(
    name="crpo-fast",
    version="0.1.0",
    description="CRPO and the GRPO family on a fused policy loss, with a lean FSDP2 trainer",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir={"crpo_fast": "crpo_fast", "crpo_kernels": "kernels/crpo_kernels"},
    packages=[
        *find_packages(".", include=["crpo_fast", "crpo_fast.*"]),
        *find_packages("kernels", include=["crpo_kernels", "crpo_kernels.*"]),
    ],
    package_data={
        "crpo_fast": ["py.typed"],
        "crpo_fast.report": ["*.html", "*.css", "*.js"],
        "crpo_kernels": ["py.typed"],
    },
    install_requires=[
        "jinja2>=3.1",  # chat templates
        "numpy>=1.26",
        "psutil>=6",
        "rich>=13.9",
        "safetensors>=0.6",
        "scikit-learn>=1.5",
        "tokenizers>=0.22",
        "tomli-w>=1.0",
        "torch>=2.11",
        "transformers>=5.16",
        f"triton>=3.6; {HAS_TRITON}",
        "tyro>=1.0",
    ],
    extras_require=EXTRAS,
)
