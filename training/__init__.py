"""Fit one model: what it learns, which sample comes next, the loop, checkpoints, and the launch on Ray Train."""
