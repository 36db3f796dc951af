"""One file a stage: where Ray meets the rest."""
