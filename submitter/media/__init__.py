"""Media files: probe reference media, publish local files, download results."""
