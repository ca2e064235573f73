"""LoRAs: factors in a network's layers, a model's adapter, files in several formats, scaling, mixtures of two LoRAs.

It may import settings, models and engine.
"""
