"""Gates that a bundle must pass, alone or as a stage of a job."""
