"""Speech from prompts: the audio path with a static cache, drawing, slots, and the engine that fills them."""
