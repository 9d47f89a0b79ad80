"""Floor 0: errors, registry, frozen configuration. Imports nothing of Sumuk."""
