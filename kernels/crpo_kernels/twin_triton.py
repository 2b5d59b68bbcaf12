"""The Triton twin of a module of plain functions over ``ops``: one copy of the mathematics.

    twin = triton_twin(objective)          in a kernel:  _clip_term = twin.clip_term

`objective` says in plain functions over the name ``ops`` what is computed. There ``ops`` is torch;
here every function of the module is rebuilt in one common scope in which ``ops`` is
``triton.language``, and jitted. One scope, because a function calls its helpers by their global
names: rebinding a single function would leave it calling torch's. Numbers of the module become
``tl.constexpr``, which is what a kernel may read from a global.
"""

from __future__ import annotations

from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import triton
import triton.language as tl

from .launch_triton import constant


def triton_twin(module: ModuleType) -> SimpleNamespace:
    """All functions of ``module``, jitted, as attributes.

    Raises:
        ValueError: the module has no ``ops``, or a function with defaults, which jit would drop.
    """
    members = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    if "ops" not in members:
        raise ValueError(
            f"module: expected plain functions over the name ops, got {module.__name__} without "
            "it. Write `import torch as ops` there."
        )
    scope: dict[str, Any] = {"__name__": f"{module.__name__}_triton", "ops": tl}
    functions = {}
    for name, value in members.items():
        if isinstance(value, FunctionType) and value.__module__ == module.__name__:
            if value.__defaults__ or value.__kwdefaults__:
                raise ValueError(
                    f"module: expected functions without defaults, got {name}. Pass every argument."
                )
            functions[name] = FunctionType(value.__code__, scope, name)
        elif isinstance(value, int | float | str):
            scope[name] = constant(value)
    for name, function in functions.items():
        function.__module__ = scope["__name__"]
        scope[name] = triton.jit(function)
    return SimpleNamespace(**{name: scope[name] for name in functions})
