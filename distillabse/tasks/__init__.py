"""What sentence encoders are judged by: retrieval of translations, similarity, probes; see docs/tasks.md."""
