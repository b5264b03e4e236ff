"""The life of a run: its folder, start, checkpoints, log, evaluation and end."""
