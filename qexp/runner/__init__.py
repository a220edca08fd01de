"""A run's life: folder, status, log, metrics, checkpoint, device, environment.

`folder` and `atomic` import no torch, so that `qexp ls` and the skipping of finished sweep jobs
answer at once.
"""
