"""Answers that are JSON of a schema: from the schema to the tokens that may come next."""
