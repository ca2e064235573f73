"""Processes and devices: random generators, agreement of processes, sharded weights, optimizers, speed, and threads.

This folder may import settings and models.
"""
