"""How a run is going: the step log, the progress line, the loggers, and what the held-out loss says."""
