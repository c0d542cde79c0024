"""Checks of the repository itself: layout, words, documentation. `make check` runs them."""
