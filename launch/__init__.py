"""The person's side: reads a recipe, starts a run, watches it, brings the adapter home. Torch-free."""
