"""Text in: sources, cleaning, splitting and mixing. `build` is the stage; `records` is what the other stages read."""
