"""Turns a preset into the configuration that runs: the fields, their rules and conditions, and the memory policies.

Of the rest of the project, this package imports only the errors and the registry of rewards. It does not import torch,
so that a mistake in the configuration is found before torch is loaded.
"""
