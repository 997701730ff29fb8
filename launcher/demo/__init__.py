"""The demo: corpora from text that every machine has, and the main job on them."""
