"""Peak bytes of every candidate by shape, and what the code asks for on a GPU."""
