"""The mathematics: samplers, guidance, estimators and their plans, the rollout and its adjoint sweep, losses, and
DDPO's policy gradient.

This folder can be read alone: it knows nothing of run folders, trackers or the hub. It may import settings, models,
engine and lora.
"""
