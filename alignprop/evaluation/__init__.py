"""The evaluation of pictures: rewards and measures on held-out prompts, conditions for stopping, grids and curves.

It may import settings, models, engine, lora and method, and the prompts.
"""
