"""One module for each command of qplug; ``qplug.cli`` says which, and imports it when it is run."""
