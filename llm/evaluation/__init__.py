"""How good a model is, and what a person is shown of it: scores, baselines and reports."""
