"""The mathematics: samplers, guidance, estimators, the rollout and its adjoint sweep, losses, and a policy gradient.

This folder can be read alone: it knows nothing of run folders, trackers or the hub. It may import settings, models,
engine and lora.
"""
