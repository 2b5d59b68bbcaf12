"""Bytes by shape and candidate: `python -m benchmarks memory --device cpu`."""

from .memory_table import add_arguments as add_arguments
from .memory_table import measure_memory as measure_memory
from .memory_table import run as run
