"""A LoRA: its factors in a network's layers, a model's adapter, its files in several formats, scaling, mixtures of two.

May import settings, models and engine.
"""
