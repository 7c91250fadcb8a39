"""Which slices of which tensors live and die together, and how to cut them."""
