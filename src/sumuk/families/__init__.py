"""Floor 2: what each family of models is, one value in one file, and which family a header belongs to."""
