"""What a run found, drawn: cell graphs, α heat maps, curves and the one-page HTML report."""
