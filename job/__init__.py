"""What runs in the container: `python -m job` lives one attempt of a run."""
