"""What pictures are worth: rewards and other measures on held-out prompts, conditions for stopping, grids and curves.

May import settings, models, engine, lora and method, and the prompts.
"""
