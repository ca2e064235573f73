"""The run folder on the disk, with its metrics, checkpoints and manifests; and the trackers.

It may import settings, models, engine, lora, method and evaluation.
"""
