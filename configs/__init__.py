"""What a person edits: YAML groups, and the schema that checks them."""
