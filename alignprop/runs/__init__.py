"""What lies on the disk: the run folder with its metrics, its checkpoints and their manifests; and the trackers.

May import settings, models, engine, lora, method and evaluation.
"""
