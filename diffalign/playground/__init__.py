"""The embedded playground: a world of small scenes, an exact verifier, and models trained on it that ship here."""
