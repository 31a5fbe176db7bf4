"""The step and the run."""
