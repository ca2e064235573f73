"""From a preset to the configuration that runs: the fields, what they may be, what they need, and memory policies.

Imports nothing else of the project, so that a mistake is found before torch is loaded.
"""
