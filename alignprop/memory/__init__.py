"""Memory: moves modules to the device, limits what layers keep, forecasts costs, and chooses the memory policy.

May import settings, models, engine, lora, method and evaluation.
"""
