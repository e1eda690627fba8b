"""A run: its start, folder, checkpoints, results, pictures and publication."""
