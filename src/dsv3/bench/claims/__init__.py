"""The claims of the report as commands: ``dsv3 bench claims`` (docs/claims.md)."""
