"""What leaves the machine: LoRAs for other tools, merged models, model cards, uploads to the hub.

May import all rooms but memory.
"""
