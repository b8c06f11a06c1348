"""Read run directories, and render them as tables beside the published values and as figures."""
