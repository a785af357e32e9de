"""What a run is asked to do, and the files that say so."""
