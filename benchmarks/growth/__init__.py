"""Time and bytes against sizes, settings and ranks."""
