"""Stock answers to the questions of a recipe: what three or more methods use."""
