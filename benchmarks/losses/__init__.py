"""Loss and score: every candidate at every shape, beside its floor, its peers and the truth."""
