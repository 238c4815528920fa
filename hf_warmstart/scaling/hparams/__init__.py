"""`HparamPredictor`: fitted laws, presets, and what they recommend for a run."""
