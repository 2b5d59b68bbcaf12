"""The training phase of one optimizer step, ours and TRL's."""
