"""What happens to the kept weights at a cut."""
