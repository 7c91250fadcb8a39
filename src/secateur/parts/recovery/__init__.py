"""What repairs a pruned network."""
