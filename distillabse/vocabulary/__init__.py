"""The student's vocabulary: what a corpus uses of the teacher's, and the teacher with no more than that."""
