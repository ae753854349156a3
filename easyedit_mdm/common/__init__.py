"""Small shared things: registries, fingerprints."""
