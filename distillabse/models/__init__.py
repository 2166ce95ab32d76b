"""The teacher, the student and the taps that read signals out of both."""
