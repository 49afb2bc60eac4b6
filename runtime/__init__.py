"""What a run needs around the method: checkpoints, options, processes, downloads."""
