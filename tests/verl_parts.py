"""Modules of verl without what its packages import (Ray, a server)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.losses.peers.verl import bare_packages


def their(module: str) -> ModuleType:
    """The module of this name; skips where verl is not installed."""
    if "verl" not in sys.modules and importlib.util.find_spec("verl") is None:
        pytest.skip("verl is not installed: pip install --no-deps verl==0.9.1")
    bare_packages()
    parts = module.split(".")
    for end in range(2, len(parts)):
        name = ".".join(parts[:end])
        if name not in sys.modules:
            package = ModuleType(name)
            package.__path__ = [str(Path(sys.modules["verl"].__path__[0], *parts[1:end]))]
            sys.modules[name] = package
    return importlib.import_module(module)
