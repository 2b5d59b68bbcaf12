"""What a candidate needs to run, as a predicate with a reason: package, device, dtype, sizes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from .cases import Case

LONGEST_REASON = 200


@dataclass(frozen=True)
class Needs:
    """What must be there for a candidate; empty for our own code and plain torch.

    Attributes:
        distribution: its version is the row's; "torch" needs no import of its own.
        load: imports and returns what the step calls; its exception is the reason.
        device: type of the only device that it runs on, or "".
        capability: the only compute capabilities that it runs on; empty: any.
        dtypes: the only ones that it takes; empty: any.
        generates_code: its first call compiles for seconds to minutes.
        multiples: size of the case (`num_rows`, `vocab_size`, `dim`) -> what must divide it.
    """

    distribution: str = ""
    load: Callable[[], object] | None = None
    device: str = ""
    capability: tuple[tuple[int, int], ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    generates_code: bool = False
    multiples: Mapping[str, int] = field(default_factory=dict)

    def version(self) -> str:
        """The installed version, "" without one."""
        return installed_version(self.distribution) if self.distribution else ""

    def unmet(self, case: Case, device: torch.device) -> str:
        """The first thing that is missing, or "".

        What needs no import is asked first: a GPU's package is not loaded on a CPU.
        """
        if self.distribution and not self.version():
            return f"{self.distribution} is not installed"
        return self.device_reason(device) or self.case_reason(case) or self.import_reason()

    def device_reason(self, device: torch.device) -> str:
        """Why it cannot run on the device, or ""."""
        if self.device and device.type != self.device:
            return f"needs a {self.device.upper()} device"
        if self.capability and (found := torch.cuda.get_device_capability(device)) not in (
            self.capability
        ):
            wanted = ", ".join(f"sm_{major}{minor}" for major, minor in self.capability)
            return f"needs {wanted}, this is sm_{found[0]}{found[1]}"
        return ""

    def case_reason(self, case: Case) -> str:
        """Why it cannot take the case's dtype or sizes, or ""."""
        if self.dtypes and case.dtype not in self.dtypes:
            wanted = " or ".join(str(kind).removeprefix("torch.") for kind in self.dtypes)
            return f"takes {wanted} only"
        letters = {"num_rows": "T", "vocab_size": "V", "dim": "D"}
        for name, divisor in self.multiples.items():
            if (size := getattr(case, name)) % divisor:
                return f"{letters[name]} must be a multiple of {divisor}, got {size}"
        return ""

    def import_reason(self) -> str:
        """Why its code cannot be imported, or ""; what it prints on import is not shown."""
        if self.load is None:
            return ""
        silence = io.StringIO()
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(silence),
            contextlib.redirect_stderr(silence),
        ):
            warnings.simplefilter("ignore")
            try:
                self.load()
            except (
                Exception,
                SystemExit,
            ) as error:  # whatever a peer's import raises is its reason
                return f"cannot be imported: {type(error).__name__}: {error}"[:LONGEST_REASON]
        return ""


def installed_version(package: str) -> str:
    """Of a distribution, "" where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


NOTHING = Needs()
