"""Publishes the results of a run: LoRAs for other tools, merged models, model cards, uploads to the hub.

It may import every room above it in the table of docs/design.md.
"""
