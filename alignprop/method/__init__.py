"""The mathematics: samplers, guidance, estimators and their plans, the rollout and its adjoint sweep, losses.

It can be read alone: it knows nothing of run folders, trackers or the hub. May import settings, models, engine and
lora.
"""
