"""The worker that runs NeMo: recipe, heads and their loss, data, stopping and resuming, the path without a GPU."""
