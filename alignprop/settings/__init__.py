"""From a preset to the configuration that runs: the fields, what they may be, what they need, and memory policies.

Of the rest of the project it imports only the errors and the registry of rewards, and no torch: so a mistake is found
before torch is loaded.
"""
