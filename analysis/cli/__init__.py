"""What the commands share: options, items to networks, outputs."""
