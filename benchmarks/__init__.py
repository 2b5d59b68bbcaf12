"""Side-by-side measurements: `python -m benchmarks loss --device cpu`."""
