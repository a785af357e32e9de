"""The folder that a run writes: its plan, its writer, its journal and its manifest."""
