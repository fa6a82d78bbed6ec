"""Twin repositories: one set of random definitions, applied with Feast's own Redis store and with ours."""
