"""Language models: where they come from, what of them is run, adapters on them, which tokens they know."""
