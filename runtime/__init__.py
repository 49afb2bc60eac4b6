"""What a run needs besides the method: checkpoints, options, processes, downloads."""
