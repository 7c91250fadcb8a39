"""Training: one loop on Lightning Fabric, hooks, checkpoints."""
