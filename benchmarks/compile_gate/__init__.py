"""Every Triton kernel compiled for GPUs that are not here."""
