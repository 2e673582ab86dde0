"""Checkpoint files: read safely, recognised, made into networks."""
