"""What is on the device and what layers keep; what a training step will cost, and the memory policy that fits.

May import settings, models, engine, lora, method and evaluation.
"""
