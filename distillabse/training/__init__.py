"""From a corpus and a configuration to a trained student."""
