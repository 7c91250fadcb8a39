"""A public conformance kit for methods, toy models with closed-form answers, and the surgery oracle."""
