"""The science of the papers: class means, principal subspaces, attribution."""
