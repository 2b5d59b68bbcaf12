"""Correctness, precision, memory and speed on one GPU."""
