"""Processes and devices: random generators, what processes agree on, spread weights, speed, work in the background.

May import settings and models.
"""
