"""The loss under the names and signatures of other trainers; each module imports its own alone."""
