"""Pictures that several commands draw: bars and log-log curves."""
