"""The framework: recipes, scoring contexts, selection, masks, schedules and the engine."""
