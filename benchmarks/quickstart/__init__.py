"""The main job over seeds beside its rivals."""
