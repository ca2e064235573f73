"""Processes and devices: random generators, agreement of processes, sharded weights, speed, work in the background.

This folder may import settings and models.
"""
